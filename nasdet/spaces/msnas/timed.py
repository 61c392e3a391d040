"""What an MSNAS net is made of, piece by piece, and the whole of it, to be timed; see :mod:`nasdet.spaces.msnas.costs`
for what the paper leaves open."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nasdet.arch import Card
from nasdet.detectors.norm import FoldingSequential, norm_layer
from nasdet.detectors.rpn import RPN
from nasdet.spaces.msnas.costs import RPN_CHANNELS, STEM_CHANNELS
from nasdet.spaces.msnas.encoder import conv_norm, residual_block
from nasdet.spaces.msnas.space import MSNASSpace


def stem() -> nn.Module:
    """7x7 stride 2 and max-pooling."""
    conv = nn.Conv2d(3, STEM_CHANNELS, 7, stride=2, padding=3, bias=False)
    pooled = (nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1))
    return FoldingSequential(conv, norm_layer("bn", STEM_CHANNELS), *pooled)


def block(inp: int, channels: int, stride: float, kind: str) -> nn.Module:
    """A residual block; upsampling comes before it."""
    made = residual_block(inp, channels, stride, kind, "bn")
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), made) if stride == 0.5 else made


def reduction(inp: int, out: int) -> nn.Module:
    """From a bottleneck's channels to those that heads read."""
    return conv_norm(inp, out, "bn")


class Lateral(nn.Module):
    """A 1x1 convolution of one map, added to another."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv_norm(channels, channels, "bn")

    def forward(self, x: Tensor) -> Tensor:
        """``x`` stands for both maps."""
        y: Tensor = x + self.conv(x)
        return y


class RPNOn(nn.Module):
    """The RPN on one map, or on all of an encoder's."""

    def __init__(self, channels: int, strides: Sequence[int], encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.rpn = RPN(channels, strides, hidden=RPN_CHANNELS)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """``x`` is the map, or the images for the encoder; scores and offsets by head."""
        maps = [x] if self.encoder is None else list(self.encoder(x).values())
        found: tuple[list[Tensor], list[Tensor]] = self.rpn(maps)
        return found


def network(card: Card) -> nn.Module:
    """A card's encoder with its RPN."""
    encoder = MSNASSpace.backbone(card)
    return RPNOn(encoder.inner, card.genotype["heads"], encoder)
