"""The architecture card: what a search found, as plain data that any later version can read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from nasdet._files import read_json, write_json

SCHEMA_VERSION = 1
_PUBLISHED = Path(__file__).parent / "published"
_METHOD = re.compile(r"[a-z][a-z0-9_]*")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Card:
    """One architecture.

    ``method`` names the search space that can build it (``"fad"``), ``genotype`` is the choice itself in that space's
    own plain-data form, ``settings`` are the sizes it was published or searched with (``channels``,
    ``inner_channels``, ``cells``, ...), and ``source`` says where it comes from (a paper and figure, or a run). All
    three are JSON data; tuples become lists. A card does not check that its genotype is legal: the search space does
    (``FADSpace.check``).

    Raises ``ValueError`` or ``TypeError`` that names the field, what it must be, and what it was.
    """

    method: str
    name: str
    genotype: Any
    settings: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if isinstance(self.schema_version, bool) or self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema_version must be {SCHEMA_VERSION}, got {self.schema_version!r}")
        if not isinstance(self.method, str) or not _METHOD.fullmatch(self.method):
            raise ValueError(f"method must be a lower-case word such as 'fad', got {self.method!r}")
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(f"name must be letters, digits, '.', '_', '+' or '-', got {self.name!r}")
        if not isinstance(self.genotype, (Mapping, list, tuple)) or not self.genotype:
            raise ValueError(f"genotype must be a non-empty object or list, got {self.genotype!r}")
        for key in ("settings", "source"):
            if not isinstance(getattr(self, key), Mapping):
                raise TypeError(f"{key} must be an object, got {type(getattr(self, key)).__name__}")
        for key in ("genotype", "settings", "source"):
            object.__setattr__(self, key, _plain(getattr(self, key), key))

    @property
    def key(self) -> str:
        """A fingerprint of the architecture alone: equal for two cards that build the same network at the same
        settings."""
        text = json.dumps([self.method, self.genotype, self.settings], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """The card as a JSON object; a fresh copy."""
        first = {"schema_version": self.schema_version, "method": self.method, "name": self.name}
        return first | {key: _plain(getattr(self, key), key) for key in ("genotype", "settings", "source")}

    @classmethod
    def from_json(cls, value: Any) -> Card:
        """The card of a JSON object. Unknown and missing keys are errors, so that a misspelt key is never silently
        dropped."""
        if not isinstance(value, Mapping):
            raise TypeError(f"card must be an object, got {type(value).__name__}")
        known = [item.name for item in fields(cls)]
        if unknown := sorted(set(value) - set(known)):
            raise ValueError(f"card keys must be among {', '.join(sorted(known))}, got {', '.join(map(repr, unknown))}")
        if missing := [key for key in ("schema_version", "method", "name", "genotype") if key not in value]:
            raise ValueError(f"card must have the key {missing[0]!r}, got only {', '.join(sorted(value)) or 'nothing'}")
        return cls(**value)


def _plain(value: Any, where: str) -> Any:
    """``value`` as JSON would give it back; an error that names the place for anything JSON cannot hold."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} keys must be strings, got {key!r}")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError(f"{where} must be finite, got {value}")
        return value
    raise TypeError(
        f"{where} must be plain data (object, list, string, number, true, false, null), got {type(value).__name__}"
    )


def published() -> dict[str, Path]:
    """The published architectures that ship with the library: file by name."""
    return {path.stem: path for path in sorted(_PUBLISHED.glob("*.json"))}


def load_card(path_or_name: str | Path) -> Card:
    """Read a card from a JSON file, or a published one by name (``"fad-paper"``).

    A bare word is a published name; anything with a slash or the ending ``.json`` is a file. Raises ``ValueError``
    that names the file for malformed content, and lists the published names when there is no such card.
    """
    text = str(path_or_name)
    nets = published()
    path = nets[text] if isinstance(path_or_name, str) and text in nets else Path(path_or_name)
    if not path.is_file():
        raise ValueError(f"card must be a JSON file or one of {', '.join(nets)}, got {text!r}")
    try:
        return Card.from_json(read_json(path))
    except (TypeError, ValueError) as error:
        if str(error).startswith(f"{path}:"):
            raise
        raise type(error)(f"{path}: {error}") from error


def save_card(card: Card, path: str | Path) -> Path:
    """Write a card as JSON, atomically; returns the path."""
    if not isinstance(card, Card):
        raise TypeError(f"card must be a Card, got {type(card).__name__}")
    return write_json(path, card.to_json())
