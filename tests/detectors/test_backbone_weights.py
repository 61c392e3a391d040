from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nasdet.arch import load_card
from nasdet.detectors import ResNet, ShuffleNetV2, build_fcos, load_backbone_weights
from nasdet.detectors.weights import check_pretrained
from nasdet.spaces.msnas import MSNASSpace


def _trained(norm: str = "bn") -> dict[str, Tensor]:
    torch.manual_seed(1)
    model = ResNet(18, width=0.125, norm=norm)
    model(torch.randn(2, 3, 32, 32))
    return {**model.state_dict(), "fc.weight": torch.randn(1000, 64), "fc.bias": torch.randn(1000)}


def _save(state: object, path: Path) -> Path:
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("ending", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("norm", ["bn", "frozen_bn", "sync_bn"])
def test_round_trip(tmp_path: Path, ending: str, norm: str) -> None:
    state = _trained()
    model = ResNet(18, width=0.125, norm=norm)
    load_backbone_weights(model, _save(state, tmp_path / f"net{ending}"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_old_files_without_counters_load(tmp_path: Path) -> None:
    state = {name: value for name, value in _trained().items() if "num_batches" not in name}
    model = ResNet(18, width=0.125)
    load_backbone_weights(model, _save(state, tmp_path / "old.pth"))
    assert torch.equal(model.state_dict()["layer4.1.bn2.running_var"], state["layer4.1.bn2.running_var"])


def test_shorter_backbone_takes_what_it_has(tmp_path: Path) -> None:
    model = ResNet(18, width=0.125, outputs=("c3",))
    load_backbone_weights(model, _save(_trained(), tmp_path / "net.pth"))


def test_half_precision_files_are_converted(tmp_path: Path) -> None:
    state = {name: value.half() if value.is_floating_point() else value for name, value in _trained().items()}
    model = ResNet(18, width=0.125)
    load_backbone_weights(model, _save(state, tmp_path / "net.pth"))
    assert model.state_dict()["conv1.weight"].dtype == torch.float32


def _without(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("layer3.")}


def _nan(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "layer1.0.conv1.weight": torch.full_like(state["layer1.0.conv1.weight"], float("nan"))}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        pytest.param(_without, r"25 missing: layer3\.0\.conv1\.weight, .* and 20 more", id="missing"),
        pytest.param(lambda s: {**s, "layer9.x": torch.ones(1)}, r"1 unexpected: layer9\.x", id="unexpected"),
        pytest.param(
            lambda s: {**s, "conv1.weight": torch.ones(64, 3, 7, 7)},
            r"1 of another shape: conv1\.weight \(64, 3, 7, 7\) for \(8, 3, 7, 7\)",
            id="shape",
        ),
        pytest.param(_nan, r"1 not finite: layer1\.0\.conv1\.weight", id="nan"),
        pytest.param(
            lambda s: {**_without(s), "extra": torch.ones(1), "conv1.weight": torch.ones(1)},
            r"25 missing.*1 unexpected: extra; 1 of another shape",
            id="all-at-once",
        ),
    ],
)
def test_misfit_is_one_error_and_loads_nothing(tmp_path: Path, change, text: str) -> None:
    path = _save(change(_trained()), tmp_path / "net.pth")
    model = ResNet(18, width=0.125)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=text) as caught:
        load_backbone_weights(model, path)
    assert str(path) in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batch_norm_weights_do_not_fit_group_norm(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unexpected: .*running_mean"):
        load_backbone_weights(ResNet(18, width=0.125, norm="gn"), _save(_trained(), tmp_path / "net.pth"))


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99], ids=str)
def test_truncated_file(tmp_path: Path, ending: str, keep: float) -> None:
    path = _save(_trained(), tmp_path / f"net{ending}")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    with pytest.raises(ValueError, match="not a readable weight file") as caught:
        load_backbone_weights(ResNet(18, width=0.125), path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [[torch.ones(1)], {}, {"state_dict": {"conv1.weight": torch.ones(1)}}, torch.ones(3), {"epoch": 3}],
    ids=["list", "empty", "nested", "tensor", "number"],
)
def test_file_of_something_else(tmp_path: Path, content: object) -> None:
    with pytest.raises(ValueError, match="must hold tensors by name"):
        load_backbone_weights(ResNet(18, width=0.125), _save(content, tmp_path / "net.pth"))


