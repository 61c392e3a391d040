"""MSNAS's stride path on the page of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nasdet.arch import load_card
from nasdet.report import write_report
from nasdet.report.strides import stride_figure, stride_path

H = 0.5
GENOTYPE: dict[str, Any] = {"strides": [1, 2, H, 2, H], "heads": [4, 4, 4, 8, 8], "laterals": [[3, 1], [4, 2], [5, 3]]}


def test_path_of_a_genotype() -> None:
    path = stride_path(GENOTYPE)
    assert path is not None
    assert path.rows == (4, 4, 8, 4, 8, 4) and path.laterals == ((3, 1), (4, 2), (5, 3))
    assert path.heads == {5: (1, 2, 3), 4: (4, 5)}


@pytest.mark.parametrize("name", ["msnas-r18-1", "msnas-r34-1", "msnas-r50-3"])
def test_paths_are_those_of_the_space(name: str) -> None:
    from nasdet.spaces.msnas import head_blocks, resolutions

    genotype = load_card(name).genotype
    path = stride_path(genotype)
    assert path is not None and list(path.rows[1:]) == resolutions(genotype["strides"])
    read = {head: block for block, heads in path.heads.items() for head in heads}
    assert [read[head] for head in range(1, 6)] == head_blocks(genotype["strides"], genotype["heads"])


@pytest.mark.parametrize(
    "genotype",
    [
        None,
        {},
        {"layer1": [[1, 16]]},
        GENOTYPE | {"strides": [1, 3]},
        GENOTYPE | {"strides": [H]},
        GENOTYPE | {"strides": "12"},
        GENOTYPE | {"heads": [4, 4, 4, 4, 64]},
        GENOTYPE | {"heads": []},
        GENOTYPE | {"laterals": [[9, 1]]},
        GENOTYPE | {"laterals": [3]},
    ],
    ids=str,
)
def test_nothing_else_is_a_path(genotype: Any) -> None:
    assert stride_path(genotype) is None


def test_figure_draws_blocks_laterals_and_heads() -> None:
    path = stride_path(GENOTYPE)
    assert path is not None
    svg = stride_figure(path)
    assert len(re.findall(r'<circle class="block', svg)) == 6  # with the stem
    assert len(re.findall(r'class="lateral"', svg)) == 3
    assert re.findall(r'<text class="heads"[^>]*>([^<]+)<', svg) == ["heads 1, 2, 3", "heads 4, 5"]
    heights = [float(y) for y in re.findall(r'class="block[^"]*" cx="\d+" cy="(\d+)"', svg)]
    assert heights[0] == heights[1] == heights[3] == heights[5] < heights[2] == heights[4]
    assert "Laterals: 3 from 1, 4 from 2, 5 from 3. Heads 1, 2, 3 read block 5; heads 4, 5 read block 4." in svg


def test_page_of_a_run_has_the_path(tmp_path: Path) -> None:
    card = load_card("msnas-r18-1").to_json()
    (tmp_path / "card.json").write_text(json.dumps(card))
    page = write_report(tmp_path).read_text()
    assert "The path of strides" in page and page.count('class="lateral"') == 5
