"""ShuffleNetV2 backbones (Ma et al., 2018), and those of DetNAS's search spaces (Chen et al., NeurIPS 2019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nasdet.detectors.backbone import LEVELS, Backbone, scaled
from nasdet.detectors.norm import FoldingSequential, norm_layer
from nasdet.nn import DepthwiseConv2d

CHOICES = {"sh3": 3, "sh5": 5, "sh7": 7, "xcep": 3}
"""DetNAS's choices for a block, in the order of its genes, with the kernel of their depthwise convolutions."""

SHUFFLES = ("output", "even_odd", "halves")


def _pointwise(inp: int, out: int, norm: str) -> list[nn.Module]:
    return [nn.Conv2d(inp, out, 1, bias=False), norm_layer(norm, out), nn.ReLU(inplace=True)]


def _depthwise(channels: int, kernel: int, stride: int, norm: str) -> list[nn.Module]:
    conv = DepthwiseConv2d(channels, kernel, stride, kernel // 2, bias=False)
    return [conv, norm_layer(norm, channels)]


def _right_branch(choice: str, inp: int, out: int, mid: int, stride: int, norm: str) -> nn.Sequential:
    kernel = CHOICES[choice]
    if choice == "xcep":
        layers = _depthwise(inp, kernel, stride, norm) + _pointwise(inp, mid, norm)
        layers += _depthwise(mid, kernel, 1, norm) + _pointwise(mid, mid, norm)
        layers += _depthwise(mid, kernel, 1, norm) + _pointwise(mid, out, norm)
    else:
        layers = _pointwise(inp, mid, norm) + _depthwise(mid, kernel, stride, norm) + _pointwise(mid, out, norm)
    return FoldingSequential(*layers)


def interleave(left: Tensor, right: Tensor) -> Tensor:
    """Two maps of as many channels as one, channel by channel in turn: the shuffle of their concatenation.

    The result has the memory order of ``right``.
    """
    if right.stride(1) < right.stride(3):  # channels last, also for a slice of such a map
        pair = torch.stack((left.permute(0, 2, 3, 1), right.permute(0, 2, 3, 1)), dim=-1)
        return pair.flatten(-2).permute(0, 3, 1, 2)
    return torch.stack((left, right), dim=2).flatten(1, 2)


class ShuffleBlock(nn.Module):
    """A ShuffleNetV2 unit ``[N, inp, H, W] -> [N, out, H / stride, W / stride]``: two branches, concatenated.

    At stride 1 (``inp == out``) the left branch is one half of the channels as it is, the right one computes on the
    other; at stride 2 both see all channels, and the left one makes ``left`` of the ``out`` (by default ``inp``) with
    a depthwise and a 1x1 convolution. The right one is, by ``choice`` (:data:`CHOICES`): 1x1, depthwise k x k with the
    stride, 1x1 (``sh3``, ``sh5``, ``sh7``); or three times depthwise 3x3 and 1x1 (``xcep``). Its inner width is
    ``out / 2``. A norm follows each convolution, a ReLU each 1x1.

    ``shuffle`` says where and how channels change branches. ``"output"``: the halves of the result are interleaved,
    and a block splits its input in the middle (torchvision). The others do it at the input of blocks of stride 1, so
    that the map between two stages is not shuffled: ``"even_odd"`` takes even channels left and odd ones right
    (DetNAS's released nets); ``"halves"`` interleaves the input's halves and splits in the middle (DetNAS's search).
    These are different permutations: weights do not move from one to another.
    """

    def __init__(
        self,
        inp: int,
        out: int,
        stride: int,
        *,
        choice: str = "sh3",
        norm: str = "bn",
        shuffle: str = "even_odd",
        left: int | None = None,
    ) -> None:
        super().__init__()
        if choice not in CHOICES:
            raise ValueError(f"choice must be one of {', '.join(CHOICES)}, got {choice!r}")
        if shuffle not in SHUFFLES:
            raise ValueError(f"shuffle must be one of {', '.join(SHUFFLES)}, got {shuffle!r}")
        if inp < 1 or out < 2 or out % 2:
            raise ValueError(f"inp must be positive and out even, got {inp} and {out}")
        if stride not in (1, 2) or (stride == 1 and inp != out):
            raise ValueError(f"stride must be 2, or 1 with as many channels out as in, got {stride}: {inp} to {out}")
        left = (inp if stride == 2 else out // 2) if left is None else left
        if not 0 < left < out or (stride == 1 or shuffle == "output") and 2 * left != out:
            raise ValueError(f"left must be fewer than the {out} channels out, or half of them, got {left}")
        self.inp, self.out, self.stride = inp, out, stride
        self.choice, self.shuffle = choice, shuffle
        if stride == 2:
            self.branch1 = FoldingSequential(*_depthwise(inp, CHOICES[choice], 2, norm), *_pointwise(inp, left, norm))
        self.branch2 = _right_branch(choice, inp if stride == 2 else inp // 2, out - left, out // 2, stride, norm)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.shuffle == "even_odd":
            return x[:, 0::2], x[:, 1::2]
        if self.shuffle == "halves":
            x = interleave(*x.chunk(2, dim=1))
        left, right = x.chunk(2, dim=1)
        return left, right

    def forward(self, x: Tensor) -> Tensor:
        left, right = (self.branch1(x), x) if self.stride == 2 else self._split(x)
        right = self.branch2(right)
        return interleave(left, right) if self.shuffle == "output" else torch.cat((left, right), dim=1)


class ShuffleNetV2(Backbone):
    """ShuffleNetV2 without its last 1x1 convolution and classifier; see :class:`Backbone` for its maps and options.

    ``channels`` and ``blocks`` are those of the stages, ``stem`` the first convolution's channels (3x3, stride 2). The
    first block of a stage has stride 2. Three stages follow a max-pooling, whose map is ``c2`` (Ma et al., Table 5);
    four follow the stem itself, and the stem has a bias (DetNAS, Table 1). ``choices`` has DetNAS's choice for each
    block in turn (by default ``"sh3"`` everywhere); ``shuffle`` as for :class:`ShuffleBlock`, with which
    ``"output"`` makes the branches of a stage's first block equally wide, as in torchvision. Names are torchvision's:
    ``stage2`` has stride 8, and a fourth stage before it is ``stage1``. ``block`` makes the blocks, with the arguments
    of :class:`ShuffleBlock`.

    ``width`` multiplies all channels, rounded to a multiple of 8, and at least 8 more from stage to stage. Weights
    begin as in DetNAS: normal, the stem's with standard deviation 0.01, any other's with one over its input channels
    (1 where depthwise); biases of norms 0.0001.
    """

    def __init__(
        self,
        stem: int = 24,
        channels: Sequence[int] = (116, 232, 464),
        blocks: Sequence[int] = (4, 8, 4),
        choices: Sequence[str] | None = None,
        *,
        shuffle: str = "output",
        block: Callable[..., nn.Module] = ShuffleBlock,
        width: float = 1.0,
        norm: str = "bn",
        frozen_stages: int = 0,
        outputs: Sequence[str] = LEVELS,
    ) -> None:
        super().__init__(width, frozen_stages, outputs)
        if len(channels) not in (3, 4) or len(blocks) != len(channels) or min(blocks) < 1:
            raise ValueError(f"channels and blocks must be those of 3 or 4 stages, got {[*channels]} and {[*blocks]}")
        choices = ["sh3"] * sum(blocks) if choices is None else list(choices)
        if len(choices) != sum(blocks):
            raise ValueError(f"choices must be {sum(blocks)}, one for each block, got {len(choices)}")
        pooled = len(channels) == 3
        inp = scaled(stem, width)
        conv = nn.Conv2d(3, inp, 3, stride=2, padding=1, bias=not pooled)
        self.conv1 = FoldingSequential(conv, norm_layer(norm, inp), nn.ReLU(inplace=True))
        parts, widths = {"stem": ["conv1"]}, {}
        if pooled:
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
            parts["c2"], widths["c2"] = ["maxpool"], inp
        given = iter(choices)
        levels = LEVELS[4 - len(channels) :]
        for level, base, count in zip(levels, channels, blocks, strict=True):
            out = base if width == 1 else max(inp + 8, scaled(base, width))
            stage = [next(given) for _ in range(count)]
            if level not in self.built:
                continue
            left = out // 2 if shuffle == "output" else None
            first = block(inp, out, 2, choice=stage[0], norm=norm, shuffle=shuffle, left=left)
            rest = [block(out, out, 1, choice=choice, norm=norm, shuffle=shuffle) for choice in stage[1:]]
            name = f"stage{LEVELS.index(level) + 1}"
            self.add_module(name, nn.Sequential(first, *rest))
            parts[level], widths[level], inp = [name], out, out
        self._initialise()
        unbuilt = [f"stage{LEVELS.index(level) + 1}." for level in levels if level not in self.built]
        self._assemble(parts, widths, ["fc.", "conv5.", *unbuilt])

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01 if module is self.conv1[0] else 1 / module.weight.shape[1])
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(getattr(module, "weight", None), Tensor) and isinstance(module.bias, Tensor):
                module.bias.data.fill_(1e-4)
