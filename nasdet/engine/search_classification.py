"""Search by classification accuracy: the baseline that DetNAS is compared with (SPOS, Guo et al., ECCV 2020)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from nasdet._files import read_json
from nasdet.arch import Card, save_card
from nasdet.data.classification import ClassificationFolder
from nasdet.data.split import require_selectable
from nasdet.detectors.classifier import Classifier
from nasdet.engine import distributed
from nasdet.engine.checkpoint import LAST, digest, load_checkpoint, seed_everything
from nasdet.engine.classify import evaluate_classifier
from nasdet.engine.evolve import STATE, evolve
from nasdet.engine.layout import place_model
from nasdet.engine.paths import Paths
from nasdet.engine.pretrain import PARTS, PretrainConfig, recalibrate_classifier
from nasdet.engine.recalibrate import MODES
from nasdet.engine.runs import recorded, sole_writer
from nasdet.engine.trunks import Trunk, trunk
from nasdet.search.constraints import Constraint
from nasdet.search.evolution import PRESETS, Evolution, Offspring

SEARCH = "nasdet classification"
"""What the source of its cards says."""

# What decides which pixels are seen, and so what a score depends on besides the search's own settings.
_SEEN = ("size", "short", "least_area", "jitter", "flip", "amp", "recalibration_images", "eval_batch", "seed")


@dataclass(frozen=True)
class ClassificationSearchConfig:
    """An evolution on accuracy; the defaults are DetNAS's: 50 in a population, 10 parents, 20 generations.

    ``offspring`` is a name of :data:`nasdet.search.evolution.PRESETS`, whose numbers of children are taken in
    proportion to ``population``; ``recalibration`` the mode of :func:`nasdet.engine.recalibrate.recalibrate`; images
    for it, picture size, batch, bfloat16 and workers are those of the supernet's :class:`PretrainConfig`. ``top`` cards
    are written besides the best.
    """

    population: int = 50
    parents: int = 10
    generations: int = 20
    offspring: str = "detnas"
    recalibration: str = MODES[0]
    top: int = 5
    seed: int = 0
    name: str = "classification"

    def __post_init__(self) -> None:
        if self.offspring not in PRESETS:
            raise ValueError(f"offspring must be one of {', '.join(PRESETS)}, got {self.offspring!r}")
        if self.recalibration not in MODES:
            raise ValueError(f"recalibration must be one of {', '.join(MODES)}, got {self.recalibration!r}")
        if self.top < 1:
            raise ValueError(f"top must be at least 1, got {self.top}")
        Card("any", self.name, ["any"])

    def children(self) -> tuple[Offspring, ...]:
        """How a generation's children are made."""
        preset = PRESETS[self.offspring]
        share = self.population / preset["population"]
        return tuple(replace(one, count=max(1, round(one.count * share))) for one in preset["offspring"])


def load_supernet(run: str | Path, device: str | None = None) -> tuple[PretrainConfig, Trunk]:
    """The settings and the supernet of paths of a run of ``nasdet pretrain --space``.

    ``ValueError``, which names the run, for one of anything else.
    """
    info = read_json(Path(run) / "run.json")
    space = info.get("space") if info.get("verb") == "pretrain" else None
    named = {"space": space, "width": info.get("width"), "shuffle": info.get("shuffle")}
    network = None if space is None or space.startswith("hit") else trunk(**named)
    if network is None or network.paths is None:
        raise ValueError(f"{run}: must be a run of nasdet pretrain of a supernet of paths, got {space or 'none'}")
    if (part := info["arguments"].get("part")) != PARTS[True]:
        raise ValueError(f"{run}: its supernet must not have seen search-val, got one that learnt on {part}")
    payload = load_checkpoint(Path(run) / LAST)
    if payload["step"] < payload["steps"]:
        raise ValueError(f"{run}: its supernet must be trained, got {payload['step']} of {payload['steps']} steps")
    known = {field.name for field in fields(PretrainConfig)}
    settings = {name: value for name, value in info["arguments"].items() if name in known}
    return PretrainConfig(**settings | {"device": device}), network


