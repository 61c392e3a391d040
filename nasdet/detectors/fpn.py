"""Feature pyramid (Lin et al., 2017) with the extra levels of R-CNN, RetinaNet and FCOS; or a backbone's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class FPN(nn.Module):
    """Top-down pyramid over a backbone's maps, then ``extra_levels`` coarser ones.

    ``P_i = conv3x3(lateral1x1(C_i) + up2(M_{i+1}))``, nearest upsampling, no norm. Extra levels are 3x3 convolutions of
    stride 2: the first on the coarsest ``P`` (``extra_source="p5"``) or the coarsest ``C`` (``"c5"``), each next one
    on the ReLU of the one before (RetinaNet, section 4). With ``extra_source="pool"`` they have no weights: each takes
    every second value of the level before (the P6 of FPN's RPN, Lin et al., 2017, section 4.1).

    ``in_channels`` and ``strides`` are a backbone's ``channels`` and ``strides``; each stride must be a power of two
    and twice the one before. Maps the neck was not told of are passed over. The result is a dict ``p3, p4, ...``
    (named by log2 of the stride), finest first; ``strides`` and ``channels`` describe it.
    """

    def __init__(
        self,
        in_channels: Mapping[str, int],
        strides: Mapping[str, int],
        channels: int = 256,
        *,
        extra_levels: int = 2,
        extra_source: str = "p5",
    ) -> None:
        super().__init__()
        if not in_channels or set(in_channels) != set(strides):
            raise ValueError(f"in_channels and strides must name the same maps, got {[*in_channels]} and {[*strides]}")
        if extra_source not in ("p5", "c5", "pool"):
            raise ValueError(f"extra_source must be 'p5', 'c5' or 'pool', got {extra_source!r}")
        if channels < 1 or extra_levels < 0:
            raise ValueError(f"channels must be positive and extra_levels >= 0, got {channels} and {extra_levels}")
        self.inputs = tuple(sorted(in_channels, key=lambda name: strides[name]))
        ladder = [strides[name] for name in self.inputs]
        doubling = all(coarse == 2 * fine for fine, coarse in zip(ladder, ladder[1:], strict=False))
        if ladder[0] < 1 or ladder[0] & (ladder[0] - 1) or not doubling:
            raise ValueError(f"strides must be powers of two, each twice the one before, got {ladder}")
        self.extra_source = extra_source
        self.lateral = nn.ModuleList(nn.Conv2d(in_channels[name], channels, 1) for name in self.inputs)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in self.inputs)
        first = channels if extra_source == "p5" else in_channels[self.inputs[-1]]
        self.extra = nn.ModuleList(
            nn.MaxPool2d(1, stride=2)
            if extra_source == "pool"
            else nn.Conv2d(channels if index else first, channels, 3, stride=2, padding=1)
            for index in range(extra_levels)
        )
        ladder += [ladder[-1] * 2 ** (index + 1) for index in range(extra_levels)]
        self.strides = {f"p{stride.bit_length() - 1}": stride for stride in ladder}
        self.channels = dict.fromkeys(self.strides, channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias if module.bias is not None else module.weight)

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Maps by the backbone's names to ``{"p3": [N, channels, H, W], ...}``."""
        maps = [lateral(features[name]) for lateral, name in zip(self.lateral, self.inputs, strict=True)]
        for index in range(len(maps) - 1, 0, -1):
            maps[index - 1].add_(F.interpolate(maps[index], size=maps[index - 1].shape[-2:], mode="nearest"))
        levels = [output(map_) for output, map_ in zip(self.output, maps, strict=True)]
        source = features[self.inputs[-1]] if self.extra_source == "c5" else levels[-1]
        for index, coarser in enumerate(self.extra):
            levels.append(coarser(F.relu(source) if index and self.extra_source != "pool" else source))
            source = levels[-1]
        return dict(zip(self.strides, levels, strict=True))


class Pyramid(nn.Module):
    """The neck of a backbone whose maps are a pyramid already: one number of channels, finest first; passed on.

    Each map is for one group of objects by size, whatever its stride: several groups may be on maps of one stride, or
    on one map (MSNAS, section 3.3). ``nominal`` are the strides of a usual pyramid for these groups.
    """

    def __init__(self, channels: Mapping[str, int], strides: Mapping[str, int]) -> None:
        super().__init__()
        if not channels or set(channels) != set(strides) or len(set(channels.values())) > 1:
            raise ValueError(f"channels must be one number for all of {[*strides]}, got {dict(channels)}")
        if list(strides.values()) != sorted(strides.values()):
            raise ValueError(f"strides must not fall, got {dict(strides)}")
        self.channels, self.strides = dict(channels), dict(strides)

    def set_strides(self, strides: Sequence[int]) -> None:
        """Say the maps' strides anew, where the backbone's have changed."""
        if len(strides) != len(self.strides) or list(strides) != sorted(strides):
            raise ValueError(f"strides must be {len(self.strides)} that do not fall, got {list(strides)}")
        self.strides = dict(zip(self.strides, strides, strict=True))

    def nominal(self, first: int) -> tuple[int, ...]:
        """Strides from ``first`` on, each twice the one before: a group's objects are of the size for which a usual
        pyramid has a map of this stride."""
        return tuple(first * 2**index for index in range(len(self.strides)))

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The maps, in the order of the strides."""
        return {name: features[name] for name in self.strides}
