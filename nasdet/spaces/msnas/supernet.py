"""MSNAS's supernet: at every place a block for each stride, and after it a lateral connection of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from nasdet._checks import check_whole
from nasdet.spaces.msnas.encoder import MSNASEncoder, StrideChain
from nasdet.spaces.msnas.genotype import RESOLUTIONS, START, STRIDES, check_genotype, genotype

NAMES: dict[float, str] = {0.5: "up", 1: "keep", 2: "down"}
"""Names of a place's blocks, by stride."""


class MSNASSupernet(StrideChain):
    """All encoders of ``blocks`` blocks in one module, one of which is active (section 3.2).

    The maps are those of the active encoder's heads, and so are ``strides``, which change with it; the other options
    are :class:`~nasdet.spaces.msnas.encoder.StrideChain`'s. Of the inactive parts, and of blocks that no head of the
    active encoder reads from, nothing runs: they get no gradient (None, so neither momentum nor weight decay from an
    optimiser of torch), and their norms' statistics stay.

    What no legal encoder uses is not there: a first block that doubles the resolution, and laterals from the last two
    blocks. At the beginning the encoder of strides 1, ..., 1, 2 is active.
    """

    def __init__(
        self,
        blocks: int,
        channels: int,
        block: str = "basic",
        *,
        width: float = 1.0,
        norm: str = "bn",
        frozen_stages: int = 0,
    ) -> None:
        check_whole("blocks", blocks, 2)
        super().__init__(channels, block, width, norm, frozen_stages, blocks)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {NAMES[stride]: self._make_block(place, stride) for stride in STRIDES if place > 1 or stride != 0.5}
            )
            for place in range(1, blocks + 1)
        )
        self.laterals = nn.ModuleList(self._make_lateral() for _ in range(blocks - 2))
        self.reductions = self._make_reductions(RESOLUTIONS)
        self._finish()
        self._follow(genotype([1] * (blocks - 1) + [2], [START] * 4 + [2 * START]), whole=False)

    def activate(self, genotype: Mapping[str, Any]) -> None:
        """Make the encoder of a genotype the active one; ``ValueError`` unless it is legal and has as many blocks."""
        check_genotype(genotype)
        if (given := len(genotype["strides"])) != len(self.blocks):
            raise ValueError(f"genotype.strides must be {len(self.blocks)}, one for each block, got {given}")
        self._follow(genotype, whole=False)

    @torch.no_grad()
    def inherit(self, net: MSNASEncoder) -> None:
        """Copy the weights and statistics of the parts that ``net`` has into it; what is active here does not matter.

        ``ValueError`` unless it has as many blocks, of the same kind, channels and norm.
        """
        own, other = self.sizes(), net.sizes()
        strides = net.genotype["strides"]
        if own != other or len(strides) != len(self.blocks):
            raise ValueError(f"net must be of {len(self.blocks)} blocks, {own}, got {len(strides)}, {other}")
        pairs = [(self.conv1, net.conv1), (self.bn1, net.bn1)]
        pairs += [(self._block(place, strides[place - 1]), block) for place, block in enumerate(net.blocks, 1)]
        pairs += [(self._lateral(int(origin)), lateral) for origin, lateral in net.laterals.items()]
        pairs += [(self.reductions[name], reduction) for name, reduction in net.reductions.items()]
        for source, target in pairs:
            target.load_state_dict(source.state_dict())

    def _block(self, place: int, stride: float) -> nn.Module:
        return self.blocks[place - 1][NAMES[stride]]  # type: ignore[index]  # a ModuleDict

    def _lateral(self, origin: int) -> nn.Module:
        return self.laterals[origin - 1]

    def _blocks_at(self, place: int) -> Iterable[nn.Module]:
        return self.blocks[place - 1 : place]
