"""Hit-Detector's supernet: mixed layers wherever they stand in a model, and what is done with all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nasdet._checks import check_whole
from nasdet.ops import mix
from nasdet.spaces.hit.costs import CostTable, PartTable
from nasdet.spaces.hit.genotype import Place, check_genotype
from nasdet.spaces.hit.mixture import recomputed_mix
from nasdet.spaces.hit.operations import operation

MEMORY = ("full", "recompute", "sampled")
"""How a mixed layer holds its candidates' activations until backward."""
_FAR = -1e4  # exp(_FAR) is 0 in every dtype


class MixedLayer(nn.Module):
    """One searchable layer: ``sum_o softmax(alpha)_o * o(x)`` over its candidate operations (Equation 5).

    ``alpha [N]`` in the order of ``names``, drawn as 1e-3 * N(0, 1). ``memory``:

    * ``"full"``: autograd keeps the maps of all candidates;
    * ``"recompute"``: those of one at a time, for one more forward (:func:`~nasdet.spaces.hit.recomputed_mix`);
    * ``"sampled"``: in training the layer consists of the candidates that were drawn last (:func:`draw`), and its
      softmax is over these. In evaluation it is whole.

    Screening takes candidates out (:func:`keep`): their alphas stay, so that optimisers and checkpoints do, but take no
    part in the softmax.
    """

    active: Tensor

    def __init__(
        self,
        place: Place,
        names: Sequence[str],
        *,
        norm: str = "bn",
        memory: str = "full",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.place, self.names = place, tuple(names)
        self.memory, self.backend = checked_memory(memory), backend
        self.candidates = nn.ModuleDict(
            {name: operation(name, place.inp, place.out, place.stride, norm) for name in names}
        )
        self.alpha = nn.Parameter(1e-3 * torch.randn(len(self.names)))
        self.register_buffer("active", torch.ones(len(self.names), dtype=torch.bool))
        self.kept = tuple(range(len(self.names)))  # what the buffer says, where no device need be asked
        self.drawn: tuple[int, ...] | None = None

    def weights(self, chosen: Sequence[int] | None = None) -> Tensor:
        """The softmax over the kept candidates, or over ``chosen`` ones."""
        chosen = self.kept if chosen is None else chosen
        if len(chosen) == len(self.names):
            return self.alpha.softmax(0)
        rows = self.alpha.unbind()
        return torch.stack([rows[index] for index in chosen]).softmax(0)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inp, H, W]`` to ``[N, out, ceil(H / stride), ceil(W / stride)]``."""
        sampled = self.memory == "sampled" and self.training
        if sampled and self.drawn is None:
            raise ValueError("draw must be called before a step of a supernet with memory='sampled', got no draw")
        chosen = self.drawn if sampled and self.drawn is not None else self.kept
        modules = [self.candidates[self.names[index]] for index in chosen]
        if self.memory == "full" or sampled:
            return mix([module(x) for module in modules], self.weights(chosen), backend=self.backend)
        return recomputed_mix(modules, x, self.weights(chosen), backend=self.backend)

    def keep(self, kept: Sequence[int]) -> None:
        """Leave these candidates alone in the layer."""
        self.active.fill_(False)
        self.active[list(kept)] = True
        self.kept, self.drawn = tuple(sorted(kept)), None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.kept, self.drawn = tuple(self.active.nonzero()[:, 0].tolist()), None

    def extra_repr(self) -> str:
        return f"{self.place.part}[{self.place.index}], {len(self.kept)} of {len(self.names)}, memory={self.memory!r}"


def checked_memory(memory: str) -> str:
    """``memory``, if it is one of :data:`MEMORY`."""
    if memory not in MEMORY:
        raise ValueError(f"memory must be one of {', '.join(MEMORY)}, got {memory!r}")
    return memory


def mixed_layers(model: nn.Module) -> dict[str, list[MixedLayer]]:
    """The mixed layers anywhere in ``model``, by part, in the order of their places."""
    found: dict[str, list[MixedLayer]] = {}
    for module in model.modules():
        if isinstance(module, MixedLayer):
            found.setdefault(module.place.part, []).append(module)
    if not found:
        raise ValueError(f"model must have mixed layers, got a {type(model).__name__} without")
    return {part: sorted(layers, key=lambda layer: layer.place.index) for part, layers in found.items()}


def all_mixed_layers(model: nn.Module) -> list[MixedLayer]:
    """Those of all parts in one list, part by part."""
    return [layer for layers in mixed_layers(model).values() for layer in layers]


def set_memory(model: nn.Module, memory: str) -> None:
    """Choose how all mixed layers hold activations, one of :data:`MEMORY`."""
    for layer in all_mixed_layers(model):
        layer.memory = checked_memory(memory)


def draw(model: nn.Module, samples: int, *, generator: torch.Generator | None = None) -> None:
    """Draw ``samples`` different candidates for every mixed layer, for the next step with ``memory="sampled"``.

    One after the other in proportion to ``softmax(alpha)`` (by adding Gumbel noise), as ProxylessNAS draws its two
    paths (Cai et al., ICLR 2019, section 3.2.1); the layer then mixes these by the softmax over them, so that its
    output stays a weighted mean. With ``samples`` of all kept ones that is the whole layer. The other candidates and
    their alphas get no gradient, or a zero one. ``generator``: on the CPU; torch's global one by default.
    """
    check_whole("samples", samples)
    layers = all_mixed_layers(model)
    alphas = torch.cat([layer.alpha.detach() for layer in layers]).float().cpu()  # one wait for the device
    for layer, alpha in zip(layers, alphas.split([len(layer.names) for layer in layers]), strict=True):
        scores = alpha - torch.empty(len(alpha)).exponential_(generator=generator).log()
        order = sorted(layer.kept, key=scores.tolist().__getitem__, reverse=True)
        layer.drawn = tuple(sorted(order[:samples]))


def keep(model: nn.Module, part: str, names: Sequence[str]) -> None:
    """Leave only these operations in every layer of a part; those taken out before must not come back."""
    layers = mixed_layers(model)
    if part not in layers:
        raise ValueError(f"part must be one of {', '.join(layers)}, got {part!r}")
    for layer in layers[part]:
        left = [layer.names[index] for index in layer.kept]
        if not names or any(name not in left for name in names):
            raise ValueError(f"names must be among {', '.join(left)}, got {', '.join(names) or 'none'}")
    for layer in layers[part]:
        layer.keep([layer.names.index(name) for name in names])


def kept_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The operations that each part still has."""
    first = {part: layers[0] for part, layers in mixed_layers(model).items()}
    return {part: tuple(layer.names[index] for index in layer.kept) for part, layer in first.items()}


