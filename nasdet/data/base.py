"""What every data set is, and every detection data set. A new detection format is one small file: parse it into
pictures, hand them to :class:`DetectionDataset`."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.data import Dataset

from nasdet.data.errors import ROLES, DataError, Problems, TestSplitError, format_counts
from nasdet.data.pictures import Picture, existing, read_picture, readable

if TYPE_CHECKING:
    from typing_extensions import Self

    from nasdet.data.split import Split

Item = tuple[torch.Tensor, dict[str, Any]]


class _Identified(Protocol):
    @property
    def image_id(self) -> int: ...


class PictureDataset(Dataset[Item]):
    """Pictures with a role: what loaders, splits and searches need of any data set. ``dataset[i]`` is
    ``(image, target)``, image uint8 ``[3, H, W]``.

    Attributes:
        annotation: the file or folder that says what the pictures show.
        source: SHA-256 of its content; with an image id it says which picture is meant.
        role: ``"train"``, ``"search-train"``, ``"search-val"`` or ``"test"``.
        categories: class names by label.
        pictures, image_ids: by place.
        skipped: reason -> number of dropped records (empty unless bad records are skipped).
        skipped_examples: reason -> the first message.
        split: the :class:`~nasdet.data.split.Split` that this data set is a part of, or None.
    """

    annotation: Path
    source: str
    role: str
    categories: tuple[str, ...]
    pictures: Sequence[Any]
    image_ids: list[int]
    skipped: dict[str, int]
    skipped_examples: dict[str, str]
    split: Split | None = None

    def _set_pictures(self, pictures: Sequence[_Identified]) -> None:
        self.pictures = pictures
        self.image_ids = [picture.image_id for picture in pictures]

    def __len__(self) -> int:
        return len(self.pictures)

    def subset(self, image_ids: Collection[int], role: str | None = None, split: Split | None = None) -> Self:
        """The same data set with only ``image_ids`` (in the file's order), sharing everything else.

        ``role`` and ``split`` are kept unless given.

        Raises:
            DataError: an id is not there.
            TestSplitError: another role is asked for a part of test data.
        """
        wanted = set(image_ids)
        _require_known(wanted, set(self.image_ids), self.annotation, Problems())
        if role is not None:
            check_role(role)
        if self.role == "test" and role not in (None, "test"):
            raise TestSplitError(f"a part of the test data stays test data, got role {role!r}")
        part = copy.copy(self)
        part._set_pictures([picture for picture in self.pictures if picture.image_id in wanted])
        part.role = self.role if role is None else role
        part.split = self.split if split is None else split
        return part


def check_role(role: str) -> None:
    """Raise ``ValueError`` unless ``role`` is a data set's role."""
    if role not in ROLES:
        raise ValueError(f"role must be one of {', '.join(ROLES)}, got {role!r}")


class DetectionDataset(PictureDataset):
    """Pictures with boxes; ``dataset[i]`` is ``(image, target)``.

    ``image`` is uint8 ``[3, H, W]`` RGB. ``target`` holds ``boxes`` float32 ``[N, 4]`` (x1, y1, x2, y2 in pixels,
    inside the image), ``labels`` int64 ``[N]`` in ``0..K-1``, ``iscrowd`` bool ``[N]``, ``area`` float32 ``[N]``,
    ``image_id`` int, ``size`` ``(H, W)`` and, with ``masks=True``, ``masks`` bool ``[N, H, W]``. A picture without
    objects has N = 0.

    Args:
        pictures: the parsed annotation.
        categories: class names by label.
        category_ids: the file's class ids by label.
        annotation: the file or folder that was parsed, for messages.
        source: SHA-256 of the annotation's content; with an image id it says which picture is meant.
        role: ``"train"``, ``"search-train"``, ``"search-val"`` or ``"test"``.
        masks: give masks.
        image_ids: keep only these, in this order of the file.
        problems: collector used while parsing. When it skips bad records, every image is decoded once here, so that a
            truncated one cannot stop a training run later.

    Raises:
        DataError: duplicate image ids, a missing image, no image or no object at all.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        categories: Sequence[str],
        category_ids: Sequence[int],
        *,
        annotation: Path,
        source: str,
        role: str = "train",
        masks: bool = False,
        image_ids: Collection[int] | None = None,
        problems: Problems | None = None,
    ) -> None:
        check_role(role)
        problems = Problems() if problems is None else problems
        self.annotation, self.source, self.role, self.masks = annotation, source, role, masks
        self.categories, self.category_ids = tuple(categories), tuple(category_ids)
        kept = _unique(pictures, problems)
        if image_ids is not None:
            _require_known(set(image_ids), {picture.image_id for picture in kept}, annotation, problems)
            kept = [picture for picture in kept if picture.image_id in set(image_ids)]
        kept = existing(kept, problems)
        if problems.skip_bad:
            kept = readable(kept, problems, masks)
        _require_content(kept, annotation, problems, objects=image_ids is None)
        self.skipped, self.skipped_examples = dict(problems.counts), dict(problems.examples)
        self._set_pictures(kept)

    def __getitem__(self, index: int) -> Item:
        picture = self.pictures[index]
        return read_picture(picture), picture.target(self.masks)

    def verify_images(self, problems: Problems | None = None) -> None:
        """Decode every image (and mask) once: the first bad one raises :class:`DataError`, or ``problems`` counts."""
        readable(self.pictures, Problems() if problems is None else problems, self.masks)

    def ground_truth(self) -> dict[str, Any]:
        """A COCO dict of exactly these images, as pycocotools takes it: boxes as the file has them, crowds included.

        Annotation ids are numbered from 1 (pycocotools takes id 0 for "unmatched"); segmentations are there when the
        data set gives masks.
        """
        images = [
            {"id": p.image_id, "file_name": p.path.name, "height": p.size[0], "width": p.size[1]} for p in self.pictures
        ]
        annotations: list[dict[str, Any]] = []
        for picture in self.pictures:
            for index, xywh in enumerate(picture.xywh.tolist()):
                annotation: dict[str, Any] = {
                    "id": len(annotations) + 1,
                    "image_id": picture.image_id,
                    "category_id": self.category_ids[int(picture.labels[index])],
                    "bbox": xywh,
                    "area": float(picture.area[index]),
                    "iscrowd": int(picture.iscrowd[index]),
                }
                if picture.segmentations is not None:
                    annotation["segmentation"] = picture.segmentations[index]
                annotations.append(annotation)
        categories = [{"id": i, "name": name} for i, name in zip(self.category_ids, self.categories, strict=True)]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({str(self.annotation)!r}, role={self.role!r}, {len(self)} images, "
            f"{sum(len(picture.labels) for picture in self.pictures)} objects, {len(self.categories)} categories)"
        )


def _unique(pictures: Sequence[Picture], problems: Problems) -> list[Picture]:
    seen: dict[int, Picture] = {}
    for picture in pictures:
        if picture.image_id in seen:
            detail = f"the id of {seen[picture.image_id].path.name} as well"
            problems.found(DataError("duplicate image id", picture.annotation, picture.record, detail))
        else:
            seen[picture.image_id] = picture
    return list(seen.values())


def _require_known(wanted: set[int], known: set[int], annotation: Path, problems: Problems) -> None:
    unknown = sorted(wanted - known)
    if unknown and not problems.skip_bad:
        names = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise DataError("unknown image id", annotation, f"image_ids {names}", f"{len(unknown)} asked for and not there")


def _require_content(pictures: list[Picture], annotation: Path, problems: Problems, objects: bool) -> None:
    dropped = f" (skipped: {format_counts(problems.counts)})" if problems.counts else ""
    if not pictures:
        raise DataError("empty data set", annotation, "images", f"no usable image{dropped}")
    if objects and not any(len(picture.labels) for picture in pictures):
        detail = f"no usable object in {len(pictures)} images{dropped}"
        raise DataError("empty data set", annotation, "annotations", detail)
