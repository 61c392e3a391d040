"""DetNAS's supernet: the four choices of every block in one backbone, of which one path runs at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nasdet.detectors import ShuffleNetV2
from nasdet.detectors.backbone import LEVELS
from nasdet.detectors.shufflenet import ShuffleBlock
from nasdet.spaces.detnas.genotype import CHOICES, Sizes, check_genotype


class ChoiceBlock(nn.Module):
    """A :class:`ShuffleBlock` for each choice, by its name; ``chosen`` says which one runs."""

    def __init__(self, inp: int, out: int, stride: int, *, choice: str, **options: Any) -> None:
        super().__init__()
        for name in CHOICES:
            self.add_module(name, ShuffleBlock(inp, out, stride, choice=name, **options))
        self.chosen = choice

    def forward(self, x: Tensor) -> Tensor:
        """The chosen block's result; no other block is touched."""
        y: Tensor = self.get_submodule(self.chosen)(x)
        return y


class DetNASSupernet(ShuffleNetV2):
    """A :class:`ShuffleNetV2` whose every block holds all four choices; :meth:`activate` says which path runs.

    The weights of a choice are those of no other path's choice at that place, and shared by all paths that make it.
    What is not on the path takes no part: its gradient stays None, so that an optimiser whose gradients are set to
    None before a step leaves its weights, momentum and weight decay included, as they are; its norms see no images.

    ``shuffle``, ``width``, ``norm``, ``frozen_stages`` and ``outputs``: see :class:`ShuffleNetV2`. Names of weights are
    those of a ShuffleNetV2 with the choice after the block's number: ``stage2.0.sh5.branch2.0.weight``.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        shuffle: str = "even_odd",
        width: float = 1.0,
        norm: str = "bn",
        frozen_stages: int = 0,
        outputs: Sequence[str] = LEVELS,
    ) -> None:
        super().__init__(
            sizes.stem,
            sizes.channels,
            sizes.blocks,
            shuffle=shuffle,
            block=ChoiceBlock,
            width=width,
            norm=norm,
            frozen_stages=frozen_stages,
            outputs=outputs,
        )
        self.sizes = sizes

    def activate(self, genotype: Sequence[str]) -> None:
        """Run the path of a genotype from now on; choices of stages that are not built have no effect."""
        check_genotype(genotype, self.sizes.depth)
        for (_, block), choice in zip(self.blocks(), genotype, strict=False):
            block.chosen = choice

    def blocks(self) -> Iterator[tuple[str, ChoiceBlock]]:
        """The blocks with their names, in the order of the genes."""
        for name, module in self.named_modules():
            if isinstance(module, ChoiceBlock):
                yield name, module

    def path_state(self, genotype: Sequence[str]) -> dict[str, Tensor]:
        """The state dict of the path alone, by the names of a :class:`ShuffleNetV2` with these choices; not copied."""
        check_genotype(genotype, self.sizes.depth)
        chosen = {f"{name}.": choice for (name, _), choice in zip(self.blocks(), genotype, strict=False)}
        state: dict[str, Tensor] = {}
        for key, value in self.state_dict().items():
            block = next((name for name in chosen if key.startswith(name)), None)
            if block is None:
                state[key] = value
            elif key.startswith(own := f"{block}{chosen[block]}."):
                state[block + key.removeprefix(own)] = value
        return state


def inherit(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy :meth:`DetNASSupernet.path_state` into a net of the same path; ``ValueError`` where it does not fit."""
    own = net.state_dict()
    if wrong := [key for key in {**own, **state} if key not in own or key not in state]:
        raise ValueError(f"net must be the path's own, got {wrong[0]} in one of the two only")
    with torch.no_grad():
        for key, value in own.items():
            if value.shape != state[key].shape:
                raise ValueError(f"net must be the path's own, got {key} of {tuple(value.shape)}")
        for key, value in own.items():
            value.copy_(state[key])
