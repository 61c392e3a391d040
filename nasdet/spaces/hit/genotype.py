"""Hit-Detector's vocabulary: the 32 operations, sub-spaces of 8, sizes of the parts, and genotypes. No torch.

A genotype names the operation of every place by part, finest or first place first::

    {"backbone": ["ir_k3_d1_e3", ...], "neck": ["sep_k5_d3", ...], "head": ["ir_k5_d1_e6", ...]}

It may hold any of the parts: a detector's other parts are then the plain ones. A one-stage detector has ``towers`` in
the place of ``head``, the box tower's places before the class tower's.

Source: Guo et al., "Hit-Detector: Hierarchical Trinity Architecture Search for Object Detection", CVPR 2020,
section 3.2, Figure 2 and the appendix (operations, sub-spaces), section 3.3 (supernet).
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nasdet._checks import check_whole

PARTS = ("backbone", "neck", "head", "towers")
TWO_STAGE = ("backbone", "neck", "head")
ONE_STAGE = ("backbone", "neck", "towers")
LEVELS = ("c2", "c3", "c4", "c5")
EXTRA = {"pool": 1, "convs": 2}
"""Levels beyond the neck's inputs: one by pooling, for an RPN, or two by convolutions, as RetinaNet has them."""


@dataclass(frozen=True)
class Operation:
    """One candidate. ``kind``: ``"ir"``, an inverted residual of ``expansion``; ``"sep"``, a separable convolution;
    ``"conv"``, a plain one. ``kernel`` is the side, ``dilation`` that of the spatial convolution."""

    kind: str
    kernel: int
    dilation: int
    expansion: int | None = None

    @property
    def name(self) -> str:
        """``"ir_k3_d1_e6"``, ``"sep_k5_d2"``: what genotypes and cards say."""
        return f"{self.kind}_k{self.kernel}_d{self.dilation}" + (f"_e{self.expansion}" if self.expansion else "")


def _operations() -> tuple[Operation, ...]:
    inverted = [Operation("ir", k, d, e) for k in (3, 5) for d in (1, 2, 3) for e in (1, 3, 6)]
    wide = [Operation("ir", 7, 1, e) for e in (1, 6)]
    return (*inverted, *wide, *(Operation(kind, k, d) for kind in ("sep", "conv") for k in (3, 5) for d in (1, 2, 3)))


OPERATIONS: dict[str, Operation] = {operation.name: operation for operation in _operations()}
"""The 32 operations in the appendix's order: 20 inverted residuals, 6 separable and 6 plain convolutions."""
_NAME = re.compile(r"(?:ir_k(\d+)_d(\d+)_e(\d+)|(sep|conv)_k(\d+)_d(\d+))")


def named_operation(name: Any) -> Operation:
    """One of :data:`OPERATIONS`, or another of these kinds by a name like theirs, such as ``ir_k9_d1_e4``.

    ``ValueError`` unless the kernel is odd and all numbers are at least 1.
    """
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is not None:
        ir, kind = match.group(1, 2, 3), match[4]
        numbers = [int(text) for text in (match.group(5, 6) if kind else ir)]
        found = Operation(kind or "ir", *numbers)
        if found.name == name and min(numbers) >= 1 and found.kernel % 2:
            return found
    raise ValueError(
        "operation must be ir_kK_dD_eE, sep_kK_dD or conv_kK_dD with an odd kernel K, dilation D and expansion E, got "
        f"{name!r}"
    )

