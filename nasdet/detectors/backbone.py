"""What all backbones share: maps by level, parts that are not built, and parts that do not train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from nasdet.detectors.norm import FoldingSequential, in_sequence

LEVELS = ("c2", "c3", "c4", "c5")
"""Names of the maps, of strides 4, 8, 16 and 32."""


def scaled(channels: int, width: float) -> int:
    """``channels`` times ``width``, rounded to a multiple of 8 and at least 8; ``channels`` itself at width 1."""
    return channels if width == 1 else max(8, round(channels * width / 8) * 8)


class Backbone(nn.Module):
    """A classifier's trunk: images ``[N, 3, H, W]`` to a dict of feature maps.

    The result maps each name in ``outputs`` (of ``c2`` to ``c5``, strides 4 to 32) to ``[N, C, H / stride,
    W / stride]``, sizes rounded up. ``strides`` and ``channels`` say the same by name. Parts after the last output
    are not built. Parameter names are torchvision's where it has the net, whatever the norm; ``unused_weights`` are
    the beginnings of those names in a full state dict that have no place here.

    ``width`` multiplies the channels (1.0 is the published net). ``norm`` is one of
    :data:`nasdet.detectors.norm.NORMS`. ``frozen_stages`` counts the parts, from the stem on, that do not train and
    whose norms stay in evaluation mode: 0 none, 1 the stem, 2 the stem and ``c2``, as Detectron's FREEZE_AT.

    A subclass makes its layers up to the level ``self.built[-1]`` and then calls :meth:`_assemble`.
    """

    strides: dict[str, int]
    channels: dict[str, int]
    unused_weights: tuple[str, ...]

    def __init__(self, width: float, frozen_stages: int, outputs: Sequence[str]) -> None:
        super().__init__()
        if not width > 0:
            raise ValueError(f"width must be positive, got {width}")
        if isinstance(outputs, str) or not outputs or any(name not in LEVELS for name in outputs):
            raise ValueError(f"outputs must be names among {', '.join(LEVELS)}, got {outputs!r}")
        self.outputs = tuple(name for name in LEVELS if name in outputs)
        self.built = LEVELS[: LEVELS.index(self.outputs[-1]) + 1]
        if not 0 <= frozen_stages <= len(self.built) + 1:
            raise ValueError(f"frozen_stages must be in 0..{len(self.built) + 1}, got {frozen_stages}")
        self.frozen_stages = frozen_stages

    def _assemble(self, parts: Mapping[str, Sequence[str]], channels: Mapping[str, int], unused: Sequence[str]) -> None:
        """``parts``: the module paths of the stem and of each built level, in the order in which they run; ``channels``
        of the built levels."""
        self._parts = {name: tuple(paths) for name, paths in parts.items()}
        self.strides = {name: 4 * 2 ** LEVELS.index(name) for name in self.outputs}
        self.channels = {name: channels[name] for name in self.outputs}
        self.unused_weights = tuple(unused)
        self._freeze()

    def parts(self) -> dict[str, nn.Sequential]:
        """The modules by ``"stem"``, ``"c2"``, ...: each takes the result of the one before."""
        return {name: FoldingSequential(*map(self.get_submodule, paths)) for name, paths in self._parts.items()}

    def _freeze(self) -> None:
        for paths in list(self._parts.values())[: self.frozen_stages]:
            for path in paths:
                self.get_submodule(path).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Backbone:
        """As for any module, but frozen stages stay in evaluation mode."""
        super().train(mode)
        self._freeze()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images ``[N, 3, H, W]`` to the maps named in ``outputs``."""
        x, features = images, {}
        for name, paths in self._parts.items():
            x = in_sequence([self.get_submodule(path) for path in paths], x)
            if name in self.outputs:
                features[name] = x
        return features
