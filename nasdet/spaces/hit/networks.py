"""Hit-Detector's parts as modules: backbone, neck, head and towers, of a card's operations or of mixed layers.

Each takes ``make(place) -> module`` for its searchable layers, so that a supernet and a derived net are the same class
and share the names of everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nasdet.detectors import FasterRCNN, RoIPooler
from nasdet.detectors.backbone import LEVELS, Backbone
from nasdet.detectors.faster_rcnn import BoxStage
from nasdet.detectors.norm import FoldingSequential, norm_layer
from nasdet.detectors.parts.layers import he_init
from nasdet.detectors.roi_heads import BoxHead
from nasdet.detectors.rpn import RPN
from nasdet.spaces.hit.costs import TAIL
from nasdet.spaces.hit.genotype import Place, Sizes, check_part, places
from nasdet.spaces.hit.operations import operation

Make = Callable[[Place], nn.Module]


class HitBackbone(Backbone):
    """The backbone: a 3x3 convolution of stride 2, the stages' layers, and a fixed tail where ``sizes`` has one.

    See :class:`~nasdet.detectors.Backbone` for its maps and for ``norm``, ``frozen_stages`` and ``outputs``. The
    stem's convolution has a bias besides its norm: the published 13,881,848 parameters say so.
    """

    def __init__(
        self, sizes: Sizes, make: Make, *, norm: str = "bn", frozen_stages: int = 0, outputs: Sequence[str] = LEVELS
    ) -> None:
        super().__init__(1.0, frozen_stages, outputs)
        self.stem = FoldingSequential(
            nn.Conv2d(3, sizes.stem, 3, stride=2, padding=1), norm_layer(norm, sizes.stem), nn.ReLU(inplace=True)
        )
        he_init(self.stem)
        self.blocks = nn.ModuleList()
        parts: dict[str, list[str]] = {"stem": ["stem"]}
        level = -1
        for place in places("backbone", sizes):
            level += place.stride == 2
            if level < len(self.built):
                self.blocks.append(make(place))
                parts.setdefault(LEVELS[level], []).append(f"blocks.{place.index}")
        if sizes.tail and self.built[-1] == LEVELS[-1]:
            inner, out = sizes.tail
            last = FoldingSequential(nn.Conv2d(inner, out, 1, bias=False), norm_layer(norm, out), nn.ReLU(inplace=True))
            he_init(last)
            self.tail = nn.Sequential(operation(TAIL, sizes.stages[-1][0], inner, norm=norm), last)
            parts[LEVELS[-1]].append("tail")
        self._assemble(parts, sizes.level_channels(), ())


class HitNeck(nn.Module):
    """A pyramid with a top-down and a bottom-up path, all of whose lateral layers are searched (section 3.3).

    ``P_i = lateral_i(C_i) + up2(P_{i+1})`` (nearest), then ``N_1 = output_1(P_1)`` and
    ``N_{i+1} = conv3x3(maxpool2(N_i) + output_{i+1}(P_{i+1}))``, convolutions with bias and nothing after them. Extra
    levels are every second value of the last, or (``extra="convs"``) two 3x3 convolutions of stride 2, ReLU between.

    ``in_channels`` and ``strides``: the backbone's, by level; maps that are not among ``sizes.inputs`` are passed over.
    The result is a dict ``p2, p3, ...``, finest first; ``strides`` and ``channels`` describe it.
    """

    def __init__(self, sizes: Sizes, make: Make, in_channels: Mapping[str, int], strides: Mapping[str, int]) -> None:
        super().__init__()
        made, width = places("neck", sizes), sizes.channels
        self.inputs = sizes.inputs
        half = len(self.inputs)
        for name, place in zip(self.inputs, made, strict=False):
            if in_channels.get(name) != place.inp:
                raise ValueError(f"in_channels of {name} must be {place.inp}, got {in_channels.get(name)}")
        self.lateral = nn.ModuleList(make(place) for place in made[:half])
        self.output = nn.ModuleList(make(place) for place in made[half:])
        self.down = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in self.inputs[1:])
        beyond = len(sizes.pyramid()) - half
        pooled = sizes.extra == "pool"
        self.extra = nn.ModuleList(
            nn.MaxPool2d(1, stride=2) if pooled else nn.Conv2d(width, width, 3, stride=2, padding=1)
            for _ in range(beyond)
        )
        he_init(self.down)
        he_init(self.extra)
        ladder = [strides[name] for name in self.inputs]
        ladder += [ladder[-1] * 2 ** (index + 1) for index in range(beyond)]
        self.strides = {f"p{stride.bit_length() - 1}": stride for stride in ladder}
        self.channels = dict.fromkeys(self.strides, width)
        self._relu_between = not pooled

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Maps by the backbone's names to ``{"p2": [N, channels, H, W], ...}``."""
        maps = [lateral(features[name]) for lateral, name in zip(self.lateral, self.inputs, strict=True)]
        for index in range(len(maps) - 1, 0, -1):  # not in place: an operation's own ReLU may have kept its output
            maps[index - 1] = maps[index - 1] + F.interpolate(maps[index], size=maps[index - 1].shape[-2:])
        maps = [output(map_) for output, map_ in zip(self.output, maps, strict=True)]
        levels = maps[:1]
        for down, map_ in zip(self.down, maps[1:], strict=True):
            levels.append(down(F.max_pool2d(levels[-1], 2, ceil_mode=True) + map_))
        for index, extra in enumerate(self.extra):
            levels.append(extra(F.relu(levels[-1]) if index and self._relu_between else levels[-1]))
        return dict(zip(self.strides, levels, strict=True))


