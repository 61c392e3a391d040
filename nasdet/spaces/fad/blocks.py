"""The transformation block of one edge at search time: all transformations mixed by softmax weights (Equation 2).

Two forms with one interface: :class:`RepShareBlock` computes 6 representations a stream and shares them,
:class:`UnsharedBlock` computes every transformation by itself (13 a stream). Both leave the last norms, the ReLUs and
the weighted sum to one fused op.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nasdet.ops import mix, norm_act_mix
from nasdet.spaces.fad.genotype import CHAINS, Chain
from nasdet.spaces.fad.transformations import Mixing, Unit, UnitChain, base, dilated, norm_groups, transformation


class _Terms:
    """The terms of one block's sum, gathered before they are mixed."""

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights.unbind(0)
        self._maps: list[Tensor] = []
        self._norms: list[nn.GroupNorm | None] = []
        self._active_weights: list[Tensor] = []
        self._linear: list[Tensor] = []
        self._linear_weights: list[Tensor] = []

    def activated(self, index: int, x: Tensor, norm: nn.GroupNorm | None = None) -> None:
        """Add w relu(norm(x)), or w relu(x)."""
        self._maps.append(x)
        self._norms.append(norm)
        self._active_weights.append(self._weights[index])

    def linear(self, index: int, x: Tensor) -> None:
        """Add w x."""
        self._linear.append(x)
        self._linear_weights.append(self._weights[index])

    def sum(self, groups: int, overwrite: bool, backend: str | None) -> Tensor:
        """The sum of all terms. ``overwrite`` says that nobody else reads the activated terms' maps."""
        total = None
        if self._maps:
            # Some term is always normalised: every stem and every chain ends in a unit that nobody else reads.
            absent = next(torch.zeros_like(norm.weight) for norm in self._norms if norm is not None)
            total = norm_act_mix(
                self._maps,
                torch.stack(self._active_weights),
                torch.stack([absent if norm is None else norm.weight for norm in self._norms]),
                torch.stack([absent if norm is None else norm.bias for norm in self._norms]),
                groups,
                normalized=[norm is not None for norm in self._norms],
                overwrite_inputs=overwrite,
                backend=backend,
            )
        if self._linear:
            linear = mix(self._linear, torch.stack(self._linear_weights), backend=backend)
            total = linear if total is None else total + linear
        assert total is not None
        return total


class RepShareBlock(Mixing):
    """T(x) of Equation 2 with shared representations.

    Per stream the stem computes p1, p2, p3, each from the one before; t1 and t2 read p1 and p2 through H, a 1x1
    convolution (without bias) and, in the paper's form, a ReLU; t3 is p3; t4 and t6 are dilated units on p1, t5 one
    on p2. H stands only where the representation is shared with another transformation of the subset: in ``subset1``,
    whose stem ends at p2, t1 alone has it.

    Args:
        channels: c', of input and output.
        transformations: names in the order of the weights; only the paper's chains, not DARTS's operations.
        decouple: with H; otherwise t1 = p1 and t2 = p2.
        released: H without its ReLU, as in the released code.

    ``forward(x [N, c', H, W], weights [P + 1])``: the last weight is that of ``none``, which adds nothing.
    """

    def __init__(
        self, channels: int, transformations: Sequence[str], *, decouple: bool = True, released: bool = False
    ) -> None:
        super().__init__()
        if unknown := [name for name in transformations if name not in CHAINS]:
            raise ValueError(f"transformations of a shared block must be chains such as 'std2', got {unknown[0]!r}")
        self.released = released
        self.groups = norm_groups(channels)
        self._index = {name: index for index, name in enumerate(transformations)}
        chains = [CHAINS[name] for name in transformations]
        self._depth = {c.stream: max(d.depth for d in chains if d.stream == c.stream) for c in chains}
        self._dilations = {
            (c.stream, c.depth): tuple(
                d.name for d in chains if d.dilation and (d.stream, d.depth) == (c.stream, c.depth)
            )
            for c in chains
        }
        self.stem = nn.ModuleDict(
            {
                stream: nn.ModuleList(base(stream, channels) for _ in range(depth))
                for stream, depth in self._depth.items()
            }
        )
        self.dilated = nn.ModuleDict({c.name: dilated(channels, c.dilation) for c in chains if c.dilation})
        through = [c.name for c in chains if decouple and c.dilation is None and self._shared(c.stream, c.depth)]
        self.decouple = nn.ModuleDict({name: nn.Conv2d(channels, channels, 1, bias=False) for name in through})

    def _shared(self, stream: str, depth: int) -> bool:
        """Whether another transformation goes on from this level of the stem."""
        return depth < self._depth[stream] or bool(self._dilations.get((stream, depth)))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """The mixture of all transformations of ``x``."""
        terms = _Terms(weights)
        fresh = [self._stream(stream, x, terms) for stream in self._depth]
        return terms.sum(self.groups, all(fresh), self.backend)

    def _stream(self, stream: str, p: Tensor, terms: _Terms) -> bool:
        """Add the terms of one stream; whether nobody but the sum reads their maps."""
        fresh = True
        for depth in range(1, self._depth[stream] + 1):
            unit, name = self._unit(stream, depth), Chain(stream, depth).name
            if not self._shared(stream, depth):
                terms.activated(self._index[name], unit.raw(p), unit.norm)
                break
            p = unit(p)
            if name in self.decouple:
                add = terms.linear if self.released else terms.activated
                add(self._index[name], self.decouple[name](p))
            elif name in self._index:
                terms.activated(self._index[name], p)  # relu(p) = p: the unit has activated it
                fresh = False
            for long in self._dilations.get((stream, depth), ()):
                branch = self.dilated[long]
                assert isinstance(branch, Unit)
                terms.activated(self._index[long], branch.raw(p), branch.norm)
        return fresh

    def _unit(self, stream: str, depth: int) -> Unit:
        units = self.stem[stream]
        assert isinstance(units, nn.ModuleList)
        unit = units[depth - 1]
        assert isinstance(unit, Unit)
        return unit


class UnsharedBlock(Mixing):
    """T(x) of Equation 2 with every transformation computed by itself: Table 2 without RepShare, and its DARTS row.

    Same arguments and ``forward`` as :class:`RepShareBlock`; any transformations. Pooling and skip carry no ReLU.
    """

    def __init__(self, channels: int, transformations: Sequence[str]) -> None:
        super().__init__()
        self.groups = norm_groups(channels)
        self.transformations = nn.ModuleDict({name: transformation(name, channels) for name in transformations})

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """The mixture of all transformations of ``x``."""
        terms = _Terms(weights)
        for index, module in enumerate(self.transformations.values()):
            if isinstance(module, UnitChain):
                raw, norm = module.raw(x)
                terms.activated(index, raw, norm)
            else:
                terms.linear(index, module(x))
        return terms.sum(self.groups, True, self.backend)
