"""The new data set gives batches, ground truth and a split, and names the line of a bad record."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from nasdet.data import DataError, Resize, Split, TableDetection, make_loader

for name in ("a", "b", "c", "d"):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(f"{name}.png")
table = Path("boxes.csv")
header = "image,x,y,width,height,class\n"
good = "".join(f"{name}.png,4,5,10,8,dog\n{name}.png,20,10,12,16,cat\n" for name in "abcd")
table.write_text(header + good)

data = TableDetection(table)
assert data.categories == ("cat", "dog") and len(data) == 4
batches = list(make_loader(data, 2, Resize(60, 80), steps=3))
assert [tuple(batch.images.shape) for batch in batches] == [(2, 3, 64, 96)] * 3
assert batches[0].targets[0]["boxes"][0].tolist() == [8.0, 10.0, 28.0, 26.0]
truth = data.ground_truth()
assert len(truth["annotations"]) == 8 and truth["categories"][1] == {"id": 2, "name": "dog"}
assert len(Split.make(data, None, seed=0).test) >= 1

table.write_text(header + good + "a.png,100,5,10,8,dog\n")
try:
    TableDetection(table)
    raise AssertionError("a box outside the image was accepted")
except DataError as error:
    assert "boxes.csv" in str(error) and "line 10" in str(error)
skipping = TableDetection(table, skip_bad=True)
assert sum(skipping.skipped.values()) == 1 and len(skipping.ground_truth()["annotations"]) == 8
print("same")