class HitHead(nn.Module):
    """The searched head, a *box trunk*: its blocks on pooled RoIs, one fully connected layer and ReLU.

    ``[R, channels, pooled, pooled]`` to ``[R, hidden]``.
    """

    def __init__(self, sizes: Sizes, make: Make) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*map(make, places("head", sizes)))
        self.fc = nn.Linear(sizes.channels * sizes.pooled**2, sizes.hidden)
        self.out_channels = sizes.hidden
        he_init(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(self.blocks(x).flatten(1)), inplace=True)


class HitTowers(nn.Module):
    """Searched towers of a one-stage detector, a *tower*: ``blocks`` layers each for boxes and classes, for all
    levels."""

    def __init__(self, sizes: Sizes, make: Make) -> None:
        super().__init__()
        made = places("towers", sizes)
        self.box = nn.Sequential(*map(make, made[: sizes.blocks]))
        self.cls = nn.Sequential(*map(make, made[sizes.blocks :]))
        self.box_channels = self.cls_channels = sizes.channels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.box(x), self.cls(x)


def network(
    part: str,
    sizes: Sizes,
    make: Make,
    *,
    norm: str = "bn",
    in_channels: Mapping[str, int] | None = None,
    strides: Mapping[str, int] | None = None,
    **options: Any,
) -> nn.Module:
    """A part as a module.

    ``in_channels`` and ``strides`` of the neck are by default the searched backbone's of the same sizes; ``options``
    (``frozen_stages``, ``outputs``) go to :class:`HitBackbone`, the only part with layers of a ``norm`` besides those
    that ``make`` makes.
    """
    check_part(part)
    if options and part != "backbone":
        raise TypeError(f"options of {part} must be none, got {', '.join(options)}")
    if part == "backbone":
        return HitBackbone(sizes, make, norm=norm, **options)
    if part == "neck":
        ladder = {name: 4 * 2**index for index, name in enumerate(LEVELS)}
        return HitNeck(sizes, make, in_channels or sizes.level_channels(), strides or ladder)
    return HitHead(sizes, make) if part == "head" else HitTowers(sizes, make)


def plain(names: Sequence[str], norm: str) -> Make:
    """``make`` of a net with the operation ``names[index]`` at each place."""
    return lambda place: operation(names[place.index], place.inp, place.out, place.stride, norm)


def two_stage(
    backbone: nn.Module,
    neck: nn.Module,
    trunk: nn.Module,
    num_classes: int,
    *,
    pooled: int = 7,
    rpn: Mapping[str, Any] | None = None,
    class_agnostic: bool = False,
    **options: Any,
) -> FasterRCNN:
    """A Faster R-CNN of any three parts; the RoIs come from all levels but those that the RPN alone has.

    ``neck`` is a :class:`HitNeck` or an FPN (``extra_source="pool"``). ``pooled`` is the side of a pooled RoI; ``rpn``
    are options of :class:`~nasdet.detectors.RPN`, ``options`` those of :class:`~nasdet.detectors.BoxStage`.
    """
    described: Any = neck
    strides, inputs = tuple(described.strides.values()), len(described.inputs)
    channels = next(iter(described.channels.values()))
    pooler = RoIPooler(strides[:inputs], size=pooled)
    stage = BoxStage(BoxHead(trunk, num_classes, class_agnostic=class_agnostic), pooler, **options)
    return FasterRCNN(backbone, neck, RPN(channels, strides, **(rpn or {})), stage)


__all__ = ["HitBackbone", "HitHead", "HitNeck", "HitTowers", "network", "plain", "two_stage"]
