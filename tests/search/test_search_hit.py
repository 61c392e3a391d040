"""A Hit-Detector search on a real, small data folder: schedule, cost, what it records and finds, memory, screening."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nasdet.arch import load_card
from nasdet.data import DataFolder
from nasdet.engine import hit_run
from nasdet.engine.checkpoint import load_checkpoint
from nasdet.engine.hit_config import HitSearchConfig, deviations
from nasdet.engine.hit_run import build_supernet
from nasdet.engine.screen_hit import _record, load_screening, screen_hit
from nasdet.engine.search_hit import GIGA, search_hit
from nasdet.search.gradient import Bilevel
from nasdet.spaces.assemble import ModelConfig, build_model
from nasdet.spaces.hit import (
    OPERATIONS,
    SUBSPACES,
    HitBackbone,
    HitHead,
    HitNeck,
    Screening,
    decode,
    expected_cost,
    mixed_layers,
)

Records = Callable[[Path, str], list[dict[str, Any]]]
PARTS = ("backbone", "neck", "head")


@pytest.fixture(scope="module")
def config(cases: dict[str, Any]) -> HitSearchConfig:
    found: HitSearchConfig = cases["hit"].config
    return found


@pytest.fixture(scope="module")
def whole(finished: Callable[[str], Path]) -> Path:
    return finished("hit")


def test_the_papers_schedule() -> None:
    paper = HitSearchConfig()
    total = paper.total_steps(59_000)
    assert total == 12 * 1844 and paper.alphas_from(total) == 5 * 1844, "alphas from the sixth epoch on"
    assert paper.epoch_ends(total) == [1844 * epoch for epoch in range(1, 13)]
    schedule = paper.schedule(total)
    assert schedule.at(500) == pytest.approx(0.04, rel=2e-3) and schedule.at(total) == pytest.approx(0, abs=1e-9)
    assert dataclasses.replace(paper, steps=10, frozen_epochs=11).alphas_from(1) == 0, "a single step moves the alphas"


def test_the_papers_spaces() -> None:
    joint = HitSearchConfig().search_space()
    assert joint.size() == 8**32 and joint.candidates == {part: SUBSPACES[part] for part in PARTS}
    screened = HitSearchConfig(stage="screen").search_space()
    assert screened.candidates == dict.fromkeys(PARTS, tuple(OPERATIONS))
    assert sum(blocks for _, blocks, _ in screened.sizes.stages) == 10, "half the blocks"
    retina = HitSearchConfig(detector="retinanet").search_space()
    assert retina.parts == ("backbone", "neck", "towers") and retina.sizes.pyramid() == ("c3", "c4", "c5", "c6", "c7")


def test_records(whole: Path, records: Records) -> None:
    run = json.loads((whole / "run.json").read_text())
    assert run["alphas_from"] == 2 and run["epoch_ends"] == [1, 2, 3, 4, 5, 6]
    assert run["choices"] == dict.fromkeys(PARTS, ["ir_k3_d1_e1", "sep_k3_d2", "conv_k3_d1"])
    forecast = run["memory_forecast"]
    assert forecast["step"] + forecast["state"] == forecast["total"] > forecast["step"] > 1e6
    assert 0.85 * forecast["total"] < run["memory_measured"] < 1.15 * forecast["total"]
    metrics, alphas = records(whole, "metrics.jsonl"), records(whole, "alphas.jsonl")
    assert ["arch_loss" in line for line in metrics] == [False, False, True, True, True, True]
    assert {"loss", "loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box", "lr", "grad_norm"} <= set(metrics[0])
    assert [[len(line["alphas"][part]) for part in PARTS] for line in alphas] == [[6, 8, 2]] * 7
    assert alphas[0]["alphas"] == alphas[2]["alphas"] != alphas[3]["alphas"], "no alpha moves in the first third"


def test_the_cost_is_the_expected_one(whole: Path, config: HitSearchConfig, records: Records) -> None:
    """Step 4 steps from the alphas of line 3: its expected cost is the sum over the softmax of those."""
    costs = config.search_space().macs((64, 64), 10)
    names = config.candidates
    alphas, line = records(whole, "alphas.jsonl")[3]["alphas"], records(whole, "metrics.jsonl")[3]
    for part in PARTS:
        table = costs.parts[part]
        shares = torch.tensor(alphas[part], dtype=torch.float64).softmax(1)
        rows = torch.tensor([[row[name] for name in names] for row in table.rows], dtype=torch.float64)  # type: ignore[union-attr]
        assert line[f"expected_{part}"] == pytest.approx(float((shares * rows).sum() + table.fixed) / GIGA, rel=1e-6)


def test_a_heavy_cost_finds_a_cheaper_net(
    whole: Path, config: HitSearchConfig, data: DataFolder, records: Records, tmp_path: Path
) -> None:
    heavy = dataclasses.replace(config, cost_weight=1.0, target=1e-6)
    card = search_hit(heavy, data, tmp_path, progress=False)
    costs = config.search_space().macs((64, 64), 10)
    cheapest = {part: [min(row, key=lambda n, r=row: r[n]) for row in costs.parts[part].rows] for part in PARTS}  # type: ignore[misc]  # mypy cannot infer a lambda's default
    assert card.genotype == cheapest and costs(card.genotype) < costs(load_card(whole / "card.json").genotype)
    totals = [sum(line[f"expected_{part}"] for part in PARTS) for line in records(tmp_path, "metrics.jsonl")[2:]]
    assert totals == sorted(totals, reverse=True) and totals[0] > totals[-1]


def test_card_is_the_decoded_alphas_and_builds(whole: Path, config: HitSearchConfig, records: Records) -> None:
    card, space = load_card(whole / "card.json"), config.search_space()
    assert card.genotype == decode(records(whole, "alphas.jsonl")[-1]["alphas"], space.candidates)
    assert card.name == "hit-tiny-faster_rcnn-seed3" and card.settings == space.settings()
    derived = ModelConfig.load(whole / "model.json")
    model: Any = build_model(derived)
    assert derived.card == card and isinstance(model.backbone, HitBackbone) and isinstance(model.neck, HitNeck)
    assert any(isinstance(module, HitHead) for module in model.modules())


def test_all_parts_are_supernets(config: HitSearchConfig) -> None:
    for detector, last, count in (("faster_rcnn", "head", 2), ("retinanet", "towers", 4)):
        one = dataclasses.replace(config, detector=detector)
        model = build_supernet(one, one.search_space(), one.model(("a",)))
        found = {part: len(layers) for part, layers in mixed_layers(model).items()}
        assert found == {"backbone": 6, "neck": 8 if last == "head" else 6, last: count}
        assert expected_cost(model, one.search_space().macs()).keys() == found.keys()


@pytest.mark.parametrize("parts", [["backbone"], ["neck"], ["head"], ["neck", "head"]], ids="+".join)
def test_parts_alone(parts: list[str], config: HitSearchConfig, data: DataFolder, tmp_path: Path) -> None:
    """Table 5: some parts are searched, the others are plain; the neck then fits the plain backbone."""
    short = dataclasses.replace(config, steps=1, parts=parts, backbone="resnet18", width=0.125)
    card = search_hit(short, data, tmp_path, progress=False)
    assert list(card.genotype) == parts
    model: Any = build_model(ModelConfig.load(tmp_path / "model.json"))
    assert isinstance(model.backbone, HitBackbone) == ("backbone" in parts)
    assert isinstance(model.neck, HitNeck) == ("neck" in parts)
    line = json.loads((tmp_path / "run.json").read_text())["deviations"]
    assert any(text.startswith(f"{', '.join(parts)} alone") for text in line)


def test_recompute_repeats_the_full_search(
    whole: Path, config: HitSearchConfig, data: DataFolder, records: Records, tmp_path: Path
) -> None:
    """The same numbers to rounding, for less memory."""
    search_hit(dataclasses.replace(config, memory="recompute"), data, tmp_path, progress=False)
    ours, theirs = (records(out, "metrics.jsonl") for out in (tmp_path, whole))
    for a, b in zip(ours[:4], theirs[:4], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    less, more = (json.loads((out / "run.json").read_text())["memory_forecast"]["step"] for out in (tmp_path, whole))
    assert less < 0.8 * more


def test_only_the_drawn_learn(
    cases: dict[str, Any], data: DataFolder, finished: Callable[[str], Path], records: Records, tmp_path: Path
) -> None:
    """Two of three candidates are drawn in each layer; the cost, of all of them, moves the third too."""

    def moved(out: Path) -> int:
        before, after = (torch.tensor(line["alphas"]["towers"]) for line in records(out, "alphas.jsonl")[2:4])
        return int((before != after).sum())

    assert moved(finished("hit in one stage")) == 12
    search_hit(dataclasses.replace(cases["hit in one stage"].config, cost_weight=0.0), data, tmp_path, progress=False)
    assert moved(tmp_path) == 8


@contextlib.contextmanager
def without_forecast() -> Iterator[None]:
    """Tracing takes longer than these runs; it is tested above."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hit_run, "forecast_step", lambda *_: {"step": 1, "state": 1, "total": 2})
        yield


