"""Architecture cards: a searched network as plain data, saved and loaded as JSON. No torch here."""

from __future__ import annotations

from nasdet.arch.card import SCHEMA_VERSION, Card, load_card, published, save_card

__all__ = ["SCHEMA_VERSION", "Card", "load_card", "published", "save_card"]
