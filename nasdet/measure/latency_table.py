"""Latency of a net as the sum of its blocks' latencies, each measured once: the table, and its file. No torch.

:mod:`nasdet.measure.latency` measures what is in it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from random import Random
from typing import Any, Protocol

from nasdet._files import read_json
from nasdet.measure.tau import RankCorrelation, rank_correlation

SCHEMA_VERSION = 1


Block = tuple[str, Callable[[], Any], tuple[int, ...]]
"""What is timed as one: its key, what makes the module, and the shape ``[N, C, H, W]`` of its input.

Equal keys are the same computation on the same shape. A module must not change its input in place.
"""


class Blocks(Protocol):
    """What a table needs of a search space: the blocks of its nets, and which of them a card's net runs.

    Nothing but making a module needs torch.
    """

    @property
    def settings(self) -> Mapping[str, Any]:
        """What tells this space from others, as plain data."""
        ...

    @property
    def fixed(self) -> Sequence[str]:
        """Keys that every net runs, besides those of its places."""
        ...

    @property
    def places(self) -> Sequence[Mapping[str, str]]:
        """For each place of a net its choices, and the key of each; empty where a choice's key depends on others."""
        ...

    def blocks(self, size: tuple[int, int]) -> Iterable[Block]:
        """All blocks, each once, for images of ``size`` (height, width); ``ValueError`` where it does not fit."""
        ...

    def keys(self, card: Any) -> Iterable[str]:
        """The keys of all that the card's net runs, each as often as it runs; ``ValueError`` for a foreign card."""
        ...

    def network(self, card: Any, size: tuple[int, int]) -> Block:
        """The card's net as a whole, on images ``[1, 3, H, W]``."""
        ...

    def random(self, rng: Random) -> Any:
        """A random card."""
        ...


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a call: the median over ``rounds``, and the width of their middle half."""

    ms: float
    iqr: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Latency:
        """Of one number of milliseconds for each round; ``ValueError`` without any."""
        if not samples:
            raise ValueError("samples must be at least one number of milliseconds, got none")
        if len(samples) == 1:
            return cls(samples[0], 0.0, 1)
        low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(middle, high - low, len(samples))


@dataclass(frozen=True)
class Setting:
    """What a table's numbers hold for. Only rows of one setting are kept in one file."""

    space: dict[str, Any]
    size: tuple[int, int]
    device: str
    threads: int
    dtype: str
    channels_last: bool
    clock: str
    versions: dict[str, str]

    def difference(self, other: Setting) -> str | None:
        """What of ``other`` differs first, in words."""
        for item in fields(self):
            own, given = getattr(self, item.name), getattr(other, item.name)
            if own != given:
                return f"{item.name} must be {own}, got {given}"
        return None


@dataclass
class Net:
    """A whole net that was timed: its card as JSON, the keys of what it runs, and milliseconds by round."""

    card: dict[str, Any]
    keys: list[str]
    samples: list[float] = field(default_factory=list)


