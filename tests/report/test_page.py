from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nasdet.cli import report as verb
from nasdet.report import write_report
from nasdet.report.page import LIMIT

HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)> $\\frac{1}{2}$"


def make(parse: Any, run: Path) -> Any:
    return parse(write_report(run).read_text(encoding="utf-8"))


def check_self_contained(page: Any, source: str) -> None:
    """One file: nothing is fetched, ids are unique, links lead somewhere, and pictures have words."""
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for key in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            value = attributes.get(key)
            if value is not None:
                embedded = value.startswith(("data:image/jpeg;base64,", "data:image/png;base64,"))
                assert embedded or value[1:] in ids, (key, value[:60])
    assert "url(" not in source and "@import" not in source and "http:" not in source and "https:" not in source
    assert all(attributes.get("alt") for attributes in page.all("img"))
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in page.all("svg"))
    assert len(source.encode()) <= LIMIT


def test_demo_page(demo: Path, parse: Any) -> None:
    path = write_report(demo)
    assert path == demo / "report.html"
    source = path.read_text(encoding="utf-8")
    page = parse(source)
    check_self_contained(page, source)
    main = [h for h in page.headings if h in ("Result", "Search", "Train searched", "Train plain", "Train random")]
    assert main == ["Result", "Search", "Train searched", "Train plain", "Train random"]
    assert page.headings[-1] == "Deviations from the paper"
    assert "searched cells: +4.2 AP against plain towers, +1.2 AP against random cells." in page.text
    assert "one training run with one seed" in page.text
    assert len(page.all("img")) == 3 * 8 * 2
    # The searched card is retrained: its cells are drawn once, the random ones too.
    assert sum(svg.get("class") == "cell" for svg in page.all("svg")) == 4
    assert "the same architecture as under “search”" in page.text
    # Recorded by the parent and all its sub-runs, told once.
    assert page.text.count("The pictures are 320 pixels wide") == 1


def test_deviations_say_where_they_hold(tmp_path: Path, parse: Any, fake: SimpleNamespace) -> None:
    fake.write(tmp_path / "run.json", {"verb": "demo"})
    fake.write(tmp_path / "search" / "run.json", {"deviations": ["both", "one only"]})
    fake.write(tmp_path / "train-plain" / "run.json", {"deviations": ["both"]})
    assert "both one only (search)" in make(parse, tmp_path).text


def test_same_files_give_the_same_page(search: Path) -> None:
    assert write_report(search).read_bytes() == write_report(search).read_bytes()


SECTIONS = {
    "card.json": "Architecture",
    "alphas.jsonl": "How the search decided",
    "metrics.jsonl": "Loss and AP",
    "detections.json": "Detections",
    "eval.json": "Average precision",
    "run.json": "Deviations from the paper",
}


@pytest.mark.parametrize("missing", SECTIONS)
def test_a_section_is_there_when_its_file_is(
    missing: str, tmp_path: Path, data: Path, fake: SimpleNamespace, parse: Any
) -> None:
    run = fake.make_train(tmp_path / "run", data, 0.4, fake.make_card())
    fake.write_lines(run / "alphas.jsonl", fake.make_alphas(100, 20))
    assert set(SECTIONS.values()) <= set(make(parse, run).headings)
    (run / missing).unlink()
    headings = make(parse, run).headings
    gone = {SECTIONS[missing]}
    assert set(SECTIONS.values()) - set(headings) == gone


def test_cost_section(train: Path, parse: Any) -> None:
    assert "By part at 240 × 320 pixels" in make(parse, train).text
    assert "total 3.26 M 869 M" in make(parse, train).text
    for name in ("cost.json", "metrics.jsonl"):
        (train / name).unlink()
    assert "Cost" not in make(parse, train).headings


def test_a_run_that_has_just_begun(tmp_path: Path, parse: Any, fake: SimpleNamespace) -> None:
    fake.write(tmp_path / "run.json", {"verb": "train", "status": "running", "seed": 3})
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "alphas.jsonl").write_text("")
    page = make(parse, tmp_path)
    assert "running" in page.text and page.all("section") == []


def test_command_is_shown_only_as_recorded(search: Path, parse: Any, fake: SimpleNamespace, data: Path) -> None:
    assert f"nasdet search fad --data {data} --out 'runs/my run'" in make(parse, search).text
    info = json.loads((search / "run.json").read_text())
    del info["command"]
    fake.write(search / "run.json", info)
    page = make(parse, search)
    assert "nasdet search fad --data" not in page.text and "all settings" in page.text


