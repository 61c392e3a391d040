"""The FAD search space: size, supernet, derivation, random architectures, and building a card."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nasdet._checks import check_whole
from nasdet.arch import Card
from nasdet.spaces.fad.blocks import RepShareBlock, UnsharedBlock
from nasdet.spaces.fad.cells import CellGroup, Edge, FADStack, FADTower
from nasdet.spaces.fad.genotype import (
    DARTS,
    DETECTION_GROUPS,
    EDGES,
    EDGES_PER_NODE,
    INPUTS,
    NODES,
    NONE,
    SUBSETS,
    check_genotype,
    decode,
    one_hot,
    random_genotype,
)
from nasdet.spaces.fad.transformations import set_backend, transformation

CHANNELS = 256
INNER_CHANNELS = 96
SEARCH_CELLS = 1
RETRAIN_CELLS = 2

#: part of a detector -> the groups of cells that stand for it
PARTS: dict[str, tuple[str, ...]] = {"towers": DETECTION_GROUPS, "mask_trunk": ("mask",)}


class FADSupernet(nn.Module):
    """FAD's searchable module: all 9 edges of each cell, all transformations of each edge, mixed by ``softmax(alpha)``.

    ``alphas[group]`` is ``[9, P + 1]``: edges in the order of :data:`EDGES`, transformations in the order of
    ``transformations``, ``none`` last; drawn as 1e-3 * N(0, 1). It serves where the derived module does: with two
    groups as a tower, with one as a stack.
    """

    def __init__(self, body: FADTower | FADStack, transformations: Sequence[str], groups: Sequence[str]) -> None:
        super().__init__()
        self.body = body
        self.transformations = tuple(transformations)
        shape = (len(EDGES), len(transformations) + 1)
        self.alphas = nn.ParameterDict({group: nn.Parameter(1e-3 * torch.randn(shape)) for group in groups})
        if isinstance(body, FADTower):
            self.box_channels, self.cls_channels = body.box_channels, body.cls_channels
        else:
            self.out_channels = body.out_channels

    def forward(self, x: Tensor) -> Any:
        """``[N, C, H, W]`` to ``(box_feature, cls_feature)``, or to one feature with one group."""
        return self.body(x, {group: alpha.softmax(dim=-1) for group, alpha in self.alphas.items()})

    def restrict(self, genotype: Mapping[str, Any]) -> None:
        """Set the alphas to one architecture: its choices get weight 1, ``none`` the dropped edges."""
        check_genotype(genotype, self.transformations)
        rows = one_hot(genotype, self.transformations)
        if set(rows) != set(self.alphas):
            raise ValueError(f"genotype groups must be {', '.join(self.alphas)}, got {', '.join(rows)}")
        with torch.no_grad():
            for group, alpha in self.alphas.items():
                alpha.copy_(torch.tensor(rows[group], dtype=alpha.dtype))


class FADSpace:
    """FAD's search space.

    Args:
        subset: the transformations: ``"full"``, ``"subset1"``, ``"subset2"``, ``"sep"``, ``"std"``, ``"darts"`` or
            ``"released"``.
        repshare: share representations at search time (12 of them instead of 26 in the full set). None: yes, but for
            ``"darts"``, whose operations share nothing.
        decouple: H between a shared representation and the transformation that is that representation.
        released_h: H as in the released code, without ReLU.
        groups: ``("box", "cls")`` for a detector's towers, or one name for a single stack (``("mask",)``).
    """

    method = "fad"

    def __init__(
        self,
        subset: str = "full",
        *,
        repshare: bool | None = None,
        decouple: bool = True,
        released_h: bool = False,
        groups: Sequence[str] = DETECTION_GROUPS,
    ) -> None:
        if subset not in SUBSETS:
            raise ValueError(f"subset must be one of {', '.join(SUBSETS)}, got {subset!r}")
        if repshare and subset == "darts":
            raise ValueError(
                "repshare must be off for subset 'darts', whose operations share no representation, got True"
            )
        groups = tuple(groups)
        if len(groups) != 1 and groups != DETECTION_GROUPS:
            raise ValueError(f"groups must be ('box', 'cls') or one name, got {groups!r}")
        self.subset = subset
        self.transformations = SUBSETS[subset]
        self.repshare = subset != "darts" if repshare is None else repshare
        self.decouple = decouple
        self.released_h = released_h
        self.groups = groups

    @staticmethod
    def part(card: Card) -> str:
        """The part of a detector that a card stands for: two groups the towers, one the mask trunk."""
        return "mask_trunk" if isinstance(card.genotype, Mapping) and len(card.genotype) == 1 else "towers"

    def size(self) -> int:
        """Architectures as the paper counts them: choices (with ``none``) to the power of the kept edges, 13^12 =
        2.3e13 in full."""
        return (len(self.transformations) + 1) ** (EDGES_PER_NODE * NODES * len(self.groups))

    def supernet(
        self,
        in_channels: int = CHANNELS,
        inner_channels: int | Mapping[str, int] = INNER_CHANNELS,
        cells: int = SEARCH_CELLS,
        backend: str | None = None,
    ) -> FADSupernet:
        """The searchable module for features of ``in_channels``; the paper searches with one cell a group.

        ``inner_channels``: c', one number or one per group; ``backend``: of every mixing op (None: the best at each
        call).
        """
        in_channels, inner = _width("in_channels", in_channels), _per_group(inner_channels, self.groups)

        def edges(group: str) -> dict[tuple[int, int], nn.Module]:
            return {edge: Edge(in_channels, inner[group], self._block(inner[group]), bias=False) for edge in EDGES}

        bodies = {group: CellGroup(in_channels, cells, partial(edges, group)) for group in self.groups}
        net = FADSupernet(_assemble(bodies), self.transformations, self.groups)
        set_backend(net, backend)
        return net

    def _block(self, channels: int) -> nn.Module:
        if self.repshare:
            return RepShareBlock(channels, self.transformations, decouple=self.decouple, released=self.released_h)
        return UnsharedBlock(channels, self.transformations)

    @staticmethod
    def arch_parameters(supernet: FADSupernet) -> list[nn.Parameter]:
        """The alphas, one parameter per group."""
        return list(supernet.alphas.values())

    @staticmethod
    def alphas(supernet: FADSupernet) -> dict[str, list[list[float]]]:
        """The raw alphas as plain numbers: per group one row per edge, ``none`` last."""
        return {group: alpha.detach().double().cpu().tolist() for group, alpha in supernet.alphas.items()}

    def derive(
        self,
        supernet: FADSupernet,
        name: str = "fad-searched",
        *,
        score: str = "softmax",
        settings: Mapping[str, Any] | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> Card:
        """The architecture the alphas stand for (:func:`decode`). ``settings`` default to the supernet's widths and
        two cells."""
        genotype = decode(self.alphas(supernet), supernet.transformations, score)
        return self._card(name, genotype, _sizes(supernet) | dict(settings or {}), source or {})

    def random(self, rng: random.Random, name: str = "fad-random", settings: Mapping[str, Any] | None = None) -> Card:
        """A uniformly random architecture, the paper's "random" row."""
        sizes = {"channels": CHANNELS, "inner_channels": INNER_CHANNELS, "cells": RETRAIN_CELLS} | dict(settings or {})
        return self._card(name, random_genotype(rng, self.transformations, self.groups), sizes, {"random": True})

    def _card(self, name: str, genotype: Any, settings: Mapping[str, Any], source: Mapping[str, Any]) -> Card:
        card = Card(self.method, name, genotype, {**settings, "space": self.subset}, dict(source))
        self.check(card)
        return card

    def check(self, card: Card) -> None:
        """Raise ``ValueError`` unless the card is an architecture of this very space (its subset and its groups)."""
        groups = _check_method(card, self.transformations)
        if groups != self.groups:
            raise ValueError(f"{card.name}: groups must be {', '.join(self.groups)}, got {', '.join(groups)}")

    @staticmethod
    def build(
        card: Card,
        in_channels: int | None = None,
        inner_channels: int | Mapping[str, int] | None = None,
        cells: int | None = None,
        backend: str | None = None,
    ) -> FADTower | FADStack:
        """The derived, unshared module of any FAD card; what is None comes from the card's settings (else 256, 96 and
        2 cells).

        At the published settings the published net has 4,169,498 parameters and 4,143,360 multiply-accumulates per
        location, with FCOS's predictors for 80 classes.
        """
        groups = _check_method(card, (*SUBSETS["full"], *DARTS))
        settings = card.settings
        channels = _width("in_channels", settings.get("channels", CHANNELS) if in_channels is None else in_channels)
        inner = _per_group(
            settings.get("inner_channels", INNER_CHANNELS) if inner_channels is None else inner_channels, groups
        )
        repeat = settings.get("cells", RETRAIN_CELLS) if cells is None else cells

        def edges(group: str) -> dict[tuple[int, int], nn.Module]:
            return {
                (source, INPUTS + index): Edge(channels, inner[group], transformation(name, inner[group]), bias=True)
                for index, node in enumerate(card.genotype[group])
                for name, source in node
            }

        net = _assemble({group: CellGroup(channels, repeat, partial(edges, group)) for group in groups})
        set_backend(net, backend)
        return net

    @staticmethod
    def describe(card: Card) -> list[str]:
        """A line for each node: the sum of its edges."""
        return [
            f"{group} node {INPUTS + index} = " + " + ".join(f"{name}({source})" for name, source in edges)
            for group, nodes in card.genotype.items()
            for index, edges in enumerate(nodes)
        ]


