"""A trained detector as a file that needs no nasdet: a ``torch.export`` program or an ONNX model, checked."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nasdet import __version__, use_backend
from nasdet._files import write_atomic
from nasdet.data.transforms import IMAGENET_MEAN, IMAGENET_STD, padded
from nasdet.detectors import FasterRCNN
from nasdet.detectors.parts.postprocess import Selection
from nasdet.detectors.static import StaticDetector
from nasdet.spaces.assemble import ModelConfig

INPUTS = ("images", "sizes", "threshold")
PLAIN = ("aten", "_operator", "higher_order")  # where the operators of a program may come from
Run = Callable[[Tensor, Tensor, Tensor], Mapping[str, Tensor]]
_ROUNDING = 1e-5  # of the largest box and score


class Disagreement(ValueError):
    """An exported model whose outputs are not the original's."""


def export_detector(
    model: nn.Module,
    config: ModelConfig,
    out: str | Path,
    *,
    format: str,
    size: tuple[int, int] | None = None,
    batch: int = 1,
) -> dict[str, Any]:
    """Write a detector as one file of plain operators, after comparing its outputs with the original's.

    The inputs and outputs are those of :class:`nasdet.detectors.static.StaticDetector`, suppression included, for
    ``batch`` images padded to ``size`` (height, width; the configuration's picture size by default, rounded up to a
    multiple of 32). ``format`` is ``"torch"``, a program for ``torch.export.load`` of aten operators and
    ``torch.while_loop`` alone, or ``"onnx"``, for which onnx, onnxscript and onnxruntime must be installed. Both hold,
    as ``nasdet.json`` or as metadata, what is returned: names, sizes and categories.

    Raises:
        ValueError: bad arguments; ``Disagreement``, when an output differs (:func:`check`): no file is left.
        ModuleNotFoundError: what the format needs is not installed.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if batch < 1:
        raise ValueError(f"batch must be positive, got {batch}")
    height, width = size or (padded(side) for side in (config.short_side, config.long_side))
    if height < 32 or width < 32 or height % 32 or width % 32:
        raise ValueError(f"size must be multiples of 32, as pictures are padded, got {height}x{width}")
    model = model.cpu().eval()
    write, load = FORMATS[format]
    images, sizes = inputs(batch, (height, width))
    program, names = trace(model, images, sizes)
    facts = {
        "detector": config.detector,
        "categories": list(config.categories),
        "images": [batch, 3, height, width],
        "mean": [255 * value for value in IMAGENET_MEAN],
        "std": [255 * value for value in IMAGENET_STD],
        "inputs": list(INPUTS),
        "outputs": names,
        "nasdet": __version__,
    }
    content = write(program, facts)
    check(model, load(content), images, sizes)
    write_atomic(out, content)
    return facts


def inputs(batch: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Noise in the place of pictures, everywhere, and valid areas; every second is smaller than the canvas."""
    images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))
    height, width = size
    sizes = [(height, width - 5) if index % 2 else (height - 7, width) for index in range(batch)]
    return images, torch.tensor(sizes)


def trace(model: nn.Module, images: Tensor, sizes: Tensor) -> tuple[torch.export.ExportedProgram, list[str]]:
    """The program of a detector for inputs of these shapes, and the names of its outputs."""
    static = StaticDetector(model)
    example = (images, sizes, torch.tensor(0.05))
    try:
        with torch.no_grad(), use_backend("reference"), _quiet():
            program = torch.export.export(static, example)
    except Exception as error:  # the tracer raises a dozen unrelated types
        detail = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{type(model).__name__} cannot be exported: {detail[0]}") from error
    spec = program.call_spec.out_spec
    names: list[str] = list(pytree.tree_unflatten(range(spec.num_leaves), spec))
    parts = [part for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    for node in (node for part in parts for node in part.graph.nodes):
        node.meta.pop("stack_trace", None)  # source paths of this machine
        source = getattr(node.target, "__module__", "") if node.op == "call_function" else PLAIN[0]
        if isinstance(node.target, torch._ops.OperatorBase):
            source = getattr(node.target, "namespace", "higher_order")
        if source not in PLAIN:
            raise ValueError(f"{type(model).__name__} cannot be exported: {node.target} is no operator of torch's own")
    return program, names


def _torch_content(program: torch.export.ExportedProgram, facts: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"nasdet.json": json.dumps(facts)})
    return buffer.getvalue()


def _torch_run(content: bytes) -> Run:
    return torch.export.load(io.BytesIO(content)).module()


def _onnx_content(program: torch.export.ExportedProgram, facts: Mapping[str, Any]) -> bytes:
    _installed("onnx", "onnxscript", "onnxruntime")
    with torch.no_grad(), _quiet():
        exported = torch.onnx.export(
            program, (), dynamo=True, verbose=False, input_names=INPUTS, output_names=facts["outputs"]
        )
    assert exported is not None
    proto = exported.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]  # source paths of this machine
    for key, value in facts.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)
    if proto.ByteSize() >= 2**31:
        raise ValueError(f"an ONNX file holds at most 2 GiB, got {proto.ByteSize():,} bytes")
    return proto.SerializeToString()


