"""The NATS search space: a backbone's layers, its supernet in place, derivation, random cards, and building."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nasdet._checks import check_whole
from nasdet.arch import Card
from nasdet.detectors import BACKBONES
from nasdet.nn import GroupedDilationConv2d, MixedDilationConv2d
from nasdet.spaces import Retraining, space_class
from nasdet.spaces.nats.genotype import (
    Pair,
    check_genotype,
    choices,
    decode,
    dilation_name,
    genotype_set,
    intensities,
    random_choices,
    runs,
    splits,
    to_pair,
    to_plain,
)
from nasdet.spaces.nats.layers import Layer, Selector, bottleneck_convs, check_own_weights, exchange, find_layers

CHANNEL_GROUPS = 16


class NATSSpace:
    """NATS's search space: a dilation for every group of channels in a backbone's 3x3 bottleneck convolutions.

    Args:
        dilations: ``"A"``, ``"B"`` or ``"C"`` (the paper's sets), or ``{3: [...], 4: [...], 5: [...]}`` by stage.
        channel_groups: N, groups of output channels in every layer, each of which chooses for itself (the paper's
            ablation: 1, 2, 4, 8, 16, 32; 16 when neither is given; 1 is the path-level search).
        channels_per_group: channels of a group in the place of their number: N then differs by stage (the paper: 1, 8,
            16, 32, 64; 32 for ResNet-101 and ResNeXt-101).
        backbone: a name of :data:`nasdet.detectors.BACKBONES`, the JSON of a card that is a backbone, or any network
            with such convolutions.
        width: of a named backbone, as for :class:`nasdet.detectors.ResNet`.
        selector: which convolutions, and of which stage; default :func:`spatial_convs`, which finds the depthwise
            ones of a backbone without bottlenecks (not in the paper).
        index_preserving: derived nets keep each channel group in its place. By default, as in the paper, the groups
            of one dilation stand together, in the order of the set.

    ``layers`` are the layers found. Raises ``ValueError`` where a layer's channels cannot be cut so, or a cut would
    divide a convolution group.
    """

    method = "nats"
    part = "backbone"

    def __init__(
        self,
        dilations: str | Mapping[Any, Sequence[int | Pair]] = "C",
        *,
        channel_groups: int | None = None,
        channels_per_group: int | None = None,
        backbone: str | Mapping[str, Any] | nn.Module = "resnet50",
        width: float = 1.0,
        selector: Selector | None = None,
        index_preserving: bool = False,
    ) -> None:
        if channel_groups is not None and channels_per_group is not None:
            raise ValueError("channel_groups and channels_per_group must not both be given")
        if channel_groups is None and channels_per_group is None:
            channel_groups = CHANNEL_GROUPS
        for name, value in (("channel_groups", channel_groups), ("channels_per_group", channels_per_group)):
            if value is not None:
                check_whole(name, value)
        self.dilations = genotype_set(dilations)
        self.channel_groups, self.channels_per_group = channel_groups, channels_per_group
        self.backbone = None if isinstance(backbone, nn.Module) else backbone
        self.width = width
        self.selector = selector
        self.index_preserving = index_preserving
        with torch.device("meta"):
            network = backbone if isinstance(backbone, nn.Module) else named_backbone(backbone, width)
        self.layers = find_layers(network, selector)
        self._name = dilations if isinstance(dilations, str) else None
        for layer in self.layers:
            if layer.stage not in self.dilations:
                raise ValueError(f"dilations must have stage {layer.stage}, that of {layer.name}")
            self._check_cut(layer)

    def _check_cut(self, layer: Layer) -> None:
        if self.channel_groups is not None and layer.channels % self.channel_groups:
            raise ValueError(
                f"channel_groups must divide the {layer.channels} output channels of {layer.name}, got "
                f"{self.channel_groups}"
            )
        if self.channels_per_group is not None and layer.channels % self.channels_per_group:
            raise ValueError(
                f"channels_per_group must divide the {layer.channels} output channels of {layer.name}, got "
                f"{self.channels_per_group}"
            )
        size = layer.channels // self.groups_of(layer)
        if size % layer.width:
            raise ValueError(
                f"channel groups of {layer.name} must cover whole convolution groups of {layer.width} channels, got "
                f"{size} channels each"
            )

    def groups_of(self, layer: Layer) -> int:
        """N, the channel groups of a layer."""
        return self.channel_groups or layer.channels // (self.channels_per_group or 1)

    def dilations_of(self, layer: Layer) -> tuple[Pair, ...]:
        """The choices of each channel group in a layer."""
        return self.dilations[layer.stage]

    def alpha_count(self) -> int:
        """Architecture parameters: N times the number of dilations, over all layers; 1,232 for ResNet-50, 16 and C."""
        return sum(self.groups_of(layer) * len(self.dilations_of(layer)) for layer in self.layers)

    def size(self) -> int:
        """Different derived networks: in block order a layer's groups are interchangeable."""
        size = 1
        for layer in self.layers:
            groups, count = self.groups_of(layer), len(self.dilations_of(layer))
            size *= count**groups if self.index_preserving else math.comb(groups + count - 1, count - 1)
        return size

    def supernet(self, network: nn.Module | None = None, backend: str | None = None) -> nn.Module:
        """``network`` with its layers searchable, changed in place; by default a fresh backbone of the space's name.

        Each layer becomes a :class:`nasdet.nn.MixedDilationConv2d` with a copy of its weight for every dilation and
        alphas of zero; one with several names has them still. The layers must be the space's own, and their weights no
        other module's; otherwise nothing is changed.
        """
        if network is None:
            if self.backbone is None:
                raise ValueError("network must be given to a space that was made from a network")
            network = named_backbone(self.backbone, self.width)
        if (found := find_layers(network, self.selector)) != self.layers:
            raise ValueError(f"network must have the space's layers, {_summary(self.layers)}, got {_summary(found)}")
        check_own_weights(network, self.layers)
        made: dict[str, nn.Module] = {}
        for layer in self.layers:
            conv = network.get_submodule(layer.name)
            assert isinstance(conv, nn.Conv2d)
            mixed = MixedDilationConv2d.from_conv(conv, self.dilations_of(layer), self.groups_of(layer))
            mixed.backend = backend
            made[layer.name] = mixed
        return exchange(network, made)

    @staticmethod
    def arch_parameters(supernet: nn.Module) -> list[nn.Parameter]:
        """The alphas, ``[N, G]`` for each layer."""
        return [part.alpha for part in supernet.modules() if isinstance(part, MixedDilationConv2d)]

    def alphas(self, supernet: nn.Module) -> dict[str, list[list[float]]]:
        """The raw alphas as plain numbers: per layer one row per channel group."""
        return {name: mixed.alpha.detach().double().cpu().tolist() for name, mixed in self._mixed(supernet).items()}

    def _mixed(self, supernet: nn.Module) -> dict[str, MixedDilationConv2d]:
        """The searchable layers by name; ``ValueError`` for anything but a supernet of this space, such as one inside a
        detector or a wrapper, whose names are others."""
        named = supernet.named_modules(remove_duplicate=False)
        found = {name: part for name, part in named if isinstance(part, MixedDilationConv2d)}
        mixed = {layer.name: found[layer.name] for layer in self.layers if layer.name in found}
        others = [name for name, part in found.items() if part not in mixed.values()]
        if others or len(mixed) < len(self.layers):
            got = f"{type(supernet).__name__} with {repr(others[0]) if others else f'{len(mixed)} of them'}"
            raise ValueError(f"supernet must have the space's layers searchable, {_summary(self.layers)}, got {got}")
        for layer in self.layers:
            ours, part = (self.groups_of(layer), self.dilations_of(layer)), mixed[layer.name]
            if (theirs := (part.channel_groups, part.dilations)) != ours:
                raise ValueError(
                    f"{layer.name} must have the space's channel groups and dilations {ours}, got {theirs}"
                )
        return mixed

    def restrict(self, supernet: nn.Module, genotype: Mapping[str, Any]) -> None:
        """Set the alphas to one architecture: in each channel group its dilation gets weight 1."""
        self._check(genotype)
        searchable = self._mixed(supernet)
        rows = {}
        for name, mixed in searchable.items():
            chosen = torch.tensor(choices(genotype[name], mixed.dilations))
            rows[name] = torch.full(mixed.alpha.shape, -1e4).scatter_(1, chosen[:, None], 0.0)
        with torch.no_grad():
            for name, mixed in searchable.items():
                mixed.alpha.copy_(rows[name])

    def derive(
        self,
        supernet: nn.Module,
        name: str = "nats-searched",
        *,
        settings: Mapping[str, Any] | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> Card:
        """The architecture that the alphas stand for (:func:`nasdet.spaces.nats.decode`)."""
        dilations = {layer.name: self.dilations_of(layer) for layer in self.layers}
        genotype = decode(self.alphas(supernet), dilations, self.index_preserving)
        return self._card(name, genotype, settings or {}, source or {})

    def random(self, rng: random.Random, name: str = "nats-random", settings: Mapping[str, Any] | None = None) -> Card:
        """A uniformly random dilation for every channel group."""
        genotype = {}
        for layer in self.layers:
            chosen = random_choices(rng, self.groups_of(layer), self.dilations_of(layer))
            genotype[layer.name] = runs(chosen if self.index_preserving else sorted(chosen), self.dilations_of(layer))
        return self._card(name, genotype, settings or {}, {"random": True})

    def settings(self) -> dict[str, Any]:
        """What a card records of the space."""
        own = {str(stage): [to_plain(pair) for pair in pairs] for stage, pairs in self.dilations.items()}
        cut = {"channel_groups": self.channel_groups, "channels_per_group": self.channels_per_group}
        named = {"backbone": self.backbone, "width": self.width} if self.backbone else {}
        kept = {key: value for key, value in cut.items() if value is not None}
        return {"space": self._name or own, **kept, "index_preserving": self.index_preserving, **named}

    def _card(self, name: str, genotype: Any, settings: Mapping[str, Any], source: Mapping[str, Any]) -> Card:
        card = Card(self.method, name, genotype, {**self.settings(), **settings}, dict(source))
        self.check(card)
        return card

    def check(self, card: Card) -> None:
        """Raise ``ValueError`` unless the card is an architecture of this very space."""
        _check_method(card)
        try:
            self._check(card.genotype)
        except ValueError as error:
            raise ValueError(f"{card.name}: {error}") from error

    def _check(self, genotype: Any) -> None:
        names = check_genotype(genotype)
        if set(names) != {layer.name for layer in self.layers}:
            other = sorted(set(names) ^ {layer.name for layer in self.layers})
            raise ValueError(f"genotype must have the layers of the space, {_summary(self.layers)}, got {other[0]!r}")
        for layer in self.layers:
            groups = sum(count for _, count in genotype[layer.name])
            if groups != self.groups_of(layer):
                raise ValueError(f"genotype.{layer.name} counts must sum to {self.groups_of(layer)}, got {groups}")
            for dilation, _ in genotype[layer.name]:
                if to_pair(dilation) not in self.dilations_of(layer):
                    known = ", ".join(map(dilation_name, self.dilations_of(layer)))
                    raise ValueError(f"genotype.{layer.name} dilation must be one of {known}, got {dilation}")

    @staticmethod
    def build(
        card: Card, network: nn.Module | None = None, *, prefix: str = "", backend: str | None = None
    ) -> nn.Module:
        """The derived network of a NATS card: ``network``, changed in place, or a fresh backbone of the card's name.

        Each layer becomes a :class:`nasdet.nn.GroupedDilationConv2d` on the very parameters that it had, so names,
        number and multiply-accumulates of the network stay, and weights trained for the original load as they are.
        ``prefix`` is where the card's layers lie in ``network``, such as ``"backbone.body."``. A convolution with
        several names has them still.

        Raises ``ValueError`` or ``TypeError`` for a network without these layers, one whose channels cannot be cut so,
        or a deeper one than the card's backbone; nothing is changed then.
        """
        _check_method(card)
        check_genotype(card.genotype)
        if network is None:
            if (body := card.settings.get("backbone")) is None:
                raise ValueError(f"{card.name}: network must be given, as the card names no backbone")
            network = named_backbone(body, card.settings.get("width", 1.0))
        stages = dict.fromkeys((prefix + name for name in card.genotype), 3)
        try:
            _check_depth(card, network, prefix)
            layers = {layer.name: layer for layer in find_layers(network, lambda _: stages)}
            made: dict[str, nn.Module] = {}
            for name, entries in card.genotype.items():
                layer = layers[prefix + name]
                conv = network.get_submodule(layer.name)
                assert isinstance(conv, nn.Conv2d)
                sizes = splits(layer.name, entries, layer.channels, layer.width)
                grouped = GroupedDilationConv2d.from_conv(conv, [to_pair(d) for d, _ in entries], sizes)
                grouped.backend = backend
                made[layer.name] = grouped
        except (TypeError, ValueError) as error:
            raise type(error)(f"{card.name}: {error}") from error
        return exchange(network, made)

    @staticmethod
    def retraining(detector: str) -> Retraining:
        """As published (section 4.2): 13 epochs at 0.00125 per image, a tenth of it after 8 and again after 11, with a
        warm-up, of which the paper says no more: linear, 500 steps. One-stage detectors have half the rate, as usual;
        steps of 16 images are ours."""
        from nasdet.detectors import TWO_STAGE

        training = {
            "batch": 16,
            "reference_lr": 0.02 if detector in TWO_STAGE else 0.01,
            "milestones": (8 / 13, 11 / 13),
            "warmup": "linear",
            "warmup_steps": None,
        }
        return Retraining({}, training, epochs=13)

    @staticmethod
    def describe(card: Card) -> list[str]:
        """A line for each layer: its dilations with their intensities."""
        lines = []
        for name, entries in card.genotype.items():
            shares = intensities(entries)
            lines.append(f"{name}: " + ", ".join(f"{dilation_name(d)} {share:.0%}" for d, share in shares.items()))
        return lines


def named_backbone(name: str | Mapping[str, Any], width: float = 1.0) -> nn.Module:
    """A fresh backbone of :data:`nasdet.detectors.BACKBONES`, or that of a card's JSON."""
    if isinstance(name, Mapping):
        body = Card.from_json(name)
        own: nn.Module = space_class(body.method).backbone(body, width=width)
        return own
    if name not in BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {name!r}")
    made: nn.Module = BACKBONES[name](width=width)
    return made


def _check_method(card: Card) -> None:
    if card.method != NATSSpace.method:
        raise ValueError(f"{card.name}: method must be 'nats', got {card.method!r}")


def _check_depth(card: Card, network: nn.Module, prefix: str) -> None:
    """Raise ``ValueError`` where a card's layers are not all in a network, or beside them stand others that the card's
    backbone lacks: a shallower net's names are all in a deeper one."""
    held = dict(network.named_modules(remove_duplicate=False))
    if missing := [name for name in card.genotype if prefix + name not in held]:
        where = f"prefix {prefix!r}" if prefix else "no prefix, which says where they lie in a larger one"
        got = f"a {type(network).__name__} without, and {where}"
        raise ValueError(f"network must have the card's layer {missing[0]}, got {got}")
    if (body := card.settings.get("backbone")) is None:
        return
    stacks = {_stack(name) for name in card.genotype}
    inside = [name.removeprefix(prefix) for name in bottleneck_convs(network) if name.startswith(prefix)]
    if more := [name for name in inside if name not in card.genotype and _stack(name) in stacks]:
        own = body if isinstance(body, str) else body["name"]
        with torch.device("meta"):
            known = bottleneck_convs(named_backbone(body, card.settings.get("width", 1.0)))
        if other := [name for name in more if name not in known]:
            raise ValueError(f"network must be the card's {own}, got one that has {other[0]} as well")


def _stack(name: str) -> str:
    """Of a block's convolution: what the block is in."""
    return name.rsplit(".", 2)[0]


def _summary(layers: Sequence[Layer]) -> str:
    first, last = layers[0], layers[-1]
    return f"{len(layers)} from {first.name} ({first.channels} channels) to {last.name} ({last.channels})"
