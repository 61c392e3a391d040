"""Weights in torchvision's format: of backbones from a local file, of whole detectors from a state dict."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nasdet._files import first_line, read_json

#: in the folder of a run of ``nasdet pretrain``: the weights, and what learnt them
PRETRAINED, DESCRIPTION = "weights.pt", "classifier.json"


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from a ``.pth`` / ``.pt`` (a state dict; no pickled code is run) or ``.safetensors`` file.

    ``FileNotFoundError`` for no such file; ``ValueError`` naming the file for anything that is not whole tensors by
    name. Nothing is downloaded.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weight file")
    suffix = path.suffix.lower()
    if suffix not in (".pth", ".pt", ".safetensors"):
        raise ValueError(f"{path}: weight file must end in .pth, .pt or .safetensors, got {suffix or 'no ending'!r}")
    state = _read_safetensors(path) if suffix == ".safetensors" else _read_torch(path)
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: weight file must hold tensors by name (a state dict), got {_describe(state)}")
    return {str(name): value for name, value in state.items()}


def _read_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable weight file: {first_line(error)}") from error


def _read_safetensors(path: Path) -> object:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"{path}: reading .safetensors needs the safetensors package") from error
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a readable weight file: {first_line(error)}") from error


def _describe(state: object) -> str:
    if isinstance(state, dict):
        kinds = sorted({type(value).__name__ for value in state.values() if not isinstance(value, Tensor)})
        return f"a dict with values of type {', '.join(kinds)}" if kinds else "an empty dict"
    return type(state).__name__


def _some(items: Iterable[str], most: int = 5) -> str:
    items = list(items)
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest


def load_backbone_weights(module: nn.Module, path: str | Path, unused: Sequence[str] | None = None) -> None:
    """Fill ``module`` from a local weight file whose names are the module's own (torchvision's for our backbones).

    Names that start with an entry of ``unused`` are passed over; by default the module's own ``unused_weights``, or
    the classifier ``fc.``. Batch norm's counter ``num_batches_tracked`` may be absent, as in old files, or there
    without a place, as for frozen batch norm. Any other difference in names or shapes, and any value that is not
    finite, is one ``ValueError`` that lists them all; then nothing has been loaded. Nor is anything where
    :func:`check_pretrained` finds that another network has learnt them.
    """
    check_pretrained(module, path)
    if unused is None:
        unused = getattr(module, "unused_weights", ("fc.",))
    given = {k: v for k, v in read_weights(path).items() if not k.startswith(tuple(unused))}
    _fit(module, given, f"{path}: ")


def check_pretrained(module: nn.Module, path: str | Path) -> None:
    """Refuse weights of a run of ``nasdet pretrain`` that trained another network, which names and shapes do not tell:
    one with another ``shuffle`` of channels, or an encoder of another genotype. Files of other origin pass.

    Raises ``ValueError``, which names the weights and the run's description.
    """
    file = Path(path).parent / DESCRIPTION
    if Path(path).name != PRETRAINED or not file.is_file():
        return
    told = read_json(file)
    if not isinstance(told, Mapping) or not {"space", "card"} & set(told):
        return
    card = told.get("card", {})
    theirs = {**told, **card.get("settings", {})}.get("shuffle", "even_odd")  # the default goes unsaid
    shuffles = (getattr(block, "shuffle", None) for block in module.modules())
    ours = next((shuffle for shuffle in shuffles if isinstance(shuffle, str)), theirs)
    if ours != theirs:
        kind = type(module).__name__
        same = f"{theirs!r}, as the weights learnt it ({file})"
        raise ValueError(f"{path}: shuffle of {kind} must be {same}, got {ours!r}")
    if card and getattr(module, "genotype", card["genotype"]) != card["genotype"]:
        raise ValueError(f"{path}: weights must be those of the same genotype, got those of {card['name']} ({file})")


def _fit(module: nn.Module, given: Mapping[str, Tensor], source: str = "") -> None:
    """Load ``given`` into ``module``, or raise one error on all that does not fit."""
    wanted = module.state_dict()
    counter = "num_batches_tracked"
    missing = [key for key in wanted if key not in given and not key.endswith(counter)]
    unexpected = [key for key in given if key not in wanted and not key.endswith(counter)]
    common = [key for key in wanted if key in given]
    shapes = [
        f"{key} {tuple(given[key].shape)} for {tuple(wanted[key].shape)}"
        for key in common
        if given[key].shape != wanted[key].shape
    ]
    infinite = [key for key in common if given[key].is_floating_point() and not given[key].isfinite().all()]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": shapes, "not finite": infinite}
    if any(faults.values()):
        text = "; ".join(f"{len(keys)} {what}: {_some(keys)}" for what, keys in faults.items() if keys)
        raise ValueError(f"{source}weights do not fit {type(module).__name__}: {text}")
    module.load_state_dict({key: given.get(key, wanted[key]) for key in wanted})


def _scaled(prefix: str, into: int, by: int = 1) -> Callable[[re.Match[str]], str]:
    """Numbers the layers of an ``nn.Sequential`` anew: layer k becomes ``into * (k // by) + k % by``."""
    return lambda found: f"{prefix}.{into * (int(found[1]) // by) + int(found[1]) % by}."


# torchvision's names -> ours. Files of older versions have one level less in some names.
_PYRAMID: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"backbone\.body\.", "backbone."),
    (r"backbone\.fpn\.inner_blocks\.(\d+)\.(?:0\.)?", r"neck.lateral.\1."),
    (r"backbone\.fpn\.layer_blocks\.(\d+)\.(?:0\.)?", r"neck.output.\1."),
    (r"backbone\.fpn\.extra_blocks\.p6\.", "neck.extra.0."),
    (r"backbone\.fpn\.extra_blocks\.p7\.", "neck.extra.1."),
]
_TWO_STAGE = [
    *_PYRAMID,
    (r"rpn\.head\.conv\.(?:0\.0\.)?", "rpn.conv."),
    (r"rpn\.head\.bbox_pred\.", "rpn.box_pred."),
    (r"rpn\.head\.", "rpn."),
    (r"roi_heads\.box_head\.fc6\.", "boxes.head.trunk.fcs.0."),
    (r"roi_heads\.box_head\.fc7\.", "boxes.head.trunk.fcs.1."),
    (r"roi_heads\.box_predictor\.bbox_pred\.", "boxes.head.box_pred."),
    (r"roi_heads\.box_predictor\.", "boxes.head."),
    (r"roi_heads\.mask_head\.(\d)\.0\.", _scaled("masks.head.trunk.convs", into=2)),
    (
        r"roi_heads\.mask_head\.mask_fcn(\d)\.",
        lambda found: f"masks.head.trunk.convs.{2 * (int(found[1]) - 1)}.",
    ),
    (r"roi_heads\.mask_predictor\.conv5_mask\.", "masks.head.deconv."),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.", "masks.head.logits."),
]
_RETINANET = [
    *_PYRAMID,
    (r"head\.classification_head\.conv\.(\d)\.0\.", _scaled("towers.cls", into=2)),
    (r"head\.regression_head\.conv\.(\d)\.0\.", _scaled("towers.box", into=2)),
    (r"head\.classification_head\.conv\.", "towers.cls."),
    (r"head\.regression_head\.conv\.", "towers.box."),
    (r"head\.classification_head\.", ""),
    (r"head\.regression_head\.bbox_reg\.", "box_pred."),
]
_FCOS = [
    *_PYRAMID,
    (r"head\.classification_head\.conv\.(\d+)\.", _scaled("towers.cls", into=2, by=3)),
    (r"head\.regression_head\.conv\.(\d+)\.", _scaled("towers.box", into=2, by=3)),
    (r"head\.classification_head\.", "head."),
    (r"head\.regression_head\.bbox_reg\.", "head.box_pred."),
    (r"head\.regression_head\.bbox_ctrness\.", "head.centerness."),
]


def load_torchvision_detector(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill a detector with the state dict of torchvision's ``fasterrcnn_``, ``maskrcnn_``, ``retinanet_`` or ``fcos_``
    ``resnet*_fpn``, of any version of its format.

    ``model`` is of the same architecture: for K + 1 outputs of torchvision's two-stage detectors, whose first is the
    background, it has K classes; its one-stage detectors have no background. FCOS's scales per level, which
    torchvision's has not, become 1. Raises ValueError, and loads nothing, where a name is missing or left over, or a
    shape or value does not fit. :func:`nasdet.detectors.from_torchvision` also builds the model.
    """
    if "head.regression_head.bbox_ctrness.weight" in state:
        names = _FCOS
    else:
        names = _RETINANET if any(key.startswith("head.") for key in state) else _TWO_STAGE
    given = {_renamed(key, names): value for key, value in state.items()}
    if names is _FCOS:
        given |= {key: torch.ones(()) for key in model.state_dict() if key.startswith("head.scales.")}
    _fit(model, given)


def _renamed(key: str, names: Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]) -> str:
    for pattern, ours in names:
        if re.match(pattern, key):
            return re.sub(f"^{pattern}", ours, key)
    return key
