"""One-shot searches: a supernet learns one random path a step, then an evolution scores paths with its weights."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from nasdet.arch import Card, save_card
from nasdet.data import DetectionDataset, require_selectable
from nasdet.engine import distributed
from nasdet.engine.checkpoint import LAST, digest, load_checkpoint, load_into, seed_everything
from nasdet.engine.evaluate import evaluate
from nasdet.engine.evolve import SCORES, STATE, check_same, evolve
from nasdet.engine.loop import Loop, Stateful
from nasdet.engine.optim import Schedule, make_optimizer
from nasdet.engine.paths import uniform_draw
from nasdet.engine.runs import read_info
from nasdet.engine.step import train_step
from nasdet.engine.supernet import SupernetRun, check_settings, fixed
from nasdet.measure.latency_table import Blocks, LatencyTable, Record
from nasdet.search.constraints import Constraint
from nasdet.search.evolution import RANDOM, Evolution, Offspring

ALGORITHMS = ("evolution", "random")


@dataclass(frozen=True)
class OneShotConfig:
    """Settings of every one-shot search; a method's own adds its space and has its paper's numbers as defaults.

    Supernet: ``steps`` of ``batch`` images over all processes, ``optimizer``, ``lr``, ``momentum``, ``weight_decay``,
    ``decay``, ``warmup_steps``, ``clip``, ``flip``; ``norm`` of the backbone; a detector as in
    :class:`~nasdet.spaces.assemble.ModelConfig`. ``supernet`` is the folder of a finished run of the same space, whose
    trained supernet is taken in the place of training one.

    ``latency_table`` is a file of ``nasdet measure latency`` for the same space: predicted milliseconds are recorded
    for every candidate, and ``max_latency`` limits them.

    Search: ``generations`` of a ``population``, of which the best ``parents`` have children; ``algorithm`` is
    ``"evolution"``, or ``"random"``: as many random architectures under the same limits. Architectures are scored on
    ``val_images`` of the search-val images (all where there are fewer); what is left of them learns with search-train.
    ``top`` cards are written besides the best.
    """

    steps: int = 90_000
    batch: int = 16
    short_side: int = 800
    long_side: int = 1333
    optimizer: str = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay: str = "step"
    warmup_steps: int | None = 500
    clip: float | None = None
    detector: str = "faster_rcnn"
    fpn_channels: int = 256
    levels: int = 5
    tower_convs: int = 4
    norm: str = "sync_bn"
    algorithm: str = ALGORITHMS[0]
    population: int = 50
    parents: int = 10
    generations: int = 20
    val_images: int = 5000
    eval_batch: int = 4
    top: int = 5
    supernet: str | None = None
    latency_table: str | None = None
    max_latency: float | None = None
    amp: bool = False
    channels_last: bool = True
    flip: bool = True
    seed: int = 0
    workers: int = 2
    log_every: int = 20
    checkpoint_every: int = 500
    name: str | None = None

    def check(self, method: str) -> None:
        """Raise ``ValueError`` for settings out of range."""
        whole = ("steps", "batch", "population", "parents", "generations", "val_images", "eval_batch", "top")
        check_settings(method, self, (*whole, "log_every", "checkpoint_every"), ("lr", "clip", "max_latency"))
        if self.max_latency is not None and self.latency_table is None:
            raise ValueError(f"latency_table must be given with max_latency, got None and {self.max_latency:g} ms")
        if self.parents > self.population:
            raise ValueError(f"parents must not exceed the population of {self.population}, got {self.parents}")
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {self.algorithm!r}")
        self.schedule(self.steps)

    def rate(self) -> float:
        """The learning rate: ``lr``, or 0.02."""
        return 0.02 if self.lr is None else self.lr

    def schedule(self, total: int) -> Schedule:
        """The supernet's learning rate by step."""
        return Schedule(self.rate(), total, decay=self.decay, warmup_steps=self.warmup_steps)


#: what is of the evolution and not of the supernet
_SEARCH = (
    *("tuning_steps", "tuning_batch", "tuning_micro_batch", "tuning_lr"),
    *("recalibration", "recalibration_images", "eval_batch"),
    *("population", "parents", "offspring", "algorithm", "max_macs", "max_parameters", "max_latency"),
    *("latency_table", "target_macs", "tolerance", "macs_height", "macs_width"),
)


