"""A whole model from plain data: detector, backbone, pyramid, and the parts that cards stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from nasdet._checks import check_whole
from nasdet._files import read_json, write_json
from nasdet.arch import Card
from nasdet.detectors import BACKBONES, DETECTORS, TWO_STAGE, parts_of
from nasdet.detectors.build import NeckMaker
from nasdet.detectors.norm import NORMS
from nasdet.spaces import part_of, pieces_of, space_class

PLAIN = "plain"
#: pyramid levels: the last one's stride is larger than any picture, and that of the 61st larger than any integer
MAX_LEVELS = 16
#: part -> the field of a ModelConfig that holds its card
_FIELDS = {
    "towers": "towers",
    "mask_trunk": "mask_trunk",
    "backbone": "backbone_card",
    "detector": "detector_card",
    "body": "backbone",
}


@dataclass(frozen=True)
class ModelConfig:
    """What a run's ``model.json`` holds: enough to build the model again and to load its weights.

    ``backbone``, a name or the JSON of a card that is one, and ``width`` (a multiplier of its channels);
    ``fpn_channels`` and ``levels`` of the pyramid (a backbone that is a pyramid by itself sets the channels);
    ``norm`` of the backbone and ``frozen_stages``; ``categories``, the class names in the order of the labels, and
    their number; ``towers``, ``"plain"`` (``tower_convs`` convolutions each) or the JSON of a card, with
    ``inner_channels`` and ``cells`` in the place of the card's own where given; ``mask_trunk``, the JSON of a card for
    the mask head's convolutions before the deconvolution, likewise; ``backbone_card``, the JSON of a card that
    transforms the backbone; ``detector_card``, the JSON of a card of several parts together; ``short_side`` and
    ``long_side``, the picture size it was trained for, in pixels;
    ``options``, those of the detector's own.
    """

    detector: str = "fcos"
    backbone: str | dict[str, Any] = "resnet50"
    width: float = 1.0
    fpn_channels: int = 256
    levels: int = 5
    norm: str = "frozen_bn"
    frozen_stages: int = 0
    num_classes: int = 80
    categories: tuple[str, ...] = ()
    towers: str | dict[str, Any] = PLAIN
    tower_convs: int = 4
    inner_channels: int | dict[str, int] | None = None
    cells: int | None = None
    backbone_card: dict[str, Any] | None = None
    detector_card: dict[str, Any] | None = None
    mask_trunk: dict[str, Any] | None = None
    short_side: int = 800
    long_side: int = 1333
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, names in (("detector", tuple(DETECTORS)), ("backbone", tuple(BACKBONES)), ("norm", NORMS)):
            value = getattr(self, name)
            if not (name == "backbone" and isinstance(value, Mapping)) and value not in names:
                raise ValueError(f"{name} must be one of {', '.join(names)}, got {value!r}")
        for name in ("fpn_channels", "levels", "num_classes", "tower_convs", "short_side", "long_side"):
            check_whole(name, getattr(self, name))
        if self.levels > MAX_LEVELS:
            raise ValueError(f"levels must be at most {MAX_LEVELS}, got {self.levels}")
        if isinstance(self.frozen_stages, bool) or not isinstance(self.frozen_stages, int) or self.frozen_stages < 0:
            raise ValueError(f"frozen_stages must be a non-negative integer, got {self.frozen_stages!r}")
        if isinstance(self.width, bool) or not isinstance(self.width, (int, float)) or not 0 < self.width < 100:
            raise ValueError(f"width must be a positive number, got {self.width!r}")
        if self.long_side < self.short_side:
            raise ValueError(f"long_side must be at least short_side {self.short_side}, got {self.long_side}")
        if self.cells is not None:
            check_whole("cells", self.cells)
        if isinstance(self.categories, str) or not all(isinstance(name, str) for name in self.categories):
            raise TypeError(f"categories must be a list of names, got {self.categories!r}")
        object.__setattr__(self, "categories", tuple(self.categories))
        if self.categories and len(self.categories) != self.num_classes:
            raise ValueError(f"categories must be {self.num_classes} names (num_classes), got {len(self.categories)}")
        if not isinstance(self.towers, Mapping) and self.towers != PLAIN:
            raise ValueError(f"towers must be {PLAIN!r} or a card's JSON, got {self.towers!r}")
        for part, name in _FIELDS.items():
            named = part in ("towers", "body") and isinstance(getattr(self, name), str)
            if not named and getattr(self, name) is not None:
                object.__setattr__(self, name, self._own_card(part, name).to_json())
        if isinstance(self.backbone, Mapping):
            body = Card.from_json(self.backbone)
            if own := getattr(space_class(body.method), "pyramid_channels", None):
                object.__setattr__(self, "fpn_channels", own(body, self.width))
        if self.detector_card is not None:
            self._check_pieces(Card.from_json(self.detector_card))
        if not isinstance(self.options, Mapping):
            raise TypeError(f"options must be an object, got {type(self.options).__name__}")

    def _own_card(self, part: str, name: str) -> Card:
        """The card of a field, if it stands for that part and the detector has it."""
        card = Card.from_json(getattr(self, name))
        if (found := part_of(card)) != part:
            raise ValueError(f"{name} must be a card of {part}, got {card.name!r} ({card.method}), one of {found}")
        if part not in parts_of(self.detector):
            raise ValueError(f"{name} must be plain for {self.detector}, which has no {part}, got {card.name!r}")
        return card

    def _check_pieces(self, card: Card) -> None:
        """Refuse a card of parts that the detector has not, or that another card stands for, or that do not fit."""
        pieces = pieces_of(card)
        have = ("backbone", "neck", "head" if self.detector in TWO_STAGE else "towers")
        if other := [piece for piece in pieces if piece not in have]:
            raise ValueError(f"detector_card must be of {', '.join(have)} for {self.detector}, got {other[0]}")
        taken = {"backbone": self.backbone, "towers": self.towers}
        if twice := [piece for piece in pieces if isinstance(taken.get(piece), Mapping)]:
            raise ValueError(f"{twice[0]} must have one card, got {card.name!r} as detector_card besides another")
        width = card.settings.get("channels")
        if "neck" not in pieces and {"head", "towers"} & set(pieces) and width != self.fpn_channels:
            raise ValueError(f"fpn_channels must be the {width} of {card.name!r}, got {self.fpn_channels}")

    @property
    def card(self) -> Card | None:
        """What was searched: the card of the towers, or else of the mask trunk, the backbone, the whole; or None."""
        cards = (getattr(self, name) for name in _FIELDS.values())
        return next((Card.from_json(card) for card in cards if isinstance(card, Mapping)), None)

    def to_json(self) -> dict[str, Any]:
        """The configuration as a JSON object."""
        return asdict(self) | {"categories": list(self.categories)}

    @classmethod
    def from_json(cls, value: Any) -> ModelConfig:
        """The configuration of a JSON object; an unknown key is an error."""
        if not isinstance(value, Mapping):
            raise TypeError(f"model must be an object, got {type(value).__name__}")
        known = [item.name for item in fields(cls)]
        if unknown := sorted(set(value) - set(known)):
            raise ValueError(f"model keys must be among {', '.join(known)}, got {', '.join(map(repr, unknown))}")
        return cls(**value)

    def save(self, path: str | Path) -> Path:
        """Write the configuration as JSON, atomically."""
        return write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> ModelConfig:
        """Read a configuration; an error names the file."""
        value = read_json(path)
        try:
            return cls.from_json(value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from error


def searched_fields(card: Card | None) -> dict[str, Any]:
    """The fields of a :class:`ModelConfig` that say what is searched: the card's own part, all others plain."""
    plain: dict[str, Any] = {"towers": PLAIN, "mask_trunk": None, "backbone_card": None, "detector_card": None}
    return plain if card is None else plain | {_FIELDS[part_of(card)]: card.to_json()}