@pytest.fixture
def no_forecast() -> Iterator[None]:
    with without_forecast():
        yield


def screening(config: HitSearchConfig, stage: str, **changes: Any) -> HitSearchConfig:
    names = ["ir_k3_d1_e1", "sep_k3_d2", "conv_k3_d1", "conv_k3_d2"]
    own: dict[str, Any] = {"keep": 2, "removal_epoch": 4, "backbone": "resnet18", "width": 0.125, "candidates": names}
    return dataclasses.replace(config, stage=stage, **own | changes)


@pytest.fixture(scope="module")
def everything(config: HitSearchConfig, data: DataFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Screening of all parts, then the joint search."""
    out = tmp_path_factory.mktemp("hit") / "all"
    with without_forecast():
        search_hit(screening(config, "all"), data, out, progress=False)
    return out


def test_screening_then_joint(everything: Path, config: HitSearchConfig) -> None:
    found = json.loads((everything / "screening.json").read_text())
    assert list(found["kept"]) == list(PARTS) and load_screening(everything) == found["kept"]
    for part in PARTS:
        record = Screening.from_json(found["parts"][part])
        assert record.left == found["kept"][part] and len(record.left) == 2
        assert [len(entry["removed"]) for entry in record.history] == [0, 0, 0, 1, 1, 0]
        assert [len(entry["scores"]) for entry in record.history] == [4, 4, 4, 4, 3, 2]
        assert all(sum(entry["scores"].values()) == pytest.approx(1) for entry in record.history)
        for entry in record.history:
            assert all(entry["scores"][name] <= min(entry["scores"].values()) for name in entry["removed"])
        sub = everything / f"screen-{part}"
        assert json.loads((sub / "screening.json").read_text()) == found["parts"][part]
        card = load_card(sub / "card.json")
        assert list(card.genotype) == [part] and set(card.genotype[part]) <= set(record.left)
    card, run = load_card(everything / "card.json"), json.loads((everything / "run.json").read_text())
    assert run["choices"] == found["kept"] == run["arguments"]["candidates"]
    assert all(set(card.genotype[part]) <= set(found["kept"][part]) for part in PARTS)


def test_alphas_that_went_take_no_part(everything: Path, records: Records) -> None:
    state = load_checkpoint(everything / "screen-neck" / "checkpoints" / "last.pt")["state"]["model"]
    active = [value for name, value in state.items() if name.endswith(".active")]
    assert len(active) == 8 and all(int(value.sum()) == 2 for value in active)
    lines = records(everything / "screen-neck", "metrics.jsonl")
    assert ["column_penalty" in line for line in lines] == [False, False, True, True, True, True]
    assert not any(name.startswith("expected") for line in lines for name in line), "no cost while screening"


@pytest.mark.usefixtures("no_forecast")
@pytest.mark.parametrize(
    ("at", "stopped"),
    [(9, "screen-neck"), (11, "screen-neck"), (20, "")],
    ids=["second-part", "after-a-removal", "joint-search"],
)
def test_screening_resumes(
    at: int,
    stopped: str,
    everything: Path,
    config: HitSearchConfig,
    data: DataFolder,
    records: Records,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in a part's screening or in the joint search, and resumed, all is as if never stopped."""
    step, done = Bilevel.weight_step, [0]

    def killed(self: Bilevel, index: int, loss: Any) -> Any:
        done[0] += 1
        if done[0] > at:
            raise RuntimeError("killed")
        return step(self, index, loss)

    with monkeypatch.context() as patch:
        patch.setattr(Bilevel, "weight_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            search_hit(screening(config, "all"), data, tmp_path, progress=False)
    assert json.loads((tmp_path / stopped / "run.json").read_text())["status"] == "failed"
    torch.manual_seed(99)
    search_hit(screening(config, "all"), data, tmp_path, resume=True, progress=False)
    for file in ("screening.json", "card.json", "model.json"):
        assert (tmp_path / file).read_bytes() == (everything / file).read_bytes()
    for out in ("", *(f"screen-{part}" for part in PARTS)):
        for record in ("metrics.jsonl", "alphas.jsonl"):
            assert records(tmp_path / out, record) == records(everything / out, record)


@pytest.mark.usefixtures("no_forecast")
def test_a_screening_is_not_overwritten(everything: Path, config: HitSearchConfig, data: DataFolder) -> None:
    before = {path: path.read_bytes() for path in everything.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="screen-backbone already holds a run"):
        screen_hit(screening(config, "screen"), data, everything, progress=False)
    with pytest.raises(ValueError, match="penalty: 0.1 -> 0.5"):
        screen_hit(screening(config, "screen", penalty=0.5), data, everything, resume=True, progress=False)
    assert before == {path: path.read_bytes() for path in everything.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("no_forecast")
def test_screening_alone(everything: Path, config: HitSearchConfig, data: DataFolder, tmp_path: Path) -> None:
    """The stage by itself finds what it finds as a part of the whole, and has no card."""
    kept = screen_hit(screening(config, "screen", parts=["backbone"]), data, tmp_path, progress=False)
    assert kept == {"backbone": load_screening(everything)["backbone"]}
    assert load_screening(tmp_path / "screening.json") == kept and not (tmp_path / "card.json").exists()
    with pytest.raises(ValueError, match="stage must be joint or all, got 'screen'"):
        search_hit(screening(config, "screen"), data, tmp_path / "other", progress=False)


ANOTHER = """
import fcntl, json, sys
out = sys.argv[1]
with open(out + "/screening.lock", "ab") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.readline()
    with open(out + "/screening.json", "w") as record:
        json.dump({"kept": {"neck": ["b"]}, "parts": {"neck": {"left": ["b"]}}}, record)
"""


def test_parts_screened_at_the_same_time_are_all_recorded(tmp_path: Path) -> None:
    """Who comes while another process writes waits, and adds to what that one wrote."""
    command = [sys.executable, "-c", ANOTHER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None and holder.stdout is not None and holder.stdout.readline() == "held\n"
        waiting = threading.Thread(target=_record, args=(tmp_path / "screening.json", {"head": {"left": ["a"]}}))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive() and not (tmp_path / "screening.json").exists()
        holder.stdin.write("\n")
        holder.stdin.close()
        waiting.join(60)
    assert json.loads((tmp_path / "screening.json").read_text())["kept"] == {"neck": ["b"], "head": ["a"]}


WHOLE_RECORD: dict[str, Any] = {"part": "neck", "names": ["a"], "keep": 1, "first": 1, "last": 1}
WHOLE_RECORD["names"] = ["conv_k3_d1", "conv_k3_d2"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "must be the screening.json of a screening"),
        ({"parts": {}}, "must be the screening.json of a screening"),
        ({"parts": {"neck": {"part": "neck"}}}, "screening must have the key 'names'"),
        ({"parts": {"neck": {**WHOLE_RECORD, "history": [{}]}}}, "not a whole screening: KeyError 'removed'"),
    ],
    ids=["a-list", "no-parts", "a-torn-part", "a-torn-epoch"],
)
def test_a_bad_screening_file(content: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "screening.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"screening.json: .*{words}"):
        load_screening(tmp_path)


def test_deviations_tell_everything_that_differs(data: DataFolder, config: HitSearchConfig) -> None:
    paper = deviations(HitSearchConfig(), data, True)
    assert len(paper) == 5 and any("the paper: COCO" in line for line in paper), "ours by design, and the data"
    assert len(deviations(HitSearchConfig(stage="screen"), data, True)) == 5
    ours = deviations(dataclasses.replace(config, memory="sampled", amp=True, cost_weight=0.1), data, False)
    for words in ("steps: 6", "norm: bn", "weight of the cost: 0.1; the paper: 0.01", "2 candidates", "bfloat16"):
        assert any(words in line for line in ours), words
    assert any("random weights" in line for line in ours) and any("channels of neck and head: 12" in x for x in ours)


CONFIG = HitSearchConfig(
    steps=2,
    epochs=2,
    frozen_epochs=1,
    batch=1,
    short_side=160,
    long_side=224,
    rois=16,
    lr=0.002,
    arch_lr=0.02,
    norm="gn",
    memory="recompute",
    workers=0,
    log_every=1,
    checkpoint_every=1,
)


@pytest.mark.slow
def test_the_released_layout_searches_on_coco_pictures(tiny_coco: Path, records: Records, tmp_path: Path) -> None:
    from nasdet.data import open_data

    data = open_data(tiny_coco)
    assert len(data.categories) == 80 and data.layout == "coco"
    card = search_hit(CONFIG, data, tmp_path, progress=False)
    assert [len(card.genotype[part]) for part in PARTS] == [20, 8, 4]
    lines = records(tmp_path, "metrics.jsonl")
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    before, after = (records(tmp_path, "alphas.jsonl")[at]["alphas"] for at in (1, -1))
    for part in PARTS:
        moved = torch.tensor(after[part]) - torch.tensor(before[part])
        assert moved.shape[1] == 8 and moved.abs().min() > 0, "each alpha has a gradient"