class OneShotRun(SupernetRun):
    """Trains a supernet path by path, then searches with its weights. Several processes may share both.

    A method's class sets ``verb`` and ``of_supernet`` and defines ``build``, ``constraints``, ``timed_blocks``,
    ``children``, ``facts`` and ``deviations``, and ``adapt`` where a candidate is made ready before it is scored. Its
    space has ``random``, ``check``, ``activate(supernet, card)``, ``settings``, and what :class:`Evolution` needs.

    All processes of ``torchrun`` train together, in each step the same path, drawn from seed and step. Then the group
    of processes is left, and each evaluates candidates of its own (:func:`~nasdet.engine.evolve.evolve`): norms and
    losses see one process, and none can hold up another.
    """

    parallel = True
    config: Any
    #: settings that the shape of the supernet depends on
    of_supernet: ClassVar[tuple[str, ...]]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        config = self.config
        if self.backend is not None:
            raise ValueError(f"backend must be None for {self.verb}, whose parts have no choice, got {self.backend!r}")
        self.rank, self.ranks = distributed.rank(), distributed.world_size()
        self.learnt, self.scored = self._divide()
        truth = self.scored.ground_truth()["annotations"]
        if not any(not annotation["iscrowd"] for annotation in truth):
            raise ValueError(f"search-val must hold an object to score by, got none in {len(self.scored)} images")
        rates = {"momentum": config.momentum, "weight_decay": config.weight_decay}
        self.schedule: Schedule = config.schedule(self.steps)
        self.optimizer = make_optimizer(config.optimizer, self.model, self.schedule.lr, **rates)
        self.search = self.evolution()  # here, as limits that cannot be met must not wait for the training

    def _divide(self) -> tuple[DetectionDataset, DetectionDataset]:
        """The images that the supernet learns from, and those that candidates are scored on.

        Which ones depends on the split alone, so that searches of other seeds may use the same supernet.
        """
        data, most = self.data, self.config.val_images
        split = data.split
        ranked = sorted(split.search_val, key=lambda i: hashlib.sha256(f"{split.sha256}:{i}".encode()).digest())
        learnt = data.trainval.subset({*split.search_train, *ranked[most:]}, "search-train", split)
        return learnt, data.search_val().subset(ranked[:most])

    @abstractmethod
    def constraints(self) -> Sequence[Constraint]:
        """The limits that every candidate must keep."""

    @abstractmethod
    def timed_blocks(self) -> Blocks:
        """The blocks of the space's nets, by which a latency table predicts."""

    def limits(self) -> list[Constraint]:
        """The method's constraints, and that on measured latency where there is a table."""
        if (path := self.config.latency_table) is None:
            return [*self.constraints()]
        table = LatencyTable.load(path, self.timed_blocks(), Record.load(path).setting.size)
        latency = Constraint("milliseconds", table, None, self.config.max_latency, table.reachable())
        return [*self.constraints(), latency]

    @abstractmethod
    def children(self) -> tuple[Offspring, ...]:
        """How a generation's children are made."""

    def adapt(self, card: Card) -> None:
        """Make the model, which runs the path of ``card`` with the shared weights, ready to be scored.

        Torch's and Python's generators are seeded by card and seed before; whatever this does to the model's state is
        undone afterwards.
        """

    def draw(self, step: int) -> Card:
        """The path of a step of the supernet's training: uniform, the same in every process."""
        return uniform_draw(self.space, self.config.seed)(step)

    def activate(self, card: Card) -> None:
        """Run the path of a card from now on."""
        self.space.activate(self.supernet, card)

    def state(self) -> dict[str, Stateful]:
        return {"model": self.model, "optimizer": self.optimizer}

    def stepper(self, start: int) -> Callable[[int], Mapping[str, Tensor]]:
        config, module = self.config, distributed.LossModule(self.model)
        batches = self.batches(self.learnt, seed=config.seed, start=start, steps=self.steps)

        def step(index: int) -> Mapping[str, Tensor]:
            self.activate(self.draw(index))
            batch = next(batches).to(self.device, self.format, non_blocking=True)
            rate = self.schedule.at(index)
            return train_step(module, self.optimizer, batch, rate, clip=config.clip, amp=config.amp, average=True)

        return step

    def learn(self, loop: Loop) -> None:
        distributed.share_state(self.model)
        super().learn(loop)
        distributed.share_state(self.model)  # norms that are not synchronised have other statistics in each process

    def facts(self) -> dict[str, Any]:
        images = {"images": {"learnt": len(self.learnt), "scored": len(self.scored)}}
        limits = {one.name: [one.low, one.high] for one in self.search.constraints}
        table = self.config.latency_table
        timed = {} if table is None else {"latency": asdict(Record.load(table).setting)}
        return {"space": self.space.settings(), "limits": limits, **images, **timed}

    def ready(self, out: Path, resume: bool) -> bool:
        """Whether the supernet is that of another run; ``ValueError`` where it cannot be taken from there."""
        taken = self.config.supernet is not None
        # Where there is no training of its own, no checkpoint tells of a run that is there already.
        found = [name for name in (STATE, SCORES, *(["run.json"] if taken else [])) if (out / name).exists()]
        if found and not resume:
            raise ValueError(f"{out} already holds a run: add --resume to go on with it, or choose another --out")
        if taken:
            if self.weights is not None:
                raise ValueError(f"weights must be None with the supernet of another run, got {self.weights}")
            self._take_supernet(Path(self.config.supernet))
        if STATE in found:  # before anything is written; one's own supernet is not loaded yet
            check_same(out / STATE, self._of(), () if taken else ("supernet",))
        distributed.barrier()  # no process may write there before all have looked
        return self.config.supernet is not None

    def _take_supernet(self, run: Path) -> None:
        if (verb := read_info(run).get("verb")) != self.verb:
            raise ValueError(f"supernet must be the folder of a run of {self.verb}, got {run}: {verb}")
        payload = load_checkpoint(run / LAST)
        theirs, wanted = payload["config"], fixed(self.config) | {"split": self.data.split.sha256}
        for name in (*self.of_supernet, "split"):
            if theirs.get(name) != wanted[name]:
                raise ValueError(f"{run}: its supernet must have {name} {wanted[name]}, got {theirs.get(name)}")
        if payload["step"] < payload["steps"]:
            raise ValueError(f"{run}: its supernet must be trained, got {payload['step']} of {payload['steps']} steps")
        if (ours := self.config.val_images) > (most := theirs["val_images"]):
            raise ValueError(f"val_images must be at most the {most} that the supernet of {run} kept, got {ours}")
        load_into("model", self.model, payload["state"]["model"], run / LAST)

    def evolution(self) -> Evolution:
        """The search, at its start."""
        config = self.config
        offspring = self.children()
        if config.algorithm == "random":
            # As many as evolution would make, of which a narrow window lets few pass.
            wanted = sum(group.count for group in offspring)
            offspring = (Offspring((RANDOM,), wanted, attempts=1000 * wanted),)
        return Evolution(
            self.space,
            constraints=self.limits(),
            population=config.population,
            parents=config.parents,
            generations=config.generations,
            offspring=offspring,
            seed=config.seed,
        )

    def fitness(self, card: Card) -> float:
        """Average precision of a path on the search-val images, with the supernet's weights, adapted.

        It depends on the card, the seed and the supernet alone. The model's state is afterwards as before.
        """
        require_selectable(self.scored, self.data.split)
        config, shared = self.config, {key: value.clone() for key, value in self.model.state_dict().items()}
        chance = hashlib.sha256(f"{config.seed} {card.key}".encode()).digest()
        seed_everything(int.from_bytes(chance[:4], "big"))
        self.activate(card)
        try:
            self.adapt(card)
            found = evaluate(
                self.model,
                self.scored,
                short=config.short_side,
                long=config.long_side,
                batch=config.eval_batch,
                workers=config.workers,
                device=self.device,
                channels_last=self.format is torch.channels_last,
                amp=config.amp,
                progress=False,
            )
        finally:
            self.model.load_state_dict(shared)
            self.model.zero_grad(set_to_none=True)
        return float(found["AP"])

    def _of(self) -> dict[str, Any]:
        """What scores depend on besides the card."""
        kept = {key: value for key, value in fixed(self.config).items() if key != "supernet"}
        if self.config.latency_table is not None:
            kept["latency_table"] = hashlib.sha256(Path(self.config.latency_table).read_bytes()).hexdigest()
        return {**kept, "split": self.data.split.sha256, "supernet": digest(self.model.state_dict())}

    def loop(self, out: Path, settings: Mapping[str, Any], resume: bool, progress: bool) -> Loop:
        # A supernet that took days may be searched with other settings than it was trained with; scores may not be
        # mixed, which their own files see to.
        training = {name: value for name, value in settings.items() if name not in _SEARCH}
        loop = super().loop(out, training, resume, progress)
        if loop.start < self.steps and self.config.batch % self.ranks:
            raise ValueError(f"batch must be a multiple of {self.ranks} processes, got {self.config.batch}")
        return loop

    def finish(self, out: Path, *, resume: bool = False, progress: bool = True) -> Card:
        """Search, then write ``cost.json``, ``model.json``, ``card.json`` and the ``top`` cards; returns the best."""
        shares: dict[str, Any] = {"rank": self.rank, "ranks": self.ranks}
        evolve(self.search, self.fitness, out, self._of(), **shares, resume=resume, progress=progress)
        if self.rank:
            return self.derive(self.source())
        for place, (card, score) in enumerate(self.search.population[: self.config.top], 1):
            found = replace(card, name=f"{self.name()}-{place}", source=self.source() | {"score": score})
            save_card(found, out / "cards" / f"{place}.json")
        return super().finish(out, resume=resume, progress=progress)

    def derive(self, source: Mapping[str, Any]) -> Card:
        card, score = self.search.best()
        return replace(card, name=self.name(), source={**source, "score": score})

    def source(self) -> dict[str, Any]:
        config, told = self.config, {"evaluations": len(self.search.history), "algorithm": self.config.algorithm}
        return super().source() | told | ({} if config.supernet is None else {"supernet": Path(config.supernet).name})

    @abstractmethod
    def name(self) -> str:
        """The name of the card found."""
