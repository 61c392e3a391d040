"""What Hit-Detector's architectures cost: a table with an entry for each part, place and operation. No torch.

MACs are of convolutions and the fully connected layer, batch 1, without norms, biases and activations; parameters count
all of them. A net's cost is what every net pays plus one entry per place, so least, largest and (with
:func:`nasdet.spaces.hit.expected_cost`) expected costs are exact. A measured cost is a table too: :func:`table`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nasdet.spaces.detnas.costs import Layer
from nasdet.spaces.hit.genotype import LEVELS, Place, Sizes, check_genotype, named_operation, places

INPUT = (800, 1200)
PROPOSALS = 1000
"""The paper counts at 800 x 1200 (height, width) with 1,000 proposals (Table 2)."""
TAIL = "ir_k3_d1_e3"
"""The fixed operation that begins a backbone's tail."""

Size = tuple[int, int]


def operation_layers(name: str, inp: int, out: int, before: int, after: int) -> list[Layer]:
    """The convolutions of an operation, over ``before`` places (pixels) of its input and ``after`` of its output."""
    op = named_operation(name)
    if op.kind == "conv":
        return [Layer(inp, out, op.kernel, 1, after)]
    inner = inp * (op.expansion or 1)
    first = [Layer(inp, inner, 1, 1, before)] if op.kind == "ir" else []
    return [*first, Layer(inner, inner, op.kernel, inner, after), Layer(inner, out, 1, 1, after)]


@dataclass(frozen=True)
class PartTable:
    """A part's cost by place and operation, and what every architecture of it pays on top (``fixed``)."""

    fixed: float
    rows: tuple[Mapping[str, float], ...]

    def __call__(self, names: Sequence[str]) -> float:
        """The cost of an architecture of the part."""
        if len(names) != len(self.rows):
            raise ValueError(f"names must be {len(self.rows)} operations, one for each place, got {len(names)}")
        for index, (row, name) in enumerate(zip(self.rows, names, strict=True)):
            if name not in row:
                raise ValueError(f"names must be among {', '.join(row)}, got {name!r} at {index}")
        return self.fixed + sum(row[name] for row, name in zip(self.rows, names, strict=True))

    def reachable(self) -> tuple[float, float]:
        """The least and the largest cost."""
        least, largest = (sum(bound(row.values()) for row in self.rows) for bound in (min, max))
        return self.fixed + least, self.fixed + largest


@dataclass(frozen=True)
class CostTable:
    """A cost of whole architectures: a :class:`PartTable` for each part."""

    parts: Mapping[str, PartTable]

    def __call__(self, genotype: Mapping[str, Sequence[str]]) -> float:
        """The sum over the parts of a genotype."""
        check_genotype(genotype)
        if missing := [part for part in genotype if part not in self.parts]:
            raise ValueError(f"genotype parts must be among {', '.join(self.parts)}, got {missing[0]!r}")
        return sum(self.parts[part](names) for part, names in genotype.items())

    def by_part(self, genotype: Mapping[str, Sequence[str]]) -> dict[str, float]:
        """The cost of each part of a genotype."""
        return {part: self.parts[part](names) for part, names in genotype.items()}

    def reachable(self) -> tuple[float, float]:
        """The least and the largest cost of all parts together."""
        ranges = [part.reachable() for part in self.parts.values()]
        return sum(least for least, _ in ranges), sum(largest for _, largest in ranges)


def table(
    sizes: Sizes,
    candidates: Mapping[str, Sequence[str]],
    cost: Callable[[Place, str], float],
    fixed: Mapping[str, float] | None = None,
) -> CostTable:
    """The table of any cost that adds up over places, such as a measured latency: ``cost(place, operation)``.

    ``candidates`` by part; ``fixed`` is what each part pays besides (0).
    """
    rows = {
        part: tuple({name: cost(place, name) for name in names} for place in places(part, sizes))
        for part, names in candidates.items()
    }
    return CostTable({part: PartTable((fixed or {}).get(part, 0), found) for part, found in rows.items()})


