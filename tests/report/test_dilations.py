"""The page of a NATS run: intensities by block, the way of the alphas, and receptive fields."""

from __future__ import annotations

import base64
import io
import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from nasdet.report import write_report
from nasdet.report.dilations import intensities, intensity_bars, mean_shares, searched_dilations
from nasdet.report.page import LIMIT

GENOTYPE: dict[str, Any] = {
    "layer2.0.conv2": [[1, 8], [2, 4], [[1, 3], 4]],
    "layer3.1.conv2": [[3, 2], [1, 1], [3, 1]],
    "layer4.2.conv2": [[[5, 1], 16]],
}
CHOICES = {layer: ["1", "2", "3", "1x3", "3x1"] for layer in GENOTYPE}


def rectangles(svg: str) -> list[tuple[float, float, float]]:
    """(y, x, width) of each bar's piece."""
    found = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)"', svg)
    return [(float(y), float(x), float(width)) for x, y, width in found]


def test_intensities_sum_to_1_in_every_layer() -> None:
    found = intensities(GENOTYPE)
    assert found["layer2.0.conv2"] == {(1, 1): 0.5, (2, 2): 0.25, (1, 3): 0.25}
    assert found["layer3.1.conv2"] == {(3, 3): 0.75, (1, 1): 0.25}, "index-preserving runs of one dilation add up"
    assert all(math.isclose(sum(shares.values()), 1.0) for shares in found.values())


def test_intensities_are_those_of_the_space() -> None:
    from nasdet.spaces import nats

    assert {layer: nats.intensities(entries) for layer, entries in GENOTYPE.items()} == intensities(GENOTYPE)


@pytest.mark.parametrize(
    "genotype",
    [
        None,
        {},
        {"box": [[["std1", 0], ["sep2", 1]]]},
        {"a": []},
        {"a": [[1, 2, 3]]},
        {"a": [[0, 2]]},
        {"a": [[[1, 2, 3], 2]]},
        {"a": [[1, 1.5]]},
        {"a": [[1, True]]},
        {"a": [[1, 1]], "b": "text"},
    ],
    ids=str,
)
def test_other_genotypes_have_none(genotype: Any) -> None:
    assert intensities(genotype) == {}


def test_a_bar_is_full_and_without_gaps() -> None:
    svg = intensity_bars(intensities(GENOTYPE))
    by_row: dict[float, list[tuple[float, float]]] = {}
    for y, x, width in rectangles(svg):
        by_row.setdefault(y, []).append((x, width))
    assert [len(row) for row in by_row.values()] == [3, 2, 1]
    for row in by_row.values():
        assert sum(width for _, width in row) == pytest.approx(460, abs=0.02)
        for (x, width), (following, _) in zip(row, row[1:], strict=False):
            assert x + width == pytest.approx(following, abs=0.02)
    assert "layer3.1.conv2: 1 25 %, 3 75 %" in svg, "the order of the set, whatever the card's"
    assert len(set(re.findall(r'fill="(var\(--c\d\))"', svg))) == 5, "a colour for each dilation"


def make_run(folder: Path, fake: SimpleNamespace, steps: int = 30, groups: int = 4) -> Path:
    rng = random.Random(0)
    fake.write(folder / "run.json", {"verb": "search nats", "status": "done", "choices": CHOICES})
    rows = [
        {
            "step": step,
            "alphas": {
                layer: [[step * 0.1 * (c == g % 5) + 0.01 * rng.random() for c in range(5)] for g in range(groups)]
                for layer in GENOTYPE
            },
        }
        for step in range(steps)
    ]
    fake.write_lines(folder / "alphas.jsonl", rows)
    fake.write(folder / "card.json", fake.make_card(GENOTYPE, "nats-C", "nats"))
    blob = [[round(1000 * math.exp(-((x - 15) ** 2 + (y - 10) ** 2) / 20)) for x in range(30)] for y in range(20)]
    maps = [{"name": name, "side": side, "rows": blob} for name, side in (("original", 96.4), ("derived", 180.0))]
    content = {"size": [800, 1200], "threshold": 0.0455, "steps": 1000, "weights": "random", "maps": maps}
    fake.write(folder / "erf.json", content)
    return folder


