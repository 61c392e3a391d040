from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nasdet.detectors import ResNet, build_fcos, load_backbone_weights


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