def macs_table(
    sizes: Sizes, candidates: Mapping[str, Sequence[str]], size: Size = INPUT, proposals: int = PROPOSALS
) -> CostTable:
    """Multiply-accumulates for an image of ``size`` (height, width) and ``proposals`` RoIs.

    The head's are those of its blocks and its fully connected layer, without the predictors, which are not searched.
    """
    return _layer_table(sizes, candidates, size, proposals, lambda layer: layer.macs)


def activations_table(
    sizes: Sizes, candidates: Mapping[str, Sequence[str]], size: Size = INPUT, proposals: int = PROPOSALS
) -> CostTable:
    """Numbers that are kept for backward, by image: of every convolution its output, and that normalised."""
    return _layer_table(sizes, candidates, size, proposals, lambda layer: 2 * layer.out * layer.area)


def _layer_table(
    sizes: Sizes,
    candidates: Mapping[str, Sequence[str]],
    size: Size,
    proposals: int,
    cost_of: Callable[[Layer], int],
) -> CostTable:
    if min(size) < 1 or proposals < 1:
        raise ValueError(f"size and proposals must be positive, got {tuple(size)} and {proposals}")
    areas = {part: _areas(part, sizes, size, proposals) for part in candidates}

    def cost(place: Place, name: str) -> int:
        layers = operation_layers(name, place.inp, place.out, *areas[place.part][place.index])
        return sum(map(cost_of, layers))

    fixed = {part: sum(map(cost_of, _fixed(part, sizes, size, proposals))) for part in candidates}
    return table(sizes, candidates, cost, fixed)


def parameters_table(sizes: Sizes, candidates: Mapping[str, Sequence[str]]) -> CostTable:
    """Parameters: weights, biases, scales and shifts of norms."""

    def cost(place: Place, name: str) -> int:
        return sum(layer.parameters for layer in operation_layers(name, place.inp, place.out, 1, 1))

    fixed = {part: _fixed_parameters(part, sizes) for part in candidates}
    return table(sizes, candidates, cost, fixed)


def _half(size: Size) -> Size:
    return -(-size[0] // 2), -(-size[1] // 2)


def _level_areas(size: Size) -> dict[str, int]:
    """Pixels of the levels c2 to c7."""
    found, now = {}, _half(size)
    for level in (*LEVELS, "c6", "c7"):
        now = _half(now)
        found[level] = now[0] * now[1]
    return found


def _areas(part: str, sizes: Sizes, size: Size, proposals: int) -> list[tuple[int, int]]:
    """Pixels of each place's input and output."""
    if part == "backbone":
        found, now = [], _half(size)
        for place in places(part, sizes):
            after = _half(now) if place.stride == 2 else now
            found.append((now[0] * now[1], after[0] * after[1]))
            now = after
        return found
    levels = _level_areas(size)
    if part == "neck":
        return [(levels[level], levels[level]) for level in (*sizes.inputs, *sizes.inputs)]
    if part == "head":
        area = sizes.pooled**2 * proposals
    else:
        area = sum(levels[level] for level in sizes.pyramid())
    return [(area, area) for _ in places(part, sizes)]


def _fixed(part: str, sizes: Sizes, size: Size, proposals: int) -> list[Layer]:
    """The convolutions that every architecture of a part has."""
    levels, width = _level_areas(size), sizes.channels
    if part == "backbone":
        height, columns = _half(size)
        found = [Layer(3, sizes.stem, 3, 1, height * columns)]
        if sizes.tail:
            last, area = sizes.stages[-1][0], levels["c5"]
            found += operation_layers(TAIL, last, sizes.tail[0], area, area)
            found.append(Layer(sizes.tail[0], sizes.tail[1], 1, 1, area))
        return found
    if part == "neck":
        beyond = [level for level in sizes.pyramid() if sizes.extra == "convs" and level not in sizes.inputs]
        return [Layer(width, width, 3, 1, levels[level]) for level in (*sizes.inputs[1:], *beyond)]
    if part == "head":
        return [Layer(width * sizes.pooled**2, sizes.hidden, 1, 1, proposals)]
    return []


def _fixed_parameters(part: str, sizes: Sizes) -> int:
    layers = _fixed(part, sizes, (1, 1), 1)
    if part == "backbone":  # the stem's convolution has a bias besides its norm
        return sum(layer.parameters for layer in layers) + sizes.stem
    return sum(layer.weights + layer.out for layer in layers)  # biases, no norms
