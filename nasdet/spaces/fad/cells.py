"""FAD's cells, groups of cells, and the module that replaces a detector's towers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nasdet._checks import check_whole
from nasdet.nn import group_norm_relu
from nasdet.spaces.fad.genotype import INPUTS, NODES
from nasdet.spaces.fad.transformations import Mixing, norm_groups

EdgeModules = Mapping[tuple[int, int], nn.Module]


class Edge(nn.Module):
    """One edge (Equation 1): 1x1 from c to c', a transformation (block), 1x1 back to c. The 1x1 convolutions are plain.

    ``bias`` of the 1x1 convolutions: off in the search, on in a derived net.
    """

    def __init__(self, channels: int, inner_channels: int, transform: nn.Module, bias: bool) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, inner_channels, 1, bias=bias)
        self.transform = transform
        self.expand = nn.Conv2d(inner_channels, channels, 1, bias=bias)

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """``weights``: of a mixed block, ``[P + 1]``."""
        inner = self.squeeze(x)
        out: Tensor = self.expand(self.transform(inner) if weights is None else self.transform(inner, weights))
        return out


class Cell(nn.Module):
    """Two inputs, three nodes, each node the sum of its edges; the output is the concatenation of the nodes, ``3 c``
    channels.

    ``edges``: modules by (source, node); sources 0 and 1 are the inputs, nodes are 2, 3 and 4.
    """

    def __init__(self, edges: EdgeModules) -> None:
        super().__init__()
        self._wiring = tuple(edges)
        self.edges = nn.ModuleDict({f"{source}_{node}": module for (source, node), module in edges.items()})

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor | None = None) -> Tensor:
        """``weights``: one row per edge in the order of ``edges``, for edges that mix."""
        states = [s0, s1]
        rows: Sequence[Tensor | None] = [None] * len(self._wiring) if weights is None else weights.unbind(0)
        for node in range(INPUTS, INPUTS + NODES):
            parts = [
                self.edges[f"{source}_{target}"](states[source], row)
                for (source, target), row in zip(self._wiring, rows, strict=True)
                if target == node
            ]
            states.append(sum(parts[1:], parts[0]))
        return torch.cat(states[INPUTS:], dim=1)


class Reduction(Mixing):
    """A cell's ``3 c`` channels back to ``c``: 1x1 convolution, group norm, ReLU between the cells of a group."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 1)
        self.norm = nn.GroupNorm(norm_groups(channels), channels)

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_relu(self.conv(x), self.norm, overwrite=True, backend=self.backend)


class CellGroup(nn.Module):
    """M cells of one architecture with weights of their own, and the 1x1 convolutions after each.

    The cell k+1 reads ``(s1, output of cell k)``, reduced to ``channels`` by 1x1 + norm + ReLU; the last cell's
    output goes through a plain 1x1 convolution, the group's feature. The paper gives each cell one reduction; so here
    every output is reduced once, also when two later cells read it (M > 2; at the published M = 1 and 2 this is the
    released code).

    ``edges(cell)`` makes the edges of one cell.
    """

    def __init__(self, channels: int, cells: int, edges: Callable[[], EdgeModules]) -> None:
        super().__init__()
        check_whole("cells", cells)
        self.channels = channels
        self.cells = nn.ModuleList(Cell(edges()) for _ in range(cells))
        self.reductions = nn.ModuleList(Reduction(NODES * channels, channels) for _ in range(cells - 1))
        self.output = nn.Conv2d(NODES * channels, channels, 1)
        # The released code's normal(0, 0.01) at its 768 inputs, kept at the same output scale for narrower modules.
        nn.init.normal_(self.output.weight, std=0.01 * (768 / (NODES * channels)) ** 0.5)
        assert self.output.bias is not None
        nn.init.zeros_(self.output.bias)

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor | None = None) -> Tensor:
        """``[N, c, H, W]`` twice to ``[N, c, H, W]``; ``weights`` as for :class:`Cell`."""
        *head, last = self.cells
        for cell, reduce in zip(head, self.reductions, strict=True):
            s0, s1 = s1, reduce(cell(s0, s1, weights))
        out: Tensor = self.output(last(s0, s1, weights))
        return out


class FADTower(nn.Module):
    """Both towers of a one-stage detector (Figure 1): the box group reads the pyramid level, the class group reads
    the box group's feature (input 0) and the level (input 1).

    ``forward(x [N, C, H, W])`` gives ``(box_feature, cls_feature)``, both ``[N, C, H, W]``: a *tower*. One module
    serves all levels.
    """

    def __init__(self, box: CellGroup, cls: CellGroup) -> None:
        super().__init__()
        self.box = box
        self.cls = cls
        self.box_channels = box.channels
        self.cls_channels = cls.channels

    def forward(self, x: Tensor, weights: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """``weights``: per group, one row per edge."""
        given: Mapping[str, Any] = weights or {}
        box = self.box(x, x, given.get("box"))
        return box, self.cls(box, x, given.get("cls"))


class FADStack(nn.Module):
    """One group in the place of a stack of convolutions, such as those of a mask head (section 3.1): ``[N, C, H, W]``
    to the same. Both inputs of its first cell are the map: a *mask trunk*."""

    def __init__(self, name: str, group: CellGroup) -> None:
        super().__init__()
        self.name = name
        self.group = group
        self.out_channels = group.channels

    def forward(self, x: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """``weights``: per group, one row per edge."""
        out: Tensor = self.group(x, x, (weights or {}).get(self.name))
        return out
