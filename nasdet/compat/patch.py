"""``patch_torchvision()``: nasdet's kernels under an installed, unchanged torchvision.

torchvision's operators keep their names, schemas, autograd formulas and autocast rules; what runs below them changes.
So models, and libraries that call torchvision (detectron2 among them), get faster without a line of theirs touched.
"""

from __future__ import annotations

import importlib
import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

from nasdet import _library, ops

__all__ = ["Patch", "patch_torchvision"]

_lock = threading.RLock()
_holders = 0  # patches that are in force; the first puts the kernels in, the last takes them out
_installation: _Installation | None = None


class Patch:
    """What :func:`patch_torchvision` did, and the way back. Also a context manager.

    Attributes:
        replaced: names of what nasdet now runs: ``"torchvision::nms [CPU]"`` for a kernel, ``"torchvision.ops.poolers.
            _multiscale_roi_align"`` for a function.
        kept: names of what was left to torchvision, and why.
    """

    def __init__(self, replaced: Sequence[str], kept: Mapping[str, str]) -> None:
        self.replaced = tuple(replaced)
        self.kept = MappingProxyType(dict(kept))
        self._active = True

    @property
    def active(self) -> bool:
        """Whether this patch still holds nasdet's kernels in place."""
        return self._active

    def restore(self) -> None:
        """Give torchvision its own kernels back, once every patch in force is restored; again: no effect."""
        with _lock:
            if self._active:
                self._active = False
                _release()

    def __enter__(self) -> Patch:
        if not self._active:
            raise RuntimeError("this patch was restored already: call patch_torchvision() again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def __repr__(self) -> str:
        lines = [f"  {name}" for name in self.replaced] + [f"  not {name}: {why}" for name, why in self.kept.items()]
        return f"<Patch of torchvision, {'in force' if self._active else 'restored'}:\n" + "\n".join(lines) + ">"


def patch_torchvision() -> Patch:
    """Put nasdet's NMS and RoIAlign under torchvision, process-wide.

    As a call it lasts until ``.restore()``; in ``with patch_torchvision() as patch:`` until the end of the block,
    also when the block raises. Patches may nest; torchvision is restored by the end of the last.

    Replaced, for each device that nasdet has compiled kernels for: ``torchvision::nms``, ``roi_align`` and
    ``_roi_align_backward``; the class loop and the coordinate offsets of ``batched_nms``, by one call that compares
    within a class; the level loop of ``MultiScaleRoIAlign``, by one call; on CUDA the slow form of ``roi_align`` under
    ``torch.use_deterministic_algorithms``; and the fake of ``nms``, which lets compiled code keep 0 or 1 boxes.
    TorchScript, tracing and export see torchvision's own functions and operators. Results are torchvision's, but where
    :mod:`nasdet.compat.torchvision` says otherwise.

    Returns:
        A :class:`Patch` whose ``replaced`` and ``kept`` say what was done.

    Raises:
        ImportError: torchvision is not installed or does not load beside this PyTorch. RuntimeError: nasdet has no
            compiled kernels on this machine, so nothing could be replaced.
    """
    global _holders, _installation
    with _lock:
        if _installation is None:
            _installation = _Installation()
        _holders += 1
        return Patch(_installation.replaced, _installation.kept)


def _release() -> None:
    global _holders, _installation
    _holders -= 1
    if _holders == 0 and _installation is not None:
        _installation.remove()
        _installation = None


class _Installation:
    """Everything that was put in, to be taken out again."""

    def __init__(self) -> None:
        self.replaced: list[str] = []
        self.kept: dict[str, str] = {}
        self._functions: list[tuple[ModuleType, str, Any, Any]] = []
        _import_torchvision()
        self._library = torch.library.Library("torchvision", "IMPL")
        try:
            self._put_kernels()
            if self.replaced:
                self._put_fake()
                self._put_functions()
        except BaseException:
            self.remove()
            raise
        if not self.replaced:
            self.remove()
            raise RuntimeError(f"patch_torchvision() has no kernels to put in place: {self.kept}")

    def remove(self) -> None:
        self._library._destroy()
        for module, name, original, replacement in reversed(self._functions):
            if getattr(module, name, None) is replacement:  # not what somebody else put there since
                setattr(module, name, original)

    def _put_kernels(self) -> None:
        for device in ("CPU", "CUDA"):
            for name, (needed, kernel) in _KERNELS.items():
                reason = _library.why_not(device.lower())
                if reason is None and not _library.has_kernel(needed, device):
                    reason = f"nasdet has no {device} kernel of {needed}"
                if reason is None and not torch._C._dispatch_has_kernel(f"torchvision::{name}"):
                    reason = "this torchvision does not have it"
                label = f"torchvision::{name} [{device}]"
                if reason is not None:
                    self.kept[label] = reason
                    continue
                with warnings.catch_warnings():  # PyTorch warns of the override that is the purpose here
                    warnings.filterwarnings("ignore", message=".*[Oo]verriding a previously registered kernel.*")
                    self._library.impl(name, kernel, device, allow_override=True)
                self.replaced.append(label)

    def _put_fake(self) -> None:
        torch.library.register_fake("torchvision::nms", _fake_nms, lib=self._library, allow_override=True)
        self.replaced.append("torchvision::nms [fake]")

    def _put_functions(self) -> None:
        complete = [
            d for d in ("CPU", "CUDA") if all(f"torchvision::{name} [{d}]" in self.replaced for name in _KERNELS)
        ]
        devices = frozenset(device.lower() for device in complete)
        for module_name, name, make in _FUNCTIONS:
            label = f"{module_name}.{name}"
            module = importlib.import_module(module_name)
            original = getattr(module, name, None)
            if original is None or not devices:
                self.kept[label] = "this torchvision does not have it" if devices else "no device has every kernel"
                continue
            replacement = make(original, devices)
            replacement.__name__ = name
            # TorchScript asks whether a function has this attribute, and then compiles __original_fn; torch.compile
            # asks whether it is true, and otherwise traces the replacement.
            setattr(replacement, "__script_if_tracing_wrapper", False)
            setattr(replacement, "__original_fn", getattr(original, "__original_fn", original))
            setattr(module, name, replacement)
            self._functions.append((module, name, original, replacement))
            self.replaced.append(label)


def _import_torchvision() -> None:
    try:
        importlib.import_module("torchvision.ops")
    except ImportError as error:
        raise ImportError(f"patch_torchvision() needs torchvision, which cannot be imported: {error}") from error
    except (RuntimeError, OSError) as error:  # a torchvision built for another PyTorch
        raise ImportError(f"patch_torchvision() needs a torchvision that fits this PyTorch: {error}") from error


def _nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    if dets.dtype != scores.dtype:
        wide = torch.promote_types(dets.dtype, scores.dtype)
        dets, scores = dets.to(wide), scores.to(wide)
    return torch.ops.nasdet.nms(dets, scores, None, iou_threshold)


def _roi_align(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    dense = input.is_contiguous() or input.is_contiguous(memory_format=torch.channels_last)
    pooled = torch.ops.nasdet.multilevel_roi_align(
        [input if dense else input.contiguous()],
        _coordinates(rois),
        [spatial_scale],
        pooled_height,
        pooled_width,
        sampling_ratio,
        aligned,
        *_ONE_LEVEL,
    )
    return pooled.contiguous()  # as torchvision's fake promises to compiled code


def _roi_align_backward(
    grad: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    batch_size: int,
    channels: int,
    height: int,
    width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    (gradient,) = torch.ops.nasdet.multilevel_roi_align_backward(
        grad,
        _coordinates(rois),
        batch_size,
        [height],
        [width],
        0,
        [spatial_scale],
        pooled_height,
        pooled_width,
        sampling_ratio,
        aligned,
        *_ONE_LEVEL,
        torch.are_deterministic_algorithms_enabled(),
    )
    return gradient


def _coordinates(rois: Tensor) -> Tensor:
    """RoIs as the kernels take them: float32, or float64 beside float64 features (whose dtype they have)."""
    wide = rois if rois.dtype in (torch.float32, torch.float64) else rois.float()
    return wide.contiguous()


def _fake_nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    kept = torch.library.get_ctx().new_dynamic_size()
    return dets.new_empty((kept,), dtype=torch.int64)


_ONE_LEVEL = (0, 224.0, 4)  # policy, canonical scale and level: without effect on a single map
_KERNELS: Mapping[str, tuple[str, Callable[..., Tensor]]] = {
    "nms": ("nms", _nms),
    "roi_align": ("multilevel_roi_align", _roi_align),
    "_roi_align_backward": ("multilevel_roi_align_backward", _roi_align_backward),
}


def _tracing() -> bool:
    """Whether a graph is written down that others must be able to read, in torchvision's operators."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def _make_batched_nms(original: Callable[..., Tensor], devices: frozenset[str]) -> Callable[..., Tensor]:
    def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
        if boxes.device.type not in devices or _tracing():
            return original(boxes, scores, idxs, iou_threshold)
        return ops.batched_nms(boxes, scores, idxs, iou_threshold)

    return batched_nms


def _make_multiscale(original: Callable[..., Tensor], devices: frozenset[str]) -> Callable[..., Tensor]:
    def multiscale(
        x_filtered: list[Tensor],
        boxes: list[Tensor],
        output_size: list[int],
        sampling_ratio: int,
        scales: list[float] | None,
        mapper: Any,
    ) -> Tensor:
        if scales is None or mapper is None or _tracing() or not _regular(x_filtered, boxes, scales, mapper, devices):
            return original(x_filtered, boxes, output_size, sampling_ratio, scales, mapper)
        pooled = ops.multilevel_roi_align(
            x_filtered,
            boxes,
            output_size,
            scales,
            sampling_ratio,
            assignment="torchvision",
            canonical_scale=mapper.s0,
            canonical_level=mapper.lvl0,
        )
        return pooled.contiguous()  # callers may view what torchvision always returns contiguous

    return multiscale


def _regular(
    maps: list[Tensor], boxes: list[Tensor], scales: list[float], mapper: Any, devices: frozenset[str]
) -> bool:
    """Whether the one-call pooler means the same: one dtype, boxes per image, a map on each of the mapper's levels."""
    first = maps[0]
    if len(maps) < 2 or len(scales) != len(maps) or len(boxes) != first.shape[0]:
        return False
    if first.device.type not in devices or any(m.dtype != first.dtype or m.shape[1] != first.shape[1] for m in maps):
        return False
    levels = [-round(math.log2(scale)) for scale in scales]
    return (
        mapper.eps == 1e-6
        and (mapper.k_min, mapper.k_max) == (levels[0], levels[-1])
        and levels == list(range(levels[0], levels[0] + len(levels)))
    )


def _make_deterministic(original: Callable[..., Tensor], devices: frozenset[str]) -> Callable[..., Tensor]:
    def roi_align(
        input: Tensor,
        rois: Tensor,
        spatial_scale: float,
        pooled_height: int,
        pooled_width: int,
        sampling_ratio: int,
        aligned: bool,
    ) -> Tensor:
        if input.device.type not in devices or _tracing():
            return original(input, rois, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned)
        size = (pooled_height, pooled_width)
        return ops.roi_align(input, rois, size, spatial_scale, sampling_ratio, aligned).contiguous()

    return roi_align


_FUNCTIONS: Sequence[tuple[str, str, Callable[[Callable[..., Tensor], frozenset[str]], Any]]] = (
    ("torchvision.ops.boxes", "_batched_nms_vanilla", _make_batched_nms),
    ("torchvision.ops.boxes", "_batched_nms_coordinate_trick", _make_batched_nms),
    ("torchvision.ops.poolers", "_multiscale_roi_align", _make_multiscale),
    ("torchvision.ops.roi_align", "_roi_align", _make_deterministic),
)
