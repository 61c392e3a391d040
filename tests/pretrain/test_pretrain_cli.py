"""``nasdet data digits --classification``, ``nasdet pretrain``, and a detector that begins with its weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nasdet
from nasdet.arch import load_card
from nasdet.cli import main
from nasdet.detectors import BACKBONES, load_backbone_weights
from nasdet.detectors.classifier import Classifier
from nasdet.engine.checkpoint import load_weights
from nasdet.engine.trunks import trunk
from nasdet.measure import count
from nasdet.spaces.detnas import SPACES, DetNASSpace, macs_table

TINY = ["--preset", "tiny", "--no-flip", "--steps", "2", "--batch", "4", "--workers", "0", "--device", "cpu"]
TINY += ["--width", "0.125"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("cli")
    small = ["--classification", "--train", "30", "--val", "10", "--size", "24x24"]
    assert main(["data", "digits", "--out", str(folder / "classes"), *small]) == 0
    arguments = ["--backbone", "resnet18", "--data", str(folder / "classes"), "--out", str(folder / "run"), *TINY]
    assert main(["pretrain", *arguments]) == 0
    return folder


def test_the_run_says_what_it_did(pretrained, capsys):
    arguments = ["--backbone", "resnet18", "--data", str(pretrained / "classes"), "--out", str(pretrained / "run")]
    assert main(["pretrain", *arguments, *TINY]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["pretrain", *arguments, *TINY, "--resume"]) == 0
    said = capsys.readouterr().out
    assert "30 images to train on, 10 to test" in said and "test: top-1 0." in said
    assert f"nasdet train --backbone resnet18 --width 0.125 --weights {pretrained / 'run' / 'weights.pt'}" in said
    info = json.loads((pretrained / "run" / "run.json").read_text())
    assert (info["backbone"], info["width"], info["status"]) == ("resnet18", 0.125, "done")
    assert info["arguments"]["optimizer"] == "adamw" and info["arguments"]["steps"] == 2


def test_a_detector_begins_with_the_weights(pretrained, tmp_path):
    from nasdet.data import write_digits

    weights = pretrained / "run" / "weights.pt"
    write_digits(tmp_path / "digits", train=4, val=2, size=(64, 64))
    arguments = ["--data", str(tmp_path / "digits"), "--out", str(tmp_path / "net"), "--weights", str(weights)]
    small = ["--size", "64x64", "--fpn-channels", "8", "--levels", "3", "--tower-convs", "1"]
    assert main(["train", *arguments, *TINY, "--backbone", "resnet18", *small]) == 0
    given, learnt = load_weights(weights), load_weights(next((tmp_path / "net").glob("weights.*")))
    for name in ("conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer4.1.bn2.running_var"):
        assert torch.equal(learnt[f"backbone.{name}"], given[name]), f"{name} is frozen"
    assert not torch.equal(learnt["backbone.layer4.1.conv2.weight"], given["layer4.1.conv2.weight"])


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "shufflenet_v2_20"])
def test_every_kind_of_backbone_can_be_a_trunk(name, tmp_path):
    made = trunk(backbone=name, width=0.25)
    assert made.named == {"backbone": name, "width": 0.25} and made.paths is None
    net = made.make().eval()
    assert list(net.channels) == ["c5"] and net(torch.randn(1, 3, 32, 32))["c5"].shape[-1] == 1
    torch.save(net.state_dict(), tmp_path / "w.pt")
    load_backbone_weights(BACKBONES[name](width=0.25, norm="frozen_bn", outputs=("c3", "c4")), tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "one of backbone, space and card must be given, got none"),
        ({"backbone": "resnet18", "space": "detnas-small"}, "got backbone and space"),
        ({"backbone": "resnet19"}, "backbone must be one of .*got 'resnet19'"),
        ({"space": "fad-small"}, "space must be the name of a supernet of paths .*got 'fad-small'"),
        ({"backbone": "resnet18", "bins": (1.0, 2.0, 1.0)}, "bins must be of a space, got them with a backbone"),
        ({"space": "hit-huge"}, "space must be hit-LAYOUT or hit-LAYOUT-half .*got 'hit-huge'"),
        ({"space": "hit-tiny", "width": 0.5}, "width must be 1 for 'hit-tiny', got 0.5"),
        ({"space": "detnas-tiny", "bins": (900e6, 990e6, 10e6)}, "bins must lie about .* million .*got 900 to 990"),
        ({"space": "detnas-tiny", "bins": (1.0, 2.0, 1.0)}, "as most paths have, got 1e-06 to 2e-06"),
        ({"space": "hit-tiny", "bins": (1.0, 2.0, 1.0)}, "bins must be of a detnas space, got them with 'hit-tiny'"),
        ({"space": "hit-tiny", "memory": "sampled"}, "memory must be full or recompute, got 'sampled'"),
        ({"space": "detnas-tiny", "memory": "full"}, "candidates and memory must be of a hit space, got .*detnas-tiny"),
        ({"space": "detnas-tiny", "shuffle": "x"}, "shuffle must be one of even_odd, halves, got 'x'"),
        ({"space": "hit-tiny", "shuffle": "halves"}, "shuffle must be of a detnas space, got it with hit-tiny"),
        ({"backbone": "resnet18", "shuffle": "halves"}, "shuffle must be of a detnas space, got it with backbone"),
    ],
    ids=["none", "two", "backbone", "space", "bins", "layout", "width", "heavy-bins", "light-bins", "bins-of-hit"]
    + ["memory", "memory-of-paths", "no-shuffle", "shuffle-of-hit", "shuffle-of-a-backbone"],
)
def test_bad_names(given, message):
    with pytest.raises(ValueError, match=message):
        trunk(**given)


def test_a_card_of_towers_is_no_backbone():
    with pytest.raises(ValueError, match="card must be a whole backbone, got 'fad-paper', one of towers"):
        trunk(card=load_card("fad-paper"))


@pytest.mark.parametrize("bins", [None, (1e6, 8e6, 1e6)], ids=["uniform", "bins"])
def test_the_supernet_of_a_space_learns_its_paths(bins):
    made = trunk(space="detnas-tiny", width=0.5, bins=bins, classes=10, seed=3)
    assert made.last == 128 and made.named["space"] == "detnas-tiny" and made.paths is not None
    net = made.make().eval()
    card = made.paths.draw(7)
    made.paths.activate(net, card)
    assert [block.chosen for _, block in net.blocks()] == card.genotype
    assert made.paths.draw(7) == card and trunk(space="detnas-tiny", bins=bins, seed=3).paths.draw(7) == card
    assert net(torch.randn(1, 3, 32, 32))["c5"].shape == (1, *net.channels.values(), 1, 1)


def test_a_published_card_is_retrained():
    card = load_card("detnas-coco-fpn-300m")
    made = trunk(card=card)
    assert made.last == 1024 and made.named["card"]["genotype"] == card.genotype
    classifier = Classifier(made.make(), 640, 1000, made.last)
    macs = sum(cost.macs for cost in count(classifier, torch.empty(1, 3, 224, 224, device="meta")))
    assert macs == macs_table(SPACES["small"], classes=1000)(card.genotype)


@pytest.fixture(scope="module")
def supernet(pretrained):
    arguments = ["--space", "detnas-tiny", "--data", str(pretrained / "classes"), "--out", str(pretrained / "super")]
    assert main(["pretrain", *arguments, *TINY, "--last", "16", "--shuffle", "halves"]) == 0
    return pretrained / "super"


def test_a_supernet_from_the_command_line(supernet, pretrained, capsys):
    arguments = ["--space", "detnas-tiny", "--data", str(pretrained / "classes"), "--out", str(supernet)]
    arguments += [*TINY, "--last", "16", "--resume"]
    assert main(["pretrain", *arguments, "--shuffle", "halves"]) == 0
    assert "one path on search-val: top-1" in capsys.readouterr().out
    assert main(["pretrain", *arguments]) == 2
    assert "shuffle: 'halves' -> None" in capsys.readouterr().err
    net = DetNASSpace("tiny", shuffle="halves").supernet(width=0.125, outputs=("c3", "c4", "c5"))
    load_backbone_weights(net, supernet / "weights.pt")


def test_a_classification_search_from_the_command_line(supernet, pretrained, tmp_path, capsys):
    small = ["--population", "2", "--parents", "1", "--generations", "2", "--top", "1", "--device", "cpu"]
    arguments = ["search", "classification", "--data", str(pretrained / "classes"), "--out", str(tmp_path / "run")]
    most = DetNASSpace("tiny").macs.reachable()[1]
    assert main([*arguments, "--supernet", str(supernet), *small, "--max-macs", str(0.9 * most)]) == 0
    said = capsys.readouterr().out
    card = load_card(tmp_path / "run" / "card.json")
    assert f"classification: {tmp_path / 'run' / 'card.json'}, top-1 {card.source['top1']:.4f}" in said
    assert DetNASSpace("tiny").macs(card.genotype) <= 0.9 * most and card.settings["shuffle"] == "halves"
    evolution = json.loads((tmp_path / "run" / "evolution.json").read_text())["state"]["generations"]
    assert len(evolution) == 2 and card.source["top1"] == max(one["score"] for row in evolution for one in row)
    assert main([*arguments, "--supernet", str(supernet), *small]) == 2
    assert "already holds a search" in capsys.readouterr().err
    assert main([*arguments, "--supernet", str(pretrained / "run"), *small, "--resume"]) == 2
    assert "must be a run of nasdet pretrain of a supernet of paths, got none" in capsys.readouterr().err


def test_two_processes_search_by_classification(supernet, pretrained, tmp_path):
    """They find what one does, and share the work."""
    small = ["--population", "3", "--parents", "2", "--generations", "2", "--top", "1", "--device", "cpu"]
    arguments = ["search", "classification", "--data", str(pretrained / "classes"), "--supernet", str(supernet), *small]
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nasdet"]
    root = Path(nasdet.__file__).resolve().parents[1]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, *launcher, *arguments, "--out", str(tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = (json.loads((tmp_path / name / "evolution.json").read_text())["state"] for name in ("one", "two"))
    assert one == two
    ranks = [json.loads(file.read_text())["rank"] for file in (tmp_path / "two" / "scores").glob("*/*.json")]
    assert set(ranks) == {0, 1} and len(ranks) == sum(map(len, one["generations"]))
    recorded = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two")]
    assert [run["processes"] for run in recorded] == [1, 2]


@pytest.mark.parametrize("space", ["hit-tiny", "hit-tiny-half"])
def test_a_mixture_learns_with_its_alphas_fixed(space, pretrained, tmp_path, capsys):
    """All candidates learn, by the same alphas, and a search begins with them."""
    from nasdet.engine.checkpoint import seed_everything
    from nasdet.spaces.hit import LAYOUTS, HitSpace

    names = ["ir_k3_d1_e1", "sep_k3_d2"]
    arguments = ["--space", space, "--candidates", *names, "--data", str(pretrained / "classes")]
    assert main(["pretrain", *arguments, "--out", str(tmp_path / "run"), *TINY]) == 0
    assert "test: top-1 0." in capsys.readouterr().out
    sizes = LAYOUTS["tiny"].halved() if space.endswith("half") else LAYOUTS["tiny"]
    net = HitSpace(sizes, names, ("backbone",)).supernet("backbone", memory="recompute")
    load_backbone_weights(net, tmp_path / "run" / "weights.pt")
    seed_everything(0)
    drawn = trunk(space=space, candidates=names).make()
    learnt, before = dict(net.named_parameters()), dict(drawn.named_parameters())
    alphas = [name for name in learnt if name.endswith("alpha")]
    assert len(alphas) == sum(blocks for _, blocks, _ in sizes.stages)
    assert all(torch.equal(learnt[name], before[name]) for name in alphas)
    weights = [name for name in learnt if name.endswith("weight") and learnt[name].dim() == 4]
    assert all(not torch.equal(learnt[name], before[name]) for name in weights)


def test_the_mixtures_of_hit_detector():
    from nasdet.spaces.hit import OPERATIONS, SUBSPACES

    joint, screened = trunk(space="hit-released"), trunk(space="hit-released-half")
    assert joint.named["candidates"] == list(SUBSPACES["backbone"]) and joint.paths is None
    assert screened.named["candidates"] == list(OPERATIONS)
    with torch.device("meta"):
        assert len(joint.make().blocks) == 20 and len(screened.make().blocks) == 10


def test_bad_folders_are_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "set" / "train").mkdir(parents=True)
    for folder, message in ((tmp_path, "train/ is missing"), (tmp_path / "set", "no class")):
        arguments = ["--data", str(folder), "--out", str(tmp_path / "run"), "--backbone", "resnet18"]
        assert main(["pretrain", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("nasdet pretrain: ") and message in error and "\n" not in error
    assert not (tmp_path / "run").exists()


def test_one_network_must_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["pretrain", "--data", str(tmp_path), "--out", str(tmp_path)])
    assert "one of the arguments --backbone --space --card is required" in capsys.readouterr().err


@pytest.mark.parametrize(("space", "last"), [("detnas-tiny", DetNASSpace("tiny").sizes.last), ("msnas-r18", None)])
def test_every_supernet_of_paths_can_be_a_trunk(space, last):
    found = trunk(space=space)
    assert found.last == last
    with torch.device("meta"):
        net = found.make()
    found.paths.activate(net, found.paths.draw(0))
    assert all(level.shape[0] == 1 for level in net(torch.empty(1, 3, 64, 64, device="meta")).values())
