"""Hit-Detector's screening: part by part, which operations of the whole list are worth searching."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nasdet._files import read_json, write_json
from nasdet.arch import Card
from nasdet.data import DataFolder
from nasdet.engine.hit_config import HitSearchConfig, deviations
from nasdet.engine.hit_run import HitRun
from nasdet.engine.loop import Loop, Stateful
from nasdet.engine.runs import sole_writer
from nasdet.engine.supernet import SearchOptions, run_search
from nasdet.spaces.hit import PARTS, Screening, alpha_matrix, column_penalty, keep, kept_names, mixed_layers

if TYPE_CHECKING:
    from typing_extensions import Unpack

RECORD = "screening.json"


def screen_hit(
    config: HitSearchConfig, data: DataFolder, out: str | Path, **options: Unpack[SearchOptions]
) -> dict[str, list[str]]:
    """Screen the operations of every searched part, one part after the other, the others plain (section 3.2).

    A part's weights learn on ``data.search_train()``, its alphas on ``data.search_val()`` under the column penalty,
    and at the ends of the last epochs the operations with the least scores go, until ``keep`` are left. The backbone
    has half its blocks, and ``config.screen_weights``; ``weights`` are those of the plain one around the other parts.

    Each part is a run of its own, in ``out/screen-PART`` (:func:`~nasdet.engine.supernet.run_search`, with
    ``screening.json``: scores and removals by epoch, and a card of what was best when it ended);
    ``out/screening.json`` has all of them. Returns what each part keeps, which :class:`HitSearchConfig` takes as
    ``candidates``. Killed and resumed it goes on in the part where it was.
    """
    out = Path(out)
    if config.searched_parts() == ("backbone",) and options.get("weights") is not None:
        given = options["weights"]
        raise ValueError(f"weights must be None where the backbone alone is screened (screen_weights), got {given}")
    records: dict[str, Any] = {}
    # What is the joint search's alone must not keep a screening from being resumed.
    paper = {name: getattr(HitSearchConfig, name) for name in ("cost_weight", "target", "proposals", "latency_table")}
    for part in config.searched_parts():
        # A card's name may be given for the joint search: screening has one net for each part.
        name = config.name and f"{config.name}-screen-{part}"
        own = replace(config, stage="screen", parts=[part], name=name, **paper)
        folder = out / f"screen-{part}"
        around = options.copy()
        if part == "backbone":
            around["weights"] = config.screen_weights
        run_search(_ScreenRun, own, data, folder, **around)
        records[part] = read_json(folder / RECORD)
    kept = {part: [*record["left"]] for part, record in records.items()}
    _record(out / RECORD, records)
    return kept


def _record(path: Path, records: Mapping[str, Any]) -> None:
    """Write what was kept beside what other parts kept, screened into the same folder before or at the same time."""
    with sole_writer(path.parent, lock="screening.lock", wait=True):
        before = read_json(path)["parts"] if path.is_file() else {}
        parts = {part: {**before, **records}[part] for part in PARTS if part in before or part in records}
        write_json(path, {"kept": {part: [*record["left"]] for part, record in parts.items()}, "parts": parts})


def load_screening(path: str | Path) -> dict[str, list[str]]:
    """What each part keeps, as ``candidates``: of a run's folder or its ``screening.json``.

    ``ValueError``, which names the file, unless it is that of :func:`screen_hit`.
    """
    path = Path(path)
    path = path / RECORD if path.is_dir() else path
    content = read_json(path)
    parts = content.get("parts") if isinstance(content, dict) else None
    if not isinstance(parts, dict) or not parts:
        raise ValueError(f"{path}: must be the {RECORD} of a screening, with parts, got {content!r:.80}")
    try:
        return {part: Screening.from_json(record).left for part, record in parts.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a whole screening: {type(error).__name__} {error}") from error


class _Record:
    """A screening in a checkpoint."""

    def __init__(self, screening: Screening) -> None:
        self.screening = screening

    def state_dict(self) -> dict[str, Any]:
        return self.screening.to_json()

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        self.screening = Screening.from_json(state_dict)


class _ScreenRun(HitRun):
    verb = "search hit screening"

    def build(self, weights: str | Path | None) -> None:
        super().build(weights)
        config = self.config
        (self.part,) = config.searched_parts()
        names = [*self.space.candidates[self.part]]
        self.record = _Record(Screening(self.part, names, config.keep, config.removal_epoch, config.epochs))
        self.ends = {done: epoch for epoch, done in enumerate(config.epoch_ends(self.steps), 1)}

    def state(self) -> dict[str, Stateful]:
        return super().state() | {"screening": self.record}

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"part": self.part}

    def term(self, values: dict[str, Any]) -> Tensor:
        penalty = column_penalty(alpha_matrix(mixed_layers(self.model)[self.part]))
        values["column_penalty"] = penalty.detach()
        return self.config.penalty * penalty

    def end_of_step(self, done: int) -> None:
        if done not in self.ends:
            return
        screening = self.record.screening
        alphas = alpha_matrix(mixed_layers(self.model)[self.part]).tolist()
        if screening.end_epoch(self.ends[done], alphas):
            keep(self.model, self.part, screening.left)

    def learn(self, loop: Loop) -> None:
        super().learn(loop)
        write_json(loop.out / RECORD, self.record.screening.to_json())

    def deviations(self) -> list[str]:
        return deviations(self.config, self.data, self.weights is not None)

    def derive(self, source: Mapping[str, Any]) -> Card:
        name = self.config.name or f"hit-screen-{self.part}-seed{self.config.seed}"
        kept = list(kept_names(self.model)[self.part])
        return self.space.derive(self.model, name, source={**source, "kept": kept})


__all__ = ["load_screening", "screen_hit"]