def test_error_of_a_failed_run_is_told(tmp_path: Path, parse: Any, fake: SimpleNamespace) -> None:
    fake.write(tmp_path / "run.json", {"verb": "train", "status": "failed", "error": "training stopped at step 7"})
    page = make(parse, tmp_path)
    assert "training stopped at step 7" in page.text and {"class": "chip bad"} in page.all("span")


def test_hostile_names_are_text(tmp_path: Path, fake: SimpleNamespace, parse: Any) -> None:
    data = fake.make_data(tmp_path / "data", 2)
    file = data / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    for category in content["categories"]:
        category["name"] = HOSTILE
    fake.write(file, content)
    genotype = {HOSTILE: [[[HOSTILE, 0], ["std1", 1]]], "cls": [[["sep1", 0], ["sep1", 1]]]}
    run = fake.make_train(tmp_path / "run" / HOSTILE.replace("/", "-"), data, 0.4, fake.make_card(genotype, HOSTILE))
    info = fake.make_info(HOSTILE, data, choices={HOSTILE: [HOSTILE, "none"]}, deviations=[HOSTILE], error=HOSTILE)
    fake.write(run / "run.json", {**info, "command": ["nasdet", HOSTILE], "arguments": {HOSTILE: HOSTILE}})
    fake.write(run / "eval.json", {"AP": 0.1, "per_category": {HOSTILE: 0.1}})
    fake.write(run / "cost.json", {"size": [HOSTILE, 3], "parts": [{"name": HOSTILE, "macs": 3}]})
    fake.write(
        run / "demo.json", {"rows": [{"name": HOSTILE, "AP": 0.1}], "budget": {HOSTILE: HOSTILE}, "notes": [HOSTILE]}
    )
    fake.write_lines(
        run / "metrics.jsonl", [{"step": 1, HOSTILE: 1.0, "loss": 2.0}, {"step": 2, HOSTILE: 3.0, "loss": 1.0}]
    )
    rows = [{"step": step, "alphas": {HOSTILE: [[0.0, step], [0.0, 0.1]]}} for step in (0, 1)]
    fake.write_lines(run / "alphas.jsonl", rows)
    source = write_report(run).read_text(encoding="utf-8")
    page = parse(source)
    assert len(page.all("script")) == 1 and all(image["src"].startswith("data:") for image in page.all("img"))
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    check_self_contained(page, source)
    assert page.text.count(HOSTILE) >= 10


def test_torn_and_foreign_lines_are_left_out(search: Path, parse: Any) -> None:
    before = parse(write_report(search).read_text())
    for name in ("metrics.jsonl", "alphas.jsonl"):
        with open(search / name, "ab") as file:
            file.write(
                b'\xff\xfe\n[1, 2]\n"text"\n{"step": "three"}\n{"alphas": {"box": 3}, "step": 5}\n{"step": 410, "lo'
            )
    after = parse(write_report(search).read_text())
    assert after.text == before.text


def test_nan_in_metrics_is_said_and_not_drawn(tmp_path: Path, parse: Any) -> None:
    lines = [
        f'{{"step": {step}, "loss": {"NaN" if step == 3 else 1.0 / step}, "lr": Infinity}}' for step in range(1, 6)
    ]
    lines.append(f'{{"step": 6, "loss": {"9" * 400}}}')
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    source = write_report(tmp_path).read_text()
    assert "Not finite at step 1: lr." in parse(source).text
    drawn = "".join(re.findall(r"<svg.*?</svg>", source, re.DOTALL))
    assert drawn and "nan" not in drawn.lower() and "inf" not in drawn.lower()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("run.json", "{", "not valid JSON"),
        ("card.json", "[1]", "must be a JSON object, got a list"),
        ("cost.json", "{}", "'parts' must be a list, got nothing"),
        ("cost.json", '{"parts": [3]}', r"parts\[0\] must be an object, got a int"),
        ("demo.json", '{"rows": {}}', "'rows' must be a list, got a dict"),
        ("eval.json", "\x00", "not valid JSON"),
        ("split.json", "nonsense", "not valid JSON"),
        ("erf.json", "{}", "'maps' must be a list, got nothing"),
        ("erf.json", '{"maps": [3]}', r"maps\[0\] must be an object, got a int"),
        ("erf.json", '{"maps": [{"rows": []}]}', r"maps\[0\] must have rows, got a list"),
        ("erf.json", '{"maps": [{"rows": [[1], [1, 2]]}]}', r"maps\[0\] must have rows of one length"),
        ("erf.json", '{"maps": [{"rows": [[1, null]]}]}', r"maps\[0\] must have finite numbers"),
        ("detections.json", "{}", "must be a list of COCO results"),
        ("detections.json", '[{"image_id": [1]}]', r"\[0\] must be a COCO result with an integer image_id"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_malformed_file_is_named_and_costs_nothing(name: str, content: str, words: str, search: Path) -> None:
    old = write_report(search).read_bytes()
    (search / name).write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        write_report(search)
    assert str(search / name) in str(caught.value)
    assert (search / "report.html").read_bytes() == old


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_not_a_run(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    if kind == "empty":
        path.mkdir()
    elif kind == "file":
        path.write_text("")
    with pytest.raises(ValueError, match="folder"):
        write_report(path)


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ({"rows": []}, "no rows yet"),
        ({"rows": [{}]}, "?"),
        (
            {"rows": [{"name": "searched", "AP": 0.3}, {"name": "plain", "AP": 0.35}]},
            "searched: −5.0 AP against plain.",
        ),
        ({"rows": [{"name": "searched", "AP": 0.3}, {"name": "plain", "AP": 0.3}]}, "searched: ±0.0 AP against plain."),
        ({"rows": [{"name": "a", "AP": 0.3, "AP_std": 0.01, "seeds": 3}]}, "30.0 ± 1.0"),
        ({"rows": [{"name": "a", "AP": None, "AP50": "x"}], "budget": [], "notes": 3}, "–"),
    ],
    ids=["none", "nameless", "worse", "equal", "seeds", "odd"],
)
def test_comparison_says_what_is_there(
    content: Any, shown: str, tmp_path: Path, parse: Any, fake: SimpleNamespace
) -> None:
    fake.write(tmp_path / "demo.json", content)
    assert shown in make(parse, tmp_path).text


