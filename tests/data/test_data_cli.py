"""``nasdet data``: arguments, output and exit codes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest

from nasdet.cli import data


def call(*words: object) -> int:
    parser = argparse.ArgumentParser(prog="nasdet data")
    data.configure(parser)
    return data.run(**vars(parser.parse_args([str(word) for word in words])))


def test_digits_then_check(tmp_path, capsys):
    out = tmp_path / "digits"
    assert call("digits", "--out", out, "--train", 5, "--val", 2, "--size", "64x96", "--seed", 4) == 0
    assert "train: 5 images" in capsys.readouterr().out
    assert call("check", out, "--masks", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layout"] == "coco"
    assert report["categories"] == list("0123456789")
    assert (report["data"]["train"]["images"], report["data"]["test"]["images"]) == (5, 2)
    train = report["data"]["train"]
    assert train["objects"] == sum(train["per_class"].values()) == sum(train["per_size"].values()) > 0
    split = report["split"]
    assert (split["search_train"], split["search_val"], split["test"], len(split["sha256"])) == (3, 2, 2, 64)
    assert report["skipped"] == {}
    assert call("check", out) == 0
    text = capsys.readouterr().out
    assert f"{split['sha256']}" in text and "no problem found" in text


def test_check_finds_a_truncated_image_and_skips_it_when_told(make_coco, capsys):
    folder = make_coco()
    path = folder / "train" / "3.png"
    path.write_bytes(path.read_bytes()[:40])
    assert call("check", folder) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"error: {path}: image 3 (3.png): truncated or unreadable image: " in captured.err
    assert call("check", folder, "--skip-bad") == 0
    assert f"skipped 1 x truncated or unreadable image; first: {path}: image 3" in capsys.readouterr().out


def test_refusals_are_one_line_and_exit_one(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert call("digits", "--out", tmp_path, "--train", 2, "--val", 1) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "is not empty" in error
    assert call("check", tmp_path) == 1
    assert "not a data folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("size", ["64", "64x", "x64", "-1x64", "64x64x3"])
def test_a_bad_size_is_a_usage_error(tmp_path, capsys, size):
    with pytest.raises(SystemExit) as caught:
        call("digits", "--out", tmp_path / "out", f"--size={size}")
    assert caught.value.code == 2
    assert "must be HxW, as in 192x256" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["digits", "--help"], ["check", "--help"]], ids=" ".join)
def test_help_teaches_by_example(capsys, words):
    with pytest.raises(SystemExit) as caught:
        call(*words)
    assert caught.value.code == 0
    assert "examples:\n  nasdet data " in capsys.readouterr().out


def test_importing_loads_nothing_heavy():
    heavy = ("PIL", "pycocotools", "sklearn", "matplotlib", "tensorboard")
    code = f"import sys, nasdet.data, nasdet.cli.data; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