class _Planted:
    def __reduce__(self):
        return (Path.touch, (Path(self.target),))

    def __init__(self, target: Path) -> None:
        self.target = str(target)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    path = _save({"conv1.weight": _Planted(tmp_path / "run")}, tmp_path / "net.pth")
    with pytest.raises(ValueError, match="not a readable weight file"):
        load_backbone_weights(ResNet(18, width=0.125), path)
    assert not (tmp_path / "run").exists()


def test_wrong_paths(tmp_path: Path) -> None:
    model = ResNet(18, width=0.125)
    with pytest.raises(FileNotFoundError, match="no such weight file"):
        load_backbone_weights(model, tmp_path / "none.pth")
    (tmp_path / "net.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"must end in .pth, .pt or .safetensors, got '.bin'"):
        load_backbone_weights(model, tmp_path / "net.bin")
    with pytest.raises(FileNotFoundError):
        load_backbone_weights(model, tmp_path)


def test_detector_built_with_weights_is_frozen_at_two(tmp_path: Path) -> None:
    state = _trained()
    model = build_fcos("resnet18", 4, width=0.125, fpn_channels=8, weights=_save(state, tmp_path / "net.pth"))
    assert torch.equal(model.backbone.state_dict()["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])
    frozen = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "layer1"}


def _shuffled(shuffle: str) -> ShuffleNetV2:
    return ShuffleNetV2(8, (16, 24, 32), (1, 2, 1), shuffle=shuffle)


def _card(**settings: str) -> dict[str, object]:
    return {"card": {"name": "found", "genotype": ["sh3"], "settings": settings}}


@pytest.mark.parametrize(
    ("told", "theirs", "ours"),
    [
        ({"space": "detnas-tiny"}, "even_odd", "halves"),
        ({"space": "detnas-tiny", "shuffle": "halves"}, "halves", "even_odd"),
        (_card(), "even_odd", "halves"),
        (_card(shuffle="halves"), "halves", "even_odd"),
    ],
    ids=["default", "supernet", "default_card", "card"],
)
def test_another_shuffle_is_refused(tmp_path: Path, told: dict[str, object], theirs: str, ours: str) -> None:
    (tmp_path / "classifier.json").write_text(json.dumps(told))
    path, model = _save(_shuffled(theirs).state_dict(), tmp_path / "weights.pt"), _shuffled(ours)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    words = f"weights.pt: shuffle of ShuffleNetV2 must be '{theirs}', as .*classifier.json.*, got '{ours}'"
    with pytest.raises(ValueError, match=words):
        load_backbone_weights(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    load_backbone_weights(_shuffled(theirs), path)


@pytest.mark.parametrize("told", [{"backbone": "shufflenet_v2_20", "width": 1.0}, {}, []], ids=["backbone", "", "list"])
def test_files_that_say_nothing_of_a_shuffle_pass(tmp_path: Path, told: object) -> None:
    (tmp_path / "classifier.json").write_text(json.dumps(told))
    load_backbone_weights(_shuffled("halves"), _save(_shuffled("even_odd").state_dict(), tmp_path / "weights.pt"))


def test_a_description_is_that_of_the_runs_own_weights_alone(tmp_path: Path) -> None:
    (tmp_path / "classifier.json").write_text(json.dumps({"space": "detnas-tiny", "shuffle": "halves"}))
    load_backbone_weights(_shuffled("even_odd"), _save(_shuffled("even_odd").state_dict(), tmp_path / "other.pt"))


def test_an_encoder_of_another_genotype_is_refused(tmp_path: Path) -> None:
    card = load_card("msnas-r18-1")
    heads = [8, 8, 16, 32, 32]
    other = replace(card, genotype={**card.genotype, "heads": heads})
    with torch.device("meta"):
        first, second = MSNASSpace.backbone(card, width=0.1), MSNASSpace.backbone(other, width=0.1)
    names = {name: value.shape for name, value in first.state_dict().items()}
    assert names == {name: value.shape for name, value in second.state_dict().items()}, "nothing else tells"
    (tmp_path / "classifier.json").write_text(json.dumps({"card": card.to_json()}))
    with pytest.raises(ValueError, match="weights must be those of the same genotype, got those of msnas-r18-1 "):
        check_pretrained(second, tmp_path / "weights.pt")
    check_pretrained(first, tmp_path / "weights.pt")
