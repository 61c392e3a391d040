"""Run folders as the verbs leave them, small, and a data folder like the embedded digits: every file made here."""

from __future__ import annotations

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image, ImageDraw, ImageFont

STREAMS = ("std", "sep")
FORMS = ("1", "2", "3", "1+dil2", "2+dil2", "1+dil3")
CHOICES = [stream + form for stream in STREAMS for form in FORMS]
GENOTYPE = {
    "box": [[["sep3", 0], ["std3", 1]], [["std1", 2], ["sep1+dil2", 1]], [["sep2", 2], ["std2", 3]]],
    "cls": [[["sep2+dil2", 1], ["std3", 0]], [["sep2+dil2", 0], ["sep1", 2]], [["sep2", 2], ["std1", 3]]],
}
DEVIATIONS = [
    "The pictures are 320 pixels wide; the paper uses 800 and more.",
    "One cell per group instead of two.",
    "The w and alpha data are disjoint halves; the released code reads the same set twice.",
]


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_data(folder: Path, images: int = 10, seed: int = 0) -> Path:
    """A COCO folder with one test file: drawn digits on a gradient."""
    rng = random.Random(seed)
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    (folder / "val").mkdir(parents=True)
    for index in range(images):
        picture = Image.linear_gradient("L").resize((320, 240)).convert("RGB")
        painter = ImageDraw.Draw(picture)
        for _ in range(rng.randint(1, 5)):
            size, digit = rng.randint(24, 90), rng.randint(0, 9)
            x, y = rng.randint(0, 320 - size), rng.randint(0, 240 - size)
            painter.text((x, y), str(digit), fill=(250, 240, 220), font=ImageFont.load_default(size))
            box = [x, y + 0.2 * size, 0.6 * size, 0.75 * size]
            number = len(content["annotations"]) + 1
            content["annotations"].append(
                {
                    "id": number,
                    "image_id": 100 + index,
                    "category_id": digit + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
        name = f"{index:06d}.png"
        picture.save(folder / "val" / name)
        content["images"].append({"id": 100 + index, "file_name": name, "height": 240, "width": 320})
    write(folder / "annotations" / "instances_val.json", content)
    return folder


def make_alphas(steps: int, every: int, seed: int = 0, choices: list[str] | None = None) -> list[dict[str, Any]]:
    """A drift of every edge towards a choice of its own; where GENOTYPE keeps an edge, towards that choice."""
    rng = random.Random(seed)
    names = [*(CHOICES if choices is None else choices), "none"]
    ends = [(source, node) for node in (2, 3, 4) for source in range(node)]
    goal = {}
    for group, nodes in GENOTYPE.items():
        kept = {(source, 2 + index): op for index, node in enumerate(nodes) for op, source in node}
        for edge in ends:
            goal[group, edge] = kept.get(edge) if kept.get(edge) in names else rng.choice(names)
    rows = []
    for step in range(0, steps + 1, every):
        alphas = {}
        for group in GENOTYPE:
            alphas[group] = [
                [
                    1.8 * (step / steps) ** 1.3 * (name == goal[group, edge]) * (0.6 + 0.1 * index)
                    + 0.15 * math.sin(step / steps * 6 + len(name) * index)
                    for name in names
                ]
                for index, edge in enumerate(ends)
            ]
        rows.append({"step": step, "alphas": alphas})
    return rows


def make_metrics(steps: int, every: int, final: float, seed: int = 0, search: bool = False) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for step in range(every, steps + 1, every):
        share = step / steps
        terms = {
            "cls": 1.1 * math.exp(-2.5 * share),
            "box": 0.9 * math.exp(-1.2 * share),
            "centerness": 0.66 - 0.05 * share,
        }
        noisy = {key: value * rng.uniform(0.75, 1.3) for key, value in terms.items()}
        row = {
            "step": step,
            "loss": sum(noisy.values()),
            **noisy,
            "lr": 0.01 * min(1.0, step / (0.1 * steps)),
            "seconds": rng.uniform(0.11, 0.14),
        }
        if search:
            row |= {"val_loss": sum(noisy.values()) * 1.1, "lr_alpha": 3e-4}
        rows.append(row)
        if not search and step % (steps // 5) == 0:
            rows.append(
                {
                    "step": step,
                    "AP": final * (1 - math.exp(-4 * share)),
                    "AP50": 1.5 * final * (1 - math.exp(-5 * share)),
                }
            )
    return rows


def make_detections(data: Path, recall: float, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    content = json.loads((data / "annotations" / "instances_val.json").read_text())
    rows = []
    for entry in content["annotations"]:
        if rng.random() < recall:
            box = [value + rng.uniform(-2, 2) for value in entry["bbox"]]
            rows.append(
                {
                    "image_id": entry["image_id"],
                    "category_id": entry["category_id"],
                    "bbox": box,
                    "score": round(rng.uniform(0.35, 0.98), 4),
                }
            )
    for image in content["images"]:
        for _ in range(3):
            rows.append(
                {
                    "image_id": image["id"],
                    "category_id": rng.randint(1, 10),
                    "score": round(rng.uniform(0.02, 0.4), 4),
                    "bbox": [rng.uniform(0, 200), rng.uniform(0, 150), 40, 40],
                }
            )
    return rows


def make_card(genotype: Any = None, name: str = "fad-digits", method: str = "fad") -> dict[str, Any]:
    return {
        "schema_version": 1,
        "method": method,
        "name": name,
        "genotype": GENOTYPE if genotype is None else genotype,
        "settings": {"channels": 48, "inner_channels": 24, "cells": 1, "space": "full"},
        "source": {},
    }


def make_info(verb: str, data: Path, **more: Any) -> dict[str, Any]:
    info = {
        "verb": verb,
        "command": ["nasdet", *verb.split(), "--data", str(data), "--out", "runs/my run"],
        "arguments": {
            "data": str(data),
            "out": "runs/demo",
            "steps": 400,
            "batch": 4,
            "lr": 0.01,
            "clip": None,
            "resume": False,
        },
        "versions": {"nasdet": "0.1.0", "python": "3.11.2", "torch": "2.13.0"},
        "machine": "x86_64, 2 cores, AVX-512, 8 GiB",
        "seed": 0,
        "status": "done",
        "started": "2026-01-05T10:31:07+00:00",
        "finished": "2026-01-05T10:33:30+00:00",
        "seconds": 143.2,
        "deviations": DEVIATIONS,
    }
    return info | more


def make_search(folder: Path, data: Path) -> Path:
    info = make_info("search fad", data, choices=[*CHOICES, "none"], peak_memory=1_430_000_000)
    write(folder / "run.json", info)
    write(folder / "card.json", make_card())
    write_lines(folder / "metrics.jsonl", make_metrics(400, 10, 0.3, search=True))
    write_lines(folder / "alphas.jsonl", make_alphas(400, 10))
    ids = list(range(1, 241))
    split = {
        "format": "nasdet-split",
        "search_train": ids[:120],
        "search_val": ids[120:],
        "test": list(range(100, 110)),
        "sha256": "5e884898da28047151d0e56f8dc62927",
    }
    write(folder / "split.json", split)
    return folder


def make_train(folder: Path, data: Path, final: float, card: dict[str, Any] | None, seed: int = 0) -> Path:
    write(folder / "run.json", make_info("train", data, deviations=DEVIATIONS[:1]))
    write_lines(folder / "metrics.jsonl", make_metrics(600, 5, final, seed))
    write(folder / "detections.json", make_detections(data, 0.5 + final, seed))
    per_category = {str(digit): final * (0.5 + 0.1 * digit) for digit in range(9)} | {"9": -1.0}
    write(
        folder / "eval.json",
        {
            "AP": final,
            "AP50": 1.5 * final,
            "AP75": 0.9 * final,
            "APs": 0.4 * final,
            "APm": final,
            "APl": -1.0,
            "AR100": 1.2 * final,
            "per_category": per_category,
        },
    )
    parts = [
        {"name": "backbone", "parameters": 2_780_000, "macs": 410_000_000},
        {"name": "fpn", "parameters": 310_000, "macs": 190_000_000},
        {"name": "towers", "parameters": 166_000, "macs": 260_000_000},
        {"name": "rest", "parameters": 6_500, "macs": 9_000_000},
    ]
    write(folder / "cost.json", {"size": [240, 320], "parts": parts})
    if card is not None:
        write(folder / "card.json", card)
    return folder


def make_demo(folder: Path, data: Path) -> Path:
    """The folder of ``make demo``: a search and three trainings below one comparison."""
    random_cells = {
        "box": [[["std1", 0], ["sep2", 1]], [["sep1+dil3", 0], ["std2", 2]], [["std1+dil2", 1], ["sep1", 3]]]
    }
    random_cells["cls"] = [[["sep3", 0], ["sep1", 1]], [["std2+dil2", 0], ["std1", 1]], [["sep2", 0], ["std3", 2]]]
    make_search(folder / "search", data)
    make_train(folder / "train-plain", data, 0.36, None, 1)
    make_train(folder / "train-random", data, 0.39, make_card(random_cells, "fad-random"), 2)
    make_train(folder / "train-searched", data, 0.402, make_card(), 3)
    rows = [
        {
            "name": "plain towers",
            "AP": 0.36,
            "AP50": 0.54,
            "parameters": 3_262_000,
            "macs": 8.7e8,
            "train_seconds": 101.0,
        },
        {
            "name": "random cells",
            "AP": 0.39,
            "AP50": 0.58,
            "parameters": 3_201_000,
            "macs": 8.4e8,
            "train_seconds": 133.5,
        },
        {
            "name": "searched cells",
            "AP": 0.402,
            "AP50": 0.6,
            "parameters": 3_262_500,
            "macs": 8.69e8,
            "train_seconds": 139.9,
            "card": "search/card.json",
        },
    ]
    budget = {"train_steps": 600, "images_per_step": 4, "search_steps": 400}
    write(folder / "demo.json", {"rows": rows, "budget": budget, "notes": ["The search itself took 143 s more."]})
    write(
        folder / "run.json",
        make_info(
            "demo",
            data,
            command=["nasdet", "demo", "--out", folder.name],
            arguments={"out": folder.name},
            seconds=431.0,
        ),
    )
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Shared: not to be written to, but for report.html."""
    return make_demo(tmp_path_factory.mktemp("runs") / "demo", data)


@pytest.fixture
def search(tmp_path: Path, data: Path) -> Path:
    return make_search(tmp_path / "search", data)


@pytest.fixture
def train(tmp_path: Path, data: Path) -> Path:
    return make_train(tmp_path / "train", data, 0.4, make_card())


@pytest.fixture(scope="session")
def fake() -> SimpleNamespace:
    """The builders above, for tests that need a folder of their own."""
    return SimpleNamespace(**{name: value for name, value in globals().items() if name.startswith(("make_", "write"))})


class Page(HTMLParser):
    """A parsed page that fails where tags do not close in order."""

    VOID = {"meta", "img", "br", "link", "input", "hr"}

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.headings: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-3:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            self.words.append(data)
        if self._open and self._open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="session")
def parse() -> type[Page]:
    return Page
