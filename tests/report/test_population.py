"""The page of an evolutionary search: candidates by generation, the Pareto front, and the best path."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest

from nasdet.report import write_report
from nasdet.report.blocks import path_figure, stages_of
from nasdet.report.population import Point, _ticks, costs_of, front, points, population_section, progress, scatter
from nasdet.search.constraints import Constraint
from nasdet.search.evolution import Evolution
from nasdet.spaces.detnas import DetNASSpace

CARD: dict[str, Any] = {
    "schema_version": 1,
    "method": "detnas",
    "name": "found",
    "genotype": ["sh3", "sh7", "xcep", "sh5", "sh3", "sh3", "xcep", "sh5"],
    "settings": {"stem": 8, "channels": [16, 32, 64, 96], "blocks": [1, 2, 3, 2], "last": 128},
}


def candidate(score: float | None, macs: float, operator: str = "random") -> dict[str, Any]:
    return {"card": CARD, "operator": operator, "costs": {"macs": macs, "parameters": macs / 2}, "score": score}


CONTENT: dict[str, Any] = {
    "state": {
        "generations": [
            [candidate(0.10, 2e6), candidate(0.30, 5e6), candidate(0.30, 4e6)],
            [candidate(0.25, 3e6, "mutate"), candidate(0.40, 6e6, "crossover"), candidate(None, 1e6)],
        ]
    }
}


def test_points_are_the_scored_candidates() -> None:
    assert costs_of(CONTENT) == ["macs", "parameters"]
    found = points(CONTENT, "macs")
    assert found[0] == Point(2e6, 0.10, 1, "random") and len(found) == 5, "what has no score yet is left out"
    assert [point.cost for point in points(CONTENT)] == [1, 2, 3, 4, 5], "without a cost: in their order"
    assert points(CONTENT, "latency") == []


def test_front() -> None:
    found = points(CONTENT, "macs")
    assert [(point.cost, point.score) for point in front(found)] == [(2e6, 0.1), (3e6, 0.25), (4e6, 0.3), (6e6, 0.4)]
    rng = Random(0)
    many = [Point(rng.random(), rng.random(), 1, "") for _ in range(300)]
    kept = front(many)
    for point in many:
        beaten = any(other.cost <= point.cost and other.score > point.score for other in many)
        assert (point in kept) == (not beaten)
    assert front([]) == []


def circles(svg: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'<circle[^>]* cx="([\d.]+)" cy="([\d.]+)"', svg)]


def test_scatter_places_every_candidate() -> None:
    found = points(CONTENT, "macs")
    drawn = circles(scatter(found, "macs"))
    assert len(drawn) == 5
    for (x, y), point in zip(drawn, found, strict=True):
        for (other_x, other_y), other in zip(drawn, found, strict=True):
            assert (x < other_x) == (point.cost < other.cost) and (y < other_y) == (point.score > other.score)
        assert 44 <= x <= 448 and 10 <= y <= 226
    shown = scatter(found, "macs")
    assert "generation 2, crossover: 40.0 at 6 M" in shown and "5 candidates; best 40.0 at 6 M macs" in shown
    assert shown.count('class="best"') == 1 and "Pareto front" in shown and "multiply-accumulates" in shown
    assert "Pareto" not in scatter(points(CONTENT), None)


@pytest.mark.parametrize("same", [0.0, 0.25], ids=["nothing found", "all alike"])
def test_scatter_of_equals(same: float) -> None:
    assert circles(scatter([Point(5.0, same, 1, "random")] * 2, "macs"))


def test_progress_needs_two_generations() -> None:
    shown = progress(points(CONTENT))
    assert "best so far 30.0 to 40.0; best 30.0 to 40.0; mean 23.3 to 32.5" in shown
    assert progress(points(CONTENT)[:3]) == ""


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.21, 0.23), (8.9e6, 14.8e6), (-3.0, 17.0), (0.95, 1.05)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = _ticks(low, high)
    assert 2 <= len(found) <= 6 and low <= found[0] and found[-1] <= high
    assert all(value == pytest.approx(float(f"{value:.3g}")) for value in found)


def test_section() -> None:
    shown = population_section(CONTENT)
    assert shown.count("<svg") == 3 and "The Pareto front" in shown and "2 M" in shown
    assert population_section({"state": {"generations": [[candidate(None, 1.0)]]}}) == ""
    assert population_section(None) == population_section({}) == population_section({"state": {"generations": 3}}) == ""
    bare = {"state": {"generations": [[{"score": 0.5, "costs": {}}]]}}
    assert population_section(bare).count("<svg") == 1


def test_path_by_stage() -> None:
    stages = stages_of(CARD)
    assert stages == [["sh3"], ["sh7", "xcep"], ["sh5", "sh3", "sh3"], ["xcep", "sh5"]]
    shown = path_figure(stages)
    assert shown.count("<rect") == 8 and "stage 3, block 1: 5×5" in shown and "3×3 (3)" in shown
    fills = dict(re.findall(r'fill:(var\(--c\d\))"><title>stage \d, block \d: ([^<]+)<', shown))
    assert len(fills) == 4, "a colour for each choice"
    assert "stage 2: sh7 xcep" in shown


@pytest.mark.parametrize("genotype", [None, {}, [], [1, 2], {"box": [[["std1", 0]]]}])
def test_other_genotypes_are_no_paths(genotype: Any) -> None:
    assert stages_of(CARD | {"genotype": genotype}) == []


@pytest.mark.parametrize("settings", [None, {}, {"blocks": [1, 2]}, {"blocks": [True] * 8}, {"blocks": "8"}])
def test_without_stages_a_path_is_one_row(settings: Any) -> None:
    assert stages_of(CARD | {"settings": settings}) == [CARD["genotype"]]


@pytest.mark.parametrize(
    ("verb", "metric", "title", "other"),
    [
        ("search detnas", "AP", "AP", "accuracy"),
        ("search classification", "top-1 accuracy", "Top-1 accuracy", "AP"),
    ],
    ids=["detnas", "classification"],
)
def test_page_of_a_search(verb: str, metric: str, title: str, other: str, tmp_path: Path) -> None:
    """From the state that a search really has; its scores are named as what they are, everywhere."""
    space = DetNASSpace("tiny")
    macs = Constraint("macs", lambda card: space.macs(card.genotype))
    search = Evolution(space, constraints=[macs], population=4, parents=2, generations=3)
    rng = Random(0)
    while not search.done:
        search.tell(search.ask(), rng.random())
    best, _ = search.best()
    for name, content in (
        ("run.json", {"verb": verb, "status": "done"}),
        ("card.json", best.to_json()),
        ("evolution.json", {"of": {}, "state": search.state_dict()}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
    page = write_report(tmp_path).read_text()
    assert '<section id="population"' in page and "12 candidates" in page and "The path" in page
    assert page.count("<rect") >= 8 and "the genotype as the card has it" not in page
    _, _, section = page.partition('<section id="population"')
    section = section.partition("</section>")[0]
    for words in (
        f"<b>{title} against multiply-accumulates</b>",
        f"</b> {metric} in points",
        f'aria-label="{metric} by generation',
        f'<th scope="col">{metric}</th>',
        f"beats in {metric} at this cost",
    ):
        assert words in section, words
    assert other not in section


def test_a_malformed_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "evolution.json").write_text('{"state": []}')
    with pytest.raises(ValueError, match="evolution.json: 'state' must be a dict, got a list"):
        write_report(tmp_path)