def _assemble(groups: Mapping[str, CellGroup]) -> FADTower | FADStack:
    if tuple(groups) == DETECTION_GROUPS:
        return FADTower(groups["box"], groups["cls"])
    (name,) = groups
    return FADStack(name, groups[name])


def _check_method(card: Card, transformations: Sequence[str]) -> tuple[str, ...]:
    if card.method != FADSpace.method:
        raise ValueError(f"{card.name}: method must be 'fad', got {card.method!r}")
    try:
        return check_genotype(card.genotype, transformations)
    except ValueError as error:
        raise ValueError(f"{card.name}: {error}") from error


def _width(name: str, value: Any) -> int:
    return check_whole(name, value)


def _per_group(inner_channels: int | Mapping[str, int], groups: Sequence[str]) -> dict[str, int]:
    given = inner_channels if isinstance(inner_channels, Mapping) else dict.fromkeys(groups, inner_channels)
    if set(given) != set(groups):
        raise ValueError(f"inner_channels must have the groups {', '.join(groups)}, got {', '.join(given)}")
    return {group: _width(f"inner_channels of {group}", given[group]) for group in groups}


def _sizes(supernet: FADSupernet) -> dict[str, Any]:
    body = supernet.body
    groups = {"box": body.box, "cls": body.cls} if isinstance(body, FADTower) else {body.name: body.group}
    inner = {
        name: next(m.squeeze.out_channels for m in group.modules() if isinstance(m, Edge))
        for name, group in groups.items()
    }
    widths = set(inner.values())
    return {
        "channels": next(iter(groups.values())).channels,
        "inner_channels": widths.pop() if len(widths) == 1 else inner,
        "cells": RETRAIN_CELLS,
    }


__all__ = ["NONE", "FADSpace", "FADSupernet"]