def _onnx_run(content: bytes) -> Run:
    _installed("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(*given: Tensor) -> dict[str, Tensor]:
        values = session.run(None, {name: value.numpy() for name, value in zip(INPUTS, given, strict=True)})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    return run


#: format -> what makes the file's content, what makes a function of it
FORMATS: dict[str, tuple[Callable[..., bytes], Callable[[bytes], Run]]] = {
    "torch": (_torch_content, _torch_run),
    "onnx": (_onnx_content, _onnx_run),
}


@torch.no_grad()
def check(model: Any, run: Run, images: Tensor, sizes: Tensor) -> None:
    """Compare an exported model with the detector; raises ``Disagreement`` naming what differs.

    Every part is compared on the exported model's own results of the part before, so that rounding in one cannot
    change what the next one chooses from: maps, proposals, class probabilities and deltas, boxes with their scores and
    labels, masks. Once with the detector's score threshold and once with 0, where there is always something to find.
    """
    stage: Any = model.boxes if isinstance(model, FasterRCNN) else model
    own = float(getattr(stage.stages[-1] if hasattr(stage, "stages") else stage, "score_threshold", 0.0))
    areas = [(int(height), int(width)) for height, width in sizes]
    expected = model(images)
    names = list(model.neck.strides)
    for threshold in (0.0, own):
        given = run(images, sizes, torch.tensor(threshold))
        maps = {key: [given[f"{key}_{name}"] for name in names[: len(levels)]] for key, levels in expected.items()}
        for key, levels in expected.items():
            for name, level, wanted in zip(names, maps[key], levels, strict=False):
                _close(f"{key}_{name}", level, wanted)
        selection = Selection(threshold)
        if isinstance(model, FasterRCNN):
            found = _from_stages(model, given, maps, areas, selection)
        else:
            found = model.detect(maps, areas, selection)
        for index, image in enumerate(found):
            _same_detections({name: given[name][index] for name in ("boxes", "scores", "labels")}, image, index)
        if getattr(model, "masks", None) is not None:
            _check_masks(model, given, maps["features"])


def _from_stages(
    model: Any, given: Mapping[str, Tensor], maps: dict[str, list[Tensor]], sizes: list[Any], selection: Selection
) -> list[dict[str, Tensor]]:
    """The detections that the original chooses from what the exported model has computed."""
    rows = model.rpn.proposals(maps["rpn_cls"], maps["rpn_box"], sizes, training=False)
    for index, wanted in enumerate(rows):
        _same_boxes(given["proposals"][index], wanted)
    proposals = list(given["proposals"])
    predicted = model.boxes.predict(maps["features"], proposals, sizes)
    table = [given[name].flatten(0, 1) for name in ("probabilities", "deltas")]
    boxes = list(given["refined"]) if "refined" in given else proposals
    for name, level, wanted in zip(("probabilities", "deltas"), table, predicted, strict=False):
        _close(name, level, wanted)
    if "refined" in given:
        _close("refined", given["refined"], torch.stack(list(predicted[2])))
    found: list[dict[str, Tensor]] = model.boxes.select(*table, boxes, sizes, selection)
    return found


def _check_masks(model: Any, given: Mapping[str, Tensor], features: list[Tensor]) -> None:
    boxes = [{name: given[name][index] for name in ("boxes", "scores", "labels")} for index in range(len(features[0]))]
    for index, image in enumerate(model.masks.complete(features, boxes)):
        for name in image.keys() - boxes[index].keys():
            _close(name, given[name][index], image[name])


def _same_detections(given: Mapping[str, Tensor], image: Mapping[str, Tensor], index: int) -> None:
    """As many, of the same labels, and the same scores rank by rank; and each box with its label and score, if not at
    its rank: rounding may swap those of equal scores."""
    count = len(image["labels"])
    found = {name: value[:count] for name, value in given.items()}
    same = torch.equal(found["labels"].sort().values, image["labels"].sort().values)
    if not same or (given["labels"][count:] >= 0).any():
        raise Disagreement(f"labels of image {index} differ from the detector's {image['labels'].tolist()}")
    _close("scores", found["scores"], image["scores"], _ROUNDING)
    if not count:
        return
    alike = found["labels"][:, None] == image["labels"]
    for name in ("scores", "boxes"):
        far = (found[name].reshape(count, 1, -1) - image[name].reshape(1, count, -1)).abs().amax(-1)
        alike &= far <= _ROUNDING * float(image[name].abs().max())
    for lost in (~alike.any(0)).nonzero().flatten().tolist():
        raise Disagreement(f"boxes of image {index} lack the detector's {image['boxes'][lost].tolist()}")


def _close(name: str, value: Tensor, wanted: Tensor, tolerance: float = 1e-3) -> None:
    """Differences of at most ``tolerance`` of the largest value."""
    if value.shape != wanted.shape:
        raise Disagreement(f"{name} must have shape {tuple(wanted.shape)}, got {tuple(value.shape)}")
    if not wanted.numel():
        return
    error, scale = float((value - wanted).abs().max()), float(wanted.abs().max())
    if not error <= tolerance * scale:
        raise Disagreement(f"{name} differs by up to {error:.3g} from the detector's, whose values go to {scale:.3g}")


def _same_boxes(value: Tensor, wanted: Tensor) -> None:
    """Of a hundred boxes 98 are there, to 0.05 pixels: rounding may tip a suppression right at its threshold."""
    value = value[(value[:, 2:] > value[:, :2]).all(dim=1)]
    if not len(wanted) and not len(value):
        return
    away = torch.cdist(wanted, value, p=float("inf"))
    shared = float((away.min(dim=1).values < 0.05).float().mean()) if len(value) and len(wanted) else 0.0
    if shared < 0.98 or abs(len(value) - len(wanted)) > 0.02 * len(wanted):
        raise Disagreement(f"proposals: {shared:.0%} of the detector's {len(wanted)} are among {len(value)}")


def _installed(*names: str) -> None:
    import importlib.util

    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ModuleNotFoundError(f"ONNX needs {', '.join(missing)}: pip install 'nasdet[onnx]'")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on what is not installed and on its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