def test_page_of_a_search(tmp_path: Path, fake: SimpleNamespace, parse: Any) -> None:
    source = write_report(make_run(tmp_path / "run", fake)).read_text(encoding="utf-8")
    page = parse(source)
    assert page.headings[1:4] == ["Architecture", "How the search decided", "Effective receptive field"]
    told = [str(image["alt"]).partition(", ")[2] for image in page.all("img")]
    assert told == ["original: field of 96 pixels on a side", "derived: field of 180 pixels on a side"]
    assert "exceed 4.55 % of the maximum" in page.text and "Input of 800 × 1200 pixels" in page.text
    assert len([s for s in page.all("svg") if s.get("class") == "intensities"]) == 1
    assert len([s for s in page.all("svg") if "ends with mean shares" in str(s.get("aria-label"))]) == 3
    assert "http:" not in source and "https:" not in source


def test_fields_are_pictures_with_a_frame_of_their_size(tmp_path: Path, fake: SimpleNamespace, parse: Any) -> None:
    page = parse(write_report(make_run(tmp_path / "run", fake)).read_text(encoding="utf-8"))
    sides = []
    for image in page.all("img"):
        data = str(image["src"]).removeprefix("data:image/png;base64,")
        with Image.open(io.BytesIO(base64.b64decode(data))) as opened:
            assert opened.size == (600, 400)
            shades = opened.convert("L")
        assert shades.getpixel((0, 0)) < 20 < 150 < shades.getpixel((320, 210))
        with Image.open(io.BytesIO(base64.b64decode(data))) as opened:
            row = [x for x in range(600) if opened.getpixel((x, 190)) == 255]
        sides.append(row[-1] - row[0])
    assert sides == pytest.approx([96.4 / 2, 90], abs=2), "two pixels of the input a pixel of the picture"


def test_shares_of_the_panels_sum_to_1() -> None:
    assert mean_shares([[0.25, 0.75], [0.75, 0.25], [0.5, 0.5]]) == [0.5, 0.5]
    records = [{"step": step, "alphas": {"a": [[0.0, 0.1 * step, -3.0]] * 2}} for step in range(4)]
    svg = searched_dilations(records, {"a": ["1", "2", "5x1"]})
    areas = re.findall(r'<path d="M([^Z]+)Z"', svg)
    assert len(areas) == 3
    points = [[tuple(map(float, spot.split())) for spot in area.split("L")] for area in areas]
    assert [y for _, y in points[0][4:]] == [64.0] * 4 and [y for _, y in points[-1][:4]] == [0.0] * 4
    for lower, upper in zip(points, points[1:], strict=False):
        assert upper[4:] == lower[:4][::-1], "one lies on the other"
    assert "dilation 5×1" in svg


@pytest.mark.parametrize("choices", [None, {"a": ["1"]}, {"a": ["1", "x", "2"]}, ["1", "2", "3"]], ids=str)
def test_unnamed_choices_are_numbered(choices: Any) -> None:
    assert "dilation 3" in searched_dilations([{"step": 0, "alphas": {"a": [[0.0, 1.0, 2.0]]}}], choices)


def test_nothing_recorded_nothing_shown() -> None:
    assert searched_dilations([], {}) == "" and searched_dilations([{"step": 1, "alphas": {"a": 3}}], {}) == ""


def test_many_channel_groups_fit_on_a_page(tmp_path: Path, fake: SimpleNamespace) -> None:
    """A figure per channel group would not: a layer of ResNet-101 may have 512 of them."""
    assert write_report(make_run(tmp_path / "run", fake, steps=120, groups=128)).stat().st_size < LIMIT / 8


def test_hostile_layers_are_text(tmp_path: Path, fake: SimpleNamespace, parse: Any) -> None:
    hostile = '<img src=x onerror=alert(1)>"&'
    run = make_run(tmp_path / "run", fake)
    fake.write(run / "card.json", fake.make_card({hostile: [[1, 1]]}, hostile, "nats"))
    fake.write_lines(run / "alphas.jsonl", [{"step": 0, "alphas": {hostile: [[0.0, 1.0]]}}])
    content = json.loads((run / "erf.json").read_text())
    content["maps"][0]["name"] = content["weights"] = content["size"][0] = hostile
    fake.write(run / "erf.json", content)
    page = parse(write_report(run).read_text(encoding="utf-8"))
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    assert len(page.all("img")) == 2


def test_without_matplotlib_the_bars_are_there(
    tmp_path: Path, fake: SimpleNamespace, parse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = parse(write_report(make_run(tmp_path / "run", fake)).read_text(encoding="utf-8"))
    assert "pip install matplotlib" in page.text and not page.all("img")
    assert any(svg.get("class") == "intensities" for svg in page.all("svg"))
