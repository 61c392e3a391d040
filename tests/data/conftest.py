"""Small data folders, written anew for each test that plants something in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nasdet.data import write_digits


def coco_document(n: int, first_id: int = 1) -> dict[str, Any]:
    """n images of 40x30 (width x height), two objects each but for the last, which has none."""
    images = [{"id": first_id + i, "file_name": f"{first_id + i}.png", "width": 40, "height": 30} for i in range(n)]
    annotations = []
    for i in range(n - 1):
        for k, (bbox, category) in enumerate((([4.0, 5.0, 10.0, 8.0], 7), ([20.0, 10.0, 12.0, 16.0], 3))):
            x, y, w, h = bbox
            annotations.append(
                {
                    "id": 10 * (first_id + i) + k,
                    "image_id": first_id + i,
                    "category_id": category,
                    "bbox": bbox,
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def save_images(folder: Path, document: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for image in document["images"]:
        rng = np.random.default_rng(image["id"])
        pixels = rng.integers(0, 256, (image["height"], image["width"], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / image["file_name"])


@pytest.fixture
def make_coco(tmp_path: Path) -> Callable[..., Path]:
    """``make_coco(train=6, val=3, plant=function of the training document)`` -> folder."""

    def make(
        train: int = 6,
        val: int = 3,
        plant: Callable[[dict[str, Any]], Any] | None = None,
        val_first_id: int = 101,
        name: str = "coco",
    ) -> Path:
        folder = tmp_path / name
        (folder / "annotations").mkdir(parents=True)
        for part, n, first in (("train", train, 1), ("val", val, val_first_id)):
            if not n:
                continue
            document = coco_document(n, first)
            save_images(folder / part, document)
            if plant is not None and part == "train":
                plant(document)
            (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(document))
        return folder

    return make


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve and six digits pictures, shared: do not change them."""
    return write_digits(tmp_path_factory.mktemp("digits") / "digits", train=12, val=6, size=(96, 128))
