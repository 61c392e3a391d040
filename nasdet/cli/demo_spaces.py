"""What ``nasdet demo`` searches: for each method its model, search and random architecture, and its rivals' names."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nasdet.arch import Card
    from nasdet.data import DataFolder


@dataclass(frozen=True)
class Budget:
    """What every part of the demo gets. The same ``train_steps`` and batch for all three detectors."""

    search_steps: int = 100
    train_steps: int = 600
    batch: int = 8
    search_batch: int = 4
    images: int = 400
    test_images: int = 100
    size: tuple[int, int] = (128, 160)


@dataclass(frozen=True)
class DemoSpace:
    """One method in the demo.

    ``searched``, ``plain`` and ``drawn`` name the three rivals in the table; ``model`` holds the settings of the
    detector; ``search(out, folder, budget, seed)`` gives the card, ``random_card(card, seed)`` one of the same space;
    ``note`` says what the three differ in; ``fields`` asks for the receptive fields of the trained backbones.
    """

    title: str
    searched: str
    plain: str
    drawn: str
    model: dict[str, Any]
    search: Callable[[Path, DataFolder, Budget, int], Card]
    random_card: Callable[[Card, int], Card]
    note: str
    fields: bool = False


_SMALL: dict[str, Any] = {"width": 0.25, "fpn_channels": 32, "levels": 3, "short_side": 128, "long_side": 160}
_FAD_MODEL: dict[str, Any] = {"backbone": "resnet18", **_SMALL}
_NATS_MODEL: dict[str, Any] = {"detector": "fcos", "backbone": "resnet50", **_SMALL}
_LOGGED: dict[str, Any] = {"flip": False, "log_every": 5, "checkpoint_every": 25, "workers": 0}


def _search_fad(out: Path, folder: DataFolder, budget: Budget, seed: int) -> Card:
    from nasdet.engine.search import FADSearchConfig, search_fad

    config = FADSearchConfig(
        steps=budget.search_steps,
        batch=budget.search_batch,
        lr=0.01,
        arch_lr=0.01,
        inner_channels=24,
        retrain_cells=1,
        seed=seed,
        name=f"fad-demo-seed{seed}",
        **_LOGGED,
        **_FAD_MODEL,
    )
    return search_fad(config, folder, out, resume=(out / "checkpoints").exists())


def _random_fad(like: Card, seed: int) -> Card:
    """A random genotype with the searched card's settings."""
    from nasdet.spaces.fad import FADSpace

    return FADSpace("full").random(random.Random(seed), "fad-random", settings=like.settings)


def _search_nats(out: Path, folder: DataFolder, budget: Budget, seed: int) -> Card:
    from nasdet.engine.search_nats import NATSSearchConfig, search_nats

    config = NATSSearchConfig(
        steps=budget.search_steps,
        batch=budget.search_batch,
        clip=20.0,
        arch_lr=0.03,
        tower_convs=4,
        seed=seed,
        name=f"nats-demo-seed{seed}",
        **_LOGGED,
        **_NATS_MODEL,
    )
    return search_nats(config, folder, out, resume=(out / "checkpoints").exists())


def _random_nats(like: Card, seed: int) -> Card:
    """A random dilation for every channel group, in the searched card's space."""
    from nasdet.spaces.nats import NATSSpace

    given = like.settings
    space = NATSSpace(
        given["space"],
        channel_groups=given.get("channel_groups"),
        channels_per_group=given.get("channels_per_group"),
        backbone=given["backbone"],
        width=given["width"],
        index_preserving=given["index_preserving"],
    )
    return space.random(random.Random(seed), "nats-random")


SPACES: dict[str, DemoSpace] = {
    "fad": DemoSpace(
        title="FAD",
        searched="searched towers",
        plain="plain towers",
        drawn="random architecture",
        model=_FAD_MODEL,
        search=_search_fad,
        random_card=_random_fad,
        note="The plain towers have four convolutions each; the others one cell in each of their two groups.",
    ),
    "nats": DemoSpace(
        title="NATS",
        searched="searched backbone",
        plain="original backbone",
        drawn="random dilations",
        model=_NATS_MODEL,
        search=_search_nats,
        random_card=_random_nats,
        note=(
            "The three backbones have the same parameters and multiply-accumulates, and differ in nothing but "
            "dilations. The method's own strength, to keep ImageNet weights, is not seen here."
        ),
        fields=True,
    ),
}