@dataclass
class Record:
    """The file: the milliseconds of each round by key of a block, and whole nets by the keys of their cards."""

    setting: Setting
    started: str
    rows: dict[str, list[float]] = field(default_factory=dict)
    nets: dict[str, Net] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain data, with medians and interquartile ranges for readers."""
        first = {"schema_version": SCHEMA_VERSION, "kind": "latency", "started": self.started}
        setting = asdict(self.setting) | {"size": list(self.setting.size)}
        rows = {key: _summary(samples) for key, samples in self.rows.items() if samples}
        nets = {
            key: {"card": net.card, "keys": net.keys, **_summary(net.samples)}
            for key, net in self.nets.items()
            if net.samples
        }
        return first | setting | {"rows": rows, "nets": nets}

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """Read a file; ``ValueError`` names it and what is wrong."""
        value = read_json(path)
        if not isinstance(value, dict) or value.get("kind") != "latency":
            raise ValueError(f"{path}: must be a table of latencies (nasdet measure latency), got something else")
        if value.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"{path}: schema_version must be {SCHEMA_VERSION}, got {value.get('schema_version')!r}")
        try:
            setting = {item.name: value[item.name] for item in fields(Setting)}
            setting["size"] = tuple(setting["size"])
            rows = {key: _samples(row) for key, row in value["rows"].items()}
            nets = {key: Net(dict(net["card"]), list(net["keys"]), _samples(net)) for key, net in value["nets"].items()}
            return cls(Setting(**setting), value["started"], rows, nets)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: not a whole table of latencies: {type(error).__name__} {error}") from error


def _samples(row: Mapping[str, Any]) -> list[float]:
    samples = [float(ms) for ms in row["samples"]]
    if not all(math.isfinite(ms) and ms > 0 for ms in samples):
        raise ValueError(f"samples must be positive numbers of milliseconds, got {samples}")
    return samples


def _summary(samples: Sequence[float]) -> dict[str, Any]:
    return {**asdict(Latency.of(samples)), "samples": list(samples)}


@dataclass(frozen=True)
class Check:
    """Predictions against whole nets: ``(key of the card, predicted, measured)`` in milliseconds, and their errors.

    ``bias``, ``mean_error`` and ``worst_error`` are the mean, the mean absolute and the largest absolute value of
    ``predicted / measured - 1``; ``rank`` is tau-b of predicted against measured, None for nets that are all alike.
    """

    nets: tuple[tuple[str, float, float], ...]
    bias: float
    mean_error: float
    worst_error: float
    rank: RankCorrelation | None

    @classmethod
    def of(cls, nets: Sequence[tuple[str, float, float]]) -> Check:
        """Of at least one net."""
        errors = [predicted / measured - 1 for _, predicted, measured in nets]
        predictions, measured = [net[1] for net in nets], [net[2] for net in nets]
        ranks = len(set(predictions)) > 1 and len(set(measured)) > 1
        sizes = [abs(error) for error in errors]
        return cls(
            nets=tuple(nets),
            bias=statistics.fmean(errors),
            mean_error=statistics.fmean(sizes),
            worst_error=max(sizes),
            rank=rank_correlation(predictions, measured) if ranks else None,
        )


class LatencyTable:
    """Predicted milliseconds of a card's net: ``table(card)``, a cost for ``nasdet.search.constraints.Constraint``.

    The prediction is the sum of the medians of the blocks that the net runs. ``latencies`` has every block's by key;
    ``rows`` those of each place by choice and ``fixed`` what every net pays besides, where the space has such places.

    Args:
        blocks: the space's own account of its nets.
        record: what was measured.

    Raises ``ValueError`` for a record of another space, and one that lacks a block.
    """

    def __init__(self, blocks: Blocks, record: Record) -> None:
        if (own := dict(blocks.settings)) != record.setting.space:
            raise ValueError(f"space must be {own}, got a table for {record.setting.space}")
        self.blocks, self.record, self.setting = blocks, record, record.setting
        keys = [key for key, _, _ in blocks.blocks(self.setting.size)]
        if missing := [key for key in keys if not record.rows.get(key)]:
            raise ValueError(
                f"rows must be there for all {len(keys)} blocks, got none for {len(missing)}, such as {missing[0]!r}: "
                "measure again to go on"
            )
        self.latencies = {key: Latency.of(record.rows[key]) for key in keys}
        self.fixed = math.fsum(self.latencies[key].ms for key in blocks.fixed)
        self.rows = tuple({choice: self.latencies[key].ms for choice, key in place.items()} for place in blocks.places)

    @classmethod
    def load(cls, path: str | Path, blocks: Blocks, size: tuple[int, int]) -> LatencyTable:
        """Read a table for nets of this space on images of ``size`` (height, width); an error names the file."""
        record = Record.load(path)
        if record.setting.size != tuple(size):
            raise ValueError(f"{path}: size must be {tuple(size)}, got a table for {record.setting.size}")
        try:
            return cls(blocks, record)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def __call__(self, card: Any) -> float:
        """Predicted milliseconds; ``ValueError`` for a card of another space."""
        return math.fsum(self.latencies[key].ms for key in self.blocks.keys(card))

    def reachable(self) -> tuple[float, float] | None:
        """The least and the largest prediction over the space; None where choices are not independent by place."""
        if not self.rows:
            return None
        least, most = (self.fixed + math.fsum(end(row.values()) for row in self.rows) for end in (min, max))
        return least, most

    def check(self) -> Check | None:
        """Predictions against the whole nets that were measured; None where none were."""
        nets = [
            (key, math.fsum(self.latencies[part].ms for part in net.keys), Latency.of(net.samples).ms)
            for key, net in self.record.nets.items()
            if net.samples
        ]
        return Check.of(nets) if nets else None