def build_part(config: ModelConfig, part: str, *, backend: str | None = None) -> nn.Module | None:
    """The module of the card for ``"towers"`` or ``"mask_trunk"``; None where the detector's own is plain."""
    value = getattr(config, _FIELDS[part])
    if not isinstance(value, Mapping):
        return None
    card = Card.from_json(value)
    made: nn.Module = space_class(card.method).build(
        card, config.fpn_channels, inner_channels=config.inner_channels, cells=config.cells, backend=backend
    )
    return made


def backbone_name(backbone: str | Mapping[str, Any]) -> str:
    """The name of a configured backbone, or that of its card."""
    return backbone if isinstance(backbone, str) else str(backbone["name"])


def backbone_maker(backbone: str | Mapping[str, Any]) -> str | Callable[..., nn.Module]:
    """What makes a configured backbone: its name, or the space of its card."""
    if isinstance(backbone, str):
        return backbone
    card = Card.from_json(backbone)
    return partial(space_class(card.method).backbone, card)


def piece_makers(config: ModelConfig) -> dict[str, Any]:
    """What makes the parts of ``detector_card``, as options of the makers in :data:`nasdet.detectors.DETECTORS`.

    ``backbone`` and ``neck`` are functions, as is ``box_trunk`` (the head); ``towers`` is a module.
    """
    if config.detector_card is None:
        return {}
    card = Card.from_json(config.detector_card)
    space = space_class(card.method)
    # A frozen norm around layers that nobody has trained normalises nothing.
    build = partial(space.build, card, norm="sync_bn" if config.norm == "frozen_bn" else config.norm)
    return makers_of(pieces_of(card), partial(space.backbone, card), build)


