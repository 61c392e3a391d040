"""Search spaces by name. A space makes supernets, derives and draws cards, and builds them.

One more space is one more folder here and one more line in :data:`SPACES`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from nasdet.arch import Card

Block = tuple[str, Callable[[], Any], tuple[int, ...]]
"""What is timed as one: a key, what makes the module, and the shape of its input."""


class Retraining(NamedTuple):
    """How a paper retrains what its search found, as far as that differs from the defaults of a detector.

    ``model`` has fields of a ``ModelConfig``, ``training`` of a ``TrainConfig``. Where the paper counts ``epochs``, the
    first of them is the warm-up unless ``training`` has ``warmup_steps``.
    """

    model: dict[str, Any] = {}
    training: dict[str, Any] = {}
    epochs: int | None = None


# Loaded on demand: a card of one method needs no other method's modules.
SPACES: dict[str, str] = {
    "detnas": "nasdet.spaces.detnas:DetNASSpace",
    "fad": "nasdet.spaces.fad:FADSpace",
    "hit": "nasdet.spaces.hit:HitSpace",
    "msnas": "nasdet.spaces.msnas:MSNASSpace",
    "nats": "nasdet.spaces.nats:NATSSpace",
}


def space_class(method: str) -> Any:
    """The class of a search space by its method's name, such as ``FADSpace`` by ``"fad"``."""
    if method not in SPACES:
        raise ValueError(f"method must be one of {', '.join(SPACES)}, got {method!r}")
    module, name = SPACES[method].split(":")
    return getattr(import_module(module), name)


def part_of(card: Card) -> str:
    """The part of a detector that a card stands for.

    ``"towers"`` (the default), ``"mask_trunk"``, ``"backbone"`` (which it transforms), ``"body"`` (it is the
    backbone) or ``"detector"`` (backbone, neck, and head or towers, or some of them). A space says it as ``part``: one
    name for all its cards, or a function of the card.
    """
    part = getattr(space_class(card.method), "part", "towers")
    return str(part(card) if callable(part) else part)


def pieces_of(card: Card) -> tuple[str, ...]:
    """The parts of a detector that a card of ``"detector"`` stands for, such as backbone, neck and head; else none."""
    return tuple(space_class(card.method).pieces(card)) if part_of(card) == "detector" else ()


def is_backbone(card: Card) -> bool:
    """Whether a card is a backbone by itself, alone or with other parts."""
    return part_of(card) == "body" or "backbone" in pieces_of(card)


def usual_detector(card: Card | None) -> str:
    """The detector that a card is built into where nobody says another: one that has its parts, for backbones that of
    their papers."""
    part = "towers" if card is None else part_of(card)
    if card is not None and part == "detector":
        return "retinanet" if "towers" in pieces_of(card) else "faster_rcnn"
    return {"mask_trunk": "mask_rcnn", "body": "faster_rcnn", "backbone": "faster_rcnn"}.get(part, "fcos")


def retraining(card: Card | None, detector: str) -> Retraining:
    """How a card is retrained in a detector, by the ``retraining(detector)`` of its space; nothing where it has none.

    What is given, presets, and the ``model.json`` of the search beside the card go before.
    """
    recipe: Callable[[str], Retraining] | None = None
    if card is not None:
        recipe = getattr(space_class(card.method), "retraining", None)
    return Retraining() if recipe is None else recipe(detector)