def test_card_of_another_method(tmp_path: Path, fake: SimpleNamespace, parse: Any) -> None:
    genotype = {"stages": [{"dilations": [1, 2, [1, 3]], "channels": [16, 32, 16]}] * 4}
    fake.write(tmp_path / "card.json", fake.make_card(genotype, "nats-r50", "nats"))
    page = make(parse, tmp_path)
    assert "Architecture" in page.headings and '"dilations"' in page.text and not page.all("svg")


def test_pictures_shrink_until_the_page_is_small_enough(tmp_path: Path, fake: SimpleNamespace, parse: Any) -> None:
    from PIL import Image

    data = fake.make_data(tmp_path / "data", 8)
    for file in (data / "val").iterdir():
        Image.effect_noise((640, 480), 120).convert("RGB").save(file)
    for name in ("train-plain", "train-random"):
        fake.make_train(tmp_path / "run" / name, data, 0.4, None)
    path = write_report(tmp_path / "run")
    assert 300_000 < path.stat().st_size <= LIMIT
    assert parse(path.read_text()).all("img")


def test_without_matplotlib_the_rest_is_there(search: Path, parse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = make(parse, search)
    assert "pip install matplotlib" in page.text and "Architecture" in page.headings


def test_import_is_light() -> None:
    code = "import sys, nasdet.report, nasdet.cli.report; print([m for m in ('PIL', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_command_line(search: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    verb.configure(parser)
    out = tmp_path / "pages" / "page.html"
    assert verb.run(**vars(parser.parse_args([str(search), "--out", str(out)]))) == 0
    assert capsys.readouterr().out == f"{out}\n" and out.read_text().startswith("<!DOCTYPE html>")
    assert verb.run(**vars(parser.parse_args([str(search)]))) == 0
    assert (search / "report.html").is_file() and verb.HELP


def test_page_follows_the_theme(search: Path) -> None:
    source = write_report(search).read_text()
    drawn = re.findall(r'<svg class="chart".*?</svg>', source, re.DOTALL)
    assert drawn
    for svg in drawn:
        # Every colour is one of the page's variables, so charts are readable in light, dark and print.
        assert "var(--muted)" in svg and not re.findall(r"(?:stroke|fill): #\w+", svg)


def test_copied_run_without_its_data(train: Path, parse: Any, fake: SimpleNamespace, tmp_path: Path) -> None:
    info = json.loads((train / "run.json").read_text())
    for data, words in (
        (str(tmp_path / "gone"), "cannot be reached"),
        (None, "cannot be reached"),
        (str(train), "list the"),
    ):
        fake.write(train / "run.json", {**info, "data": data, "arguments": {}})
        page = make(parse, train)
        assert words in page.text and not page.all("img")


def test_subfolders_that_are_no_runs_are_left_alone(search: Path, parse: Any) -> None:
    shutil.copytree(search, search / "checkpoints")
    (search / "checkpoints" / "run.json").unlink()
    assert "Checkpoints" not in make(parse, search).headings
