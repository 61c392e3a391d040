"""Parameters and multiply-accumulates (MACs) of a model, by part.

MACs are those of convolutions and matrix products, groups counted as such; biases, norms, activations and
interpolation are free. They are seen by torch's own operator-level counter, so a convolution called as a function
counts like a module's, and an op of another library counts once it has a formula
(``torch.utils.flop_counter.register_flop_formula``). Nothing is computed: the model runs on the
meta device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

REST = "rest"


class PartCost(NamedTuple):
    """One part's name, number of parameters, and multiply-accumulates for the inputs given."""

    name: str
    parameters: int
    macs: int


def count(model: nn.Module, *inputs: Any) -> list[PartCost]:
    """Cost of ``model(*inputs)`` by its direct children, in their order, and ``"rest"`` for what belongs to none.

    Use a batch of 1 for the field's convention; tensors among the inputs may be real or on the meta device
    (``torch.empty(1, 3, 800, 1280, device="meta")``). The model is run in evaluation mode on shapes alone, wherever its
    weights are, and left as it was. A module used on five levels counts its MACs five times and its parameters
    once; a parameter shared by two parts belongs to the first. Buffers, so frozen batch norm, are not parameters.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here, because it imports triton

    children = {name: child for name, child in model.named_children() if child is not None}
    macs = dict.fromkeys([*children, REST], 0)
    counter = FlopCounterMode(display=False)
    stack: list[tuple[str, int]] = []

    def enter(name: str) -> Any:
        return lambda module, args: stack.append((name, counter.get_total_flops()))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        name, before = stack.pop()
        if not stack:  # a part called inside another is the outer one's cost
            macs[name] += (counter.get_total_flops() - before) // 2

    hooks = []
    training = [module for module in model.modules() if module.training]
    try:
        for module, name in _owners(children).items():
            hooks += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
        model.eval()
        with torch.no_grad(), counter:
            torch.func.functional_call(model, _shapes(model), tuple(_to_meta(value) for value in inputs))
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    macs[REST] = counter.get_total_flops() // 2 - sum(macs.values())
    return _with_parameters(model, children, macs)


def _owners(children: dict[str, nn.Module]) -> dict[nn.Module, str]:
    """Every module with the part that it belongs to, the first if several: a list's modules are called one by one."""
    owners: dict[nn.Module, str] = {}
    for name, child in children.items():
        for module in child.modules():
            owners.setdefault(module, name)
    return owners


def _with_parameters(model: nn.Module, children: dict[str, nn.Module], macs: dict[str, int]) -> list[PartCost]:
    seen: set[int] = set()
    costs = []
    for name, part in [*children.items(), (REST, model)]:
        own = {id(p): p.numel() for p in part.parameters() if id(p) not in seen}
        seen |= set(own)
        if name != REST or own or macs[name]:
            costs.append(PartCost(name, sum(own.values()), macs[name]))
    return costs


def _shapes(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer as a tensor without memory."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: torch.empty_like(value, device="meta") for name, value in named}


def _to_meta(value: Any) -> Any:
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value


def total(costs: Iterable[PartCost]) -> PartCost:
    """The sum of parts, named ``"total"``."""
    costs = list(costs)
    return PartCost("total", sum(cost.parameters for cost in costs), sum(cost.macs for cost in costs))