def makers_of(pieces: Sequence[str], backbone: Callable[..., nn.Module], build: Callable[..., Any]) -> dict[str, Any]:
    """What makes these parts of a detector: ``backbone``, and for the others ``build(part, ...)``; towers are made."""
    makers: dict[str, Any] = {}
    if "backbone" in pieces:
        makers["backbone"] = backbone
    if "neck" in pieces:
        makers["neck"] = lambda channels, strides: build("neck", in_channels=channels, strides=strides)
    if "head" in pieces:
        makers["box_trunk"] = partial(build, "head")
    if "towers" in pieces:
        makers["towers"] = build("towers")
    return makers


def build_model(
    config: ModelConfig,
    *,
    towers: nn.Module | None = None,
    mask_trunk: nn.Module | None = None,
    backbone: Callable[..., nn.Module] | None = None,
    neck: NeckMaker | None = None,
    box_trunk: Callable[[], nn.Module] | None = None,
    weights: str | Path | None = None,
    backend: str | None = None,
) -> nn.Module:
    """The detector of a configuration.

    ``towers`` and ``mask_trunk`` stand in the place of the configured ones (a supernet); ``weights`` is a local file
    with the backbone's pretrained weights; ``backend`` chooses the searched parts' backend. Weights are drawn from
    torch's global generator. A card of the backbone takes it over with its weights. ``backbone`` makes one in the place
    of the configured one, called as the makers in :data:`nasdet.detectors.BACKBONES`; ``neck`` and ``box_trunk``
    likewise, called as the detectors' makers do.
    """
    given = {"backbone": backbone, "neck": neck, "box_trunk": box_trunk, "towers": towers}
    makers = piece_makers(config) | {name: value for name, value in given.items() if value is not None}
    body = makers.pop("backbone", None) or backbone_maker(config.backbone)
    if "towers" not in makers and (searched := build_part(config, "towers", backend=backend)) is not None:
        makers["towers"] = searched
    trunk = build_part(config, "mask_trunk", backend=backend) if mask_trunk is None else mask_trunk
    model = DETECTORS[config.detector](
        body,
        config.num_classes,
        width=config.width,
        fpn_channels=config.fpn_channels,
        levels=config.levels,
        tower_convs=config.tower_convs,
        norm=config.norm,
        weights=weights,
        frozen_stages=config.frozen_stages,
        **config.options,
        **makers,
        **({} if trunk is None else {"mask_trunk": trunk}),
    )
    if config.backbone_card is not None:
        card = Card.from_json(config.backbone_card)
        space_class(card.method).build(card, model.get_submodule("backbone"), backend=backend)
    return model