def alpha_matrix(layers: Sequence[MixedLayer]) -> Tensor:
    """The alphas of the kept candidates, ``[L, K]``: a row per layer, a column per operation; differentiable."""
    rows = torch.stack([layer.alpha for layer in layers])
    kept = layers[0].kept
    return rows if len(kept) == rows.shape[1] else torch.stack([rows[:, index] for index in kept], dim=1)


def expected_part_cost(alphas: Tensor, names: Sequence[str], table: PartTable) -> Tensor:
    """``fixed + sum_l sum_o softmax(alpha_l)_o * cost(o, l)`` (Equation 7): a part's mean cost when every layer draws
    its operation by its softmax, exactly, and differentiable.

    ``alphas [L, K]``, columns in the order of ``names``. A scalar in the dtype of ``alphas``, summed in float64. The
    paper prints alpha where a probability must stand.
    """
    if alphas.shape != (len(table.rows), len(names)):
        raise ValueError(f"alphas must have shape ({len(table.rows)}, {len(names)}), got {tuple(alphas.shape)}")
    wide = alphas.double()
    costs = wide.new_tensor([[row[name] for name in names] for row in table.rows])
    return ((wide.softmax(1) * costs).sum() + table.fixed).to(alphas.dtype)


def expected_cost(model: nn.Module, table: CostTable) -> dict[str, Tensor]:
    """The expected cost of each searched part of ``model``: C(alpha), C(beta), C(gamma) of Equation 6."""
    names = kept_names(model)
    return {
        part: expected_part_cost(alpha_matrix(layers), names[part], table.parts[part])
        for part, layers in mixed_layers(model).items()
    }


def restrict(model: nn.Module, genotype: Mapping[str, Any]) -> None:
    """Set the alphas to one architecture: at each place its operation gets weight 1. Parts without a choice stay."""
    with torch.no_grad():
        for layer, name in _chosen(model, genotype):
            layer.alpha.fill_(_FAR)
            layer.alpha[layer.names.index(name)] = 0


def inherited_state(model: nn.Module, genotype: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of the derived net with the supernet's weights: ``model``'s own, each mixed layer replaced by the
    chosen operation."""
    chosen = {id(layer): name for layer, name in _chosen(model, genotype)}
    prefixes = {
        f"{path}.": chosen.get(id(part)) for path, part in model.named_modules() if isinstance(part, MixedLayer)
    }
    found = {}
    for key, value in model.state_dict().items():
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        if prefix is None or prefixes[prefix] is None:
            found[key] = value
        elif key.startswith(own := f"{prefix}candidates.{prefixes[prefix]}."):
            found[prefix + key.removeprefix(own)] = value
    return found


def _chosen(model: nn.Module, genotype: Mapping[str, Any]) -> list[tuple[MixedLayer, str]]:
    """Every mixed layer of the genotype's parts with its operation."""
    check_genotype(genotype)
    layers = mixed_layers(model)
    found = []
    for part, names in genotype.items():
        if len(names) != len(layers.get(part, ())):
            raise ValueError(f"genotype.{part} must have {len(layers.get(part, ()))} operations, got {len(names)}")
        for layer, name in zip(layers[part], names, strict=True):
            left = [layer.names[index] for index in layer.kept]
            if name not in left:
                raise ValueError(f"genotype.{part} must be among {', '.join(left)}, got {name!r}")
            found.append((layer, name))
    return found