_HEAD = ("ir_k3_d1_e3", "ir_k3_d1_e6", "ir_k3_d2_e6", "ir_k5_d1_e3", "ir_k5_d1_e6", "ir_k7_d1_e6")
SUBSPACES: dict[str, tuple[str, ...]] = {
    "backbone": (*_HEAD[:2], "ir_k3_d2_e3", *_HEAD[3:5], "ir_k5_d2_e6", "ir_k5_d3_e6", _HEAD[5]),
    "neck": (
        *("conv_k3_d3", "conv_k5_d1", "ir_k3_d2_e1", "ir_k5_d1_e3"),
        *("sep_k3_d1", "sep_k3_d3", "sep_k5_d2", "sep_k5_d3"),
    ),
    "head": (*_HEAD, "conv_k3_d1", "conv_k5_d1"),
    "towers": (*_HEAD, "conv_k3_d1", "conv_k5_d1"),
}
"""What the paper's screening kept, 8 operations a part (appendix). Its backbone prints ``ir k5 d1 e3`` twice; the found
net needs ``ir k5 d1 e6``, which stands for the second. Towers, of which it says nothing, have the head's."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of all parts.

    Backbone: ``stem`` channels of the first 3x3 convolution (stride 2), then ``stages`` of (channels, blocks, stride);
    a stage of stride 2 begins a level of the pyramid, c2 to c5, and the last stage of a level gives its map. ``tail``
    is either empty or two numbers of channels: a fixed ``ir_k3_d1_e3`` and a 1x1 convolution that end the backbone.
    Neck, head and towers: ``channels``; ``inputs``, the levels that the neck takes, and ``extra``, how it makes coarser
    ones (:data:`EXTRA`); ``blocks`` of the head, and of each tower; ``hidden``, outputs of the head's fully connected
    layer; ``pooled``, the side of a pooled RoI.
    """

    stem: int = 16
    stages: tuple[tuple[int, int, int], ...] = ((48, 4, 2), (96, 4, 2), (184, 4, 2), (256, 4, 1), (352, 4, 2))
    tail: tuple[int, ...] = (1024, 2048)
    channels: int = 256
    inputs: tuple[str, ...] = LEVELS
    extra: str = "pool"
    blocks: int = 4
    hidden: int = 512
    pooled: int = 7

    def __post_init__(self) -> None:
        for name in ("stem", "channels", "blocks", "hidden", "pooled"):
            check_whole(name, getattr(self, name))
        for index, stage in enumerate(self.stages, 1):
            if len(stage) != 3 or stage[2] not in (1, 2):
                raise ValueError(f"stages must be (channels, blocks, stride 1 or 2), got {stage!r} for stage {index}")
            check_whole(f"channels of stage {index}", stage[0])
            check_whole(f"blocks of stage {index}", stage[1])
        strides = [stage[2] for stage in self.stages]
        if strides.count(2) != len(LEVELS) or strides[0] != 2:
            raise ValueError(f"stages must have {len(LEVELS)} of stride 2, the first among them, got strides {strides}")
        if len(self.tail) not in (0, 2):
            raise ValueError(f"tail must be empty or two numbers of channels, got {self.tail!r}")
        for value in self.tail:
            check_whole("tail", value)
        ladder = LEVELS[-len(self.inputs) :] if self.inputs else ()
        if not self.inputs or tuple(self.inputs) != ladder:
            raise ValueError(f"inputs must be the last of {', '.join(LEVELS)}, got {self.inputs!r}")
        if self.extra not in EXTRA:
            raise ValueError(f"extra must be one of {', '.join(EXTRA)}, got {self.extra!r}")

    def halved(self) -> Sizes:
        """The same with half the blocks in every stage, rounded up: the backbone that screening uses."""
        stages = tuple((channels, -(-blocks // 2), stride) for channels, blocks, stride in self.stages)
        return Sizes(**{**vars(self), "stages": stages})

    def pyramid(self) -> tuple[str, ...]:
        """The levels of the neck's maps, finest first: its inputs and those beyond, such as c2 to c6."""
        return (*self.inputs, *(f"c{6 + index}" for index in range(EXTRA[self.extra])))

    def level_channels(self) -> dict[str, int]:
        """Channels of the backbone's maps, c2 to c5."""
        channels: dict[str, int] = {}
        level = -1
        for out, _, stride in self.stages:
            level += stride == 2
            channels[LEVELS[level]] = out
        if self.tail:
            channels[LEVELS[-1]] = self.tail[1]
        return channels

    def to_json(self) -> dict[str, Any]:
        """What a card's settings hold."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return plain | {"stages": [list(stage) for stage in self.stages]}

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> Sizes:
        """The sizes in a card's settings; ``ValueError`` where one is missing or wrong."""
        found: dict[str, Any] = {}
        for key in cls.__dataclass_fields__:
            if key not in settings:
                raise ValueError(f"settings must have {key}, got {', '.join(settings) or 'nothing'}")
            found[key] = settings[key]
            if key in ("stages", "tail", "inputs"):
                if not isinstance(found[key], (list, tuple)):
                    raise ValueError(f"settings.{key} must be a list, got {found[key]!r}")
                found[key] = tuple(tuple(v) if isinstance(v, list) else v for v in found[key])
        if any(not isinstance(stage, tuple) for stage in found["stages"]):
            raise ValueError(f"settings.stages must be lists of three integers, got {settings['stages']!r}")
        return cls(**found)


LAYOUTS: dict[str, Sizes] = {
    "released": Sizes(),
    "paper": Sizes(stages=((48, 4, 2), (96, 4, 2), (256, 8, 2), (352, 4, 2)), tail=()),
    "tiny": Sizes(16, ((24, 1, 2), (32, 2, 2), (48, 2, 2), (64, 1, 2)), (), channels=32, blocks=2, hidden=128),
}
"""Both published layouts of the backbone: that of the released net, whose parameters the paper reports, and the text's
(section 3.3; channels of its stem: the released net's). ``tiny``, of this library, is searched in minutes on a CPU."""


@dataclass(frozen=True)
class Place:
    """One searchable layer: ``index`` within its part, channels in and out, stride."""

    part: str
    index: int
    inp: int
    out: int
    stride: int = 1


def places(part: str, sizes: Sizes) -> list[Place]:
    """The searchable layers of a part, in the order of genotypes."""
    check_part(part)
    width = sizes.channels
    if part == "backbone":
        found: list[Place] = []
        inp = sizes.stem
        for channels, blocks, stride in sizes.stages:
            for block in range(blocks):
                found.append(Place(part, len(found), inp, channels, 1 if block else stride))
                inp = channels
        return found
    if part == "neck":
        inputs = [sizes.level_channels()[level] for level in sizes.inputs]
        widths = [*inputs, *[width] * len(inputs)]
        return [Place(part, index, inp, width) for index, inp in enumerate(widths)]
    count = sizes.blocks * (2 if part == "towers" else 1)
    return [Place(part, index, width, width) for index in range(count)]


def check_part(part: Any) -> None:
    """Raise ``ValueError`` unless ``part`` is one of :data:`PARTS`."""
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")


def check_names(names: Any, where: str, among: Sequence[str] | None = None) -> None:
    """Raise ``ValueError`` with the place and the reason unless ``names`` is a list of operations (``among`` these)."""
    if isinstance(names, str) or not isinstance(names, (list, tuple)) or not names:
        raise ValueError(f"{where} must be a list of operations, got {names!r}")
    for index, name in enumerate(names):
        if among is not None and (not isinstance(name, str) or name not in among):
            raise ValueError(f"{where} must be among {', '.join(among)}, got {name!r} at {index}")
        try:
            named_operation(name)
        except ValueError as error:
            raise ValueError(f"{where}: {error} at {index}") from error


def check_genotype(genotype: Any, sizes: Sizes | None = None) -> tuple[str, ...]:
    """The parts of a legal genotype, in their order; with ``sizes`` the number of places of each is checked too.

    Raises ``ValueError`` with the place and the reason.
    """
    if not isinstance(genotype, Mapping) or not genotype:
        raise ValueError(f"genotype must be an object of parts, got {genotype!r}")
    if unknown := [part for part in genotype if part not in PARTS]:
        raise ValueError(f"genotype parts must be among {', '.join(PARTS)}, got {unknown[0]!r}")
    if "head" in genotype and "towers" in genotype:
        raise ValueError("genotype must have head or towers, got both")
    for part, names in genotype.items():
        check_names(names, f"genotype.{part}")
        if sizes is not None and len(names) != (count := len(places(part, sizes))):
            raise ValueError(f"genotype.{part} must have {count} operations, one for each place, got {len(names)}")
    return tuple(part for part in PARTS if part in genotype)


def random_genotype(rng: random.Random, candidates: Mapping[str, Sequence[str]], sizes: Sizes) -> dict[str, list[str]]:
    """A uniformly random operation for every place of the parts in ``candidates``."""
    return {part: [rng.choice(names) for _ in places(part, sizes)] for part, names in candidates.items()}


def decode(alphas: Mapping[str, Sequence[Sequence[float]]], candidates: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The operation with the highest score at every place, the first of equals (section 3.3).

    ``alphas``: per part one row per place, a score for each of the part's ``candidates``.
    """
    genotype = {}
    for part, rows in alphas.items():
        names = candidates[part]
        if any(len(row) != len(names) for row in rows):
            raise ValueError(f"alphas of {part} must have {len(names)} columns, got {[len(row) for row in rows]}")
        genotype[part] = [names[max(range(len(names)), key=row.__getitem__)] for row in rows]
    return genotype
