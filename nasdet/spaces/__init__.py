"""Search spaces by name. A space makes supernets, derives and draws cards, and builds them.

One more space is one more folder here and one more line in :data:`SPACES`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nasdet.arch import Card

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

    ``"towers"`` (the default), ``"mask_trunk"``, ``"backbone"`` (which it transforms) or ``"body"`` (it is the
    backbone). A space says it as ``part``: one name for all its cards, or a function of the card.
    """
    part = getattr(space_class(card.method), "part", "towers")
    return str(part(card) if callable(part) else part)