def search_classification(
    config: ClassificationSearchConfig,
    trained: PretrainConfig,
    data: ClassificationFolder,
    out: str | Path,
    space: Any,
    model: Classifier,
    *,
    paths: Paths,
    constraints: Sequence[Constraint] = (),
    resume: bool = False,
    command: Sequence[str] | None = None,
    progress: bool = True,
) -> Card:
    """The architecture of ``space`` whose path of a trained supernet classifies ``data.search_val()`` best.

    ``model`` is the supernet's classifier with its weights (:func:`~nasdet.engine.pretrain.load_classifier`), which
    ``trained`` are the settings of; ``paths.activate(model.backbone, card)`` runs a path. A candidate's fitness is its
    top-1 accuracy in full precision, with batch norm statistics of its own from ``trained.recalibration_images``
    pictures of ``data.search_train()``; it depends on the card and the weights alone, which are not changed (the
    statistics are). ``constraints`` are hard.

    The folder gets run.json, split.json, evolution.json and scores/ (after every candidate; killed and resumed, the
    search ends as if never killed), card.json and cards/. Under ``torchrun`` every process evaluates candidates of its
    own.

    Raises ``TestSplitError`` for test images, ``ValueError`` for a folder that already holds a search without
    ``resume``, one of other settings or weights or that another process writes, and constraints that cannot be met.
    """
    out, device = Path(out), distributed.local_device(trained.device)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    scored, learnt = data.search_val(), data.search_train()
    for dataset in (scored, learnt):
        require_selectable(dataset, data.split)
    sizes: dict[str, Any] = {
        "population": config.population,
        "parents": config.parents,
        "generations": config.generations,
    }
    search = Evolution(space, constraints=constraints, offspring=config.children(), seed=config.seed, **sizes)
    layout = place_model(model, device, trained.channels_last)
    weights = {key: value for key, value in model.named_parameters()}
    fixed = {key: value for key, value in asdict(config).items() if key not in ("generations", "top", "name")}
    seen = {key: getattr(trained, key) for key in _SEEN}
    of = {**fixed, "data": seen, "split": data.split.sha256, "supernet": digest(weights)}

    def fitness(card: Card) -> float:
        seed_everything(config.seed)
        paths.activate(model.backbone, card)
        recalibrate_classifier(model, trained, learnt, device, layout, mode=config.recalibration)
        look: dict[str, Any] = {key: getattr(trained, key) for key in ("size", "short", "workers")}
        look |= {
            "batch": trained.eval_batch,
            "device": device,
            "channels_last": "channels_last" in str(layout),
            "amp": trained.amp,
        }
        return float(evaluate_classifier(model, scored, progress=False, **look)["top1"])

    facts: dict[str, Any] = {"data": str(data.path.resolve()), "images": {"scored": len(scored)}}
    facts["limits"] = {one.name: [one.low, one.high] for one in constraints}
    place: dict[str, Any] = {"seed": config.seed, "device": device, "command": command, "resume": resume}
    with contextlib.ExitStack() as together:
        together.enter_context(distributed.process_group(device))
        if not resume and any((out / name).exists() for name in (STATE, "run.json")):
            raise ValueError(f"{out} already holds a search: add --resume to go on with it, or choose another --out")
        distributed.barrier()  # no process may write there before all have looked
        with sole_writer(out), recorded(out, "search classification", asdict(config), **place, **facts):
            together.close()  # each process evaluates its own candidates, on all images
            if rank == 0:
                data.split.save(out / "split.json")
            evolve(search, fitness, out, of, rank=rank, ranks=ranks, resume=resume, progress=progress)
            return _finish(search, config, data, out, rank)


def _finish(
    search: Evolution, config: ClassificationSearchConfig, data: ClassificationFolder, out: Path, rank: int
) -> Card:
    source = {"search": SEARCH, "split": data.split.sha256, "seed": config.seed}
    source |= {"split_seed": data.split.seed, "data": data.path.resolve().name, "evaluations": len(search.history)}
    found = [replace(card, name=config.name, source=source | {"top1": score}) for card, score in search.population]
    if rank == 0:
        for place, card in enumerate(found[: config.top], 1):
            save_card(replace(card, name=f"{config.name}-{place}"), out / "cards" / f"{place}.json")
        save_card(found[0], out / "card.json")
    return found[0]
