"""The worked example of a data set: boxes in a table ``image,x,y,width,height,class``, one object a line."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

from nasdet.data.base import DetectionDataset
from nasdet.data.errors import DataError, Problems
from nasdet.data.pictures import Box, Picture, check_box, read_image


class TableDetection(DetectionDataset):
    """Boxes of a CSV table; pictures lie beside it, and are numbered in the order of their names."""

    def __init__(self, table: str | Path, *, role: str = "train", skip_bad: bool = False) -> None:
        file, problems = Path(table), Problems(skip_bad)
        content = file.read_bytes()
        rows = list(csv.DictReader(content.decode("utf-8").splitlines()))
        names = sorted({row["class"] for row in rows})
        images = sorted({row["image"] for row in rows})
        sizes = {image: tuple(read_image(file.parent / image).shape[-2:]) for image in images}
        boxes: dict[str, list[Box]] = {image: [] for image in images}
        for line, row in enumerate(rows, 2):
            try:
                numbers = [float(row[key]) for key in ("x", "y", "width", "height")]
                xywh = check_box(numbers, sizes[row["image"]], file, f"line {line}")
                boxes[row["image"]].append(Box(names.index(row["class"]), xywh, xywh[2] * xywh[3]))
            except DataError as error:
                problems.found(error)
            except ValueError as error:
                problems.found(DataError("bad box", file, f"line {line}", str(error)))
        pictures = [Picture(i, file.parent / name, sizes[name], file, boxes[name]) for i, name in enumerate(images, 1)]
        source = hashlib.sha256(content).hexdigest()
        ids = list(range(1, len(names) + 1))
        super().__init__(pictures, names, ids, annotation=file, source=source, role=role, problems=problems)
