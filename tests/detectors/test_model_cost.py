from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasdet.detectors import FCOS, FPN, PlainTowers, ResNet, build_fcos
from nasdet.measure import PartCost, count, total


def _fcos(stride_in_1x1: bool) -> FCOS:
    with torch.device("meta"):
        backbone = ResNet(50, norm="frozen_bn", outputs=("c3", "c4", "c5"), stride_in_1x1=stride_in_1x1)
        return FCOS(backbone, FPN(backbone.channels, backbone.strides), PlainTowers(), num_classes=80)


def test_published_cost_of_fcos() -> None:
    costs = {cost.name: cost for cost in count(_fcos(False), torch.empty(1, 3, 800, 1280, device="meta"))}
    assert list(costs) == ["backbone", "neck", "towers", "head"]
    locations = 100 * 160 + 50 * 80 + 25 * 40 + 13 * 20 + 7 * 10
    assert locations == 21_330
    assert costs["towers"].macs == locations * 8 * 256 * 256 * 9
    assert costs["head"].macs == locations * (80 + 4 + 1) * 256 * 9
    assert round((costs["towers"].macs + costs["head"].macs) / 1e9, 1) == 104.8  # the FAD paper: 105 G
    assert costs["towers"].parameters + costs["head"].parameters == 4_920_666
    assert round(costs["backbone"].macs / 1e9, 2) == 83.41
    assert total(costs.values()) == PartCost("total", 32_244_250, 204_486_740_480)


def test_the_papers_201_g_is_the_other_stride_placement() -> None:
    # The paper's nets start from weights with the stride in the first 1x1, 4.7 G less, and its counter also charges
    # norms, biases and activations, about 0.9 G: 199.8 + 0.9 = 201 (and 232.7 + 0.9 = 234 for its RetinaNet).
    macs = total(count(_fcos(True), torch.empty(1, 3, 800, 1280, device="meta"))).macs
    assert round(macs / 1e9, 1) == 199.8


@pytest.mark.parametrize(
    ("depth", "macs"), [(18, 1_813_561_344), (34, 3_663_249_408), (50, 4_087_136_256), (101, 7_799_357_440)]
)
def test_published_cost_of_resnets(depth: int, macs: int) -> None:
    """The familiar 1.8, 3.7, 4.1 and 7.8 G at 224 x 224, without the classifier."""
    with torch.device("meta"):
        model = ResNet(depth)
    assert total(count(model, torch.empty(1, 3, 224, 224, device="meta"))).macs == macs


class _Odd(nn.Module):
    """Everything that is easily miscounted."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2, groups=4)
        self.transposed = nn.ConvTranspose2d(12, 5, 2, stride=2)
        self.linear = nn.Linear(5, 7)
        self.again = self.grouped
        self.idle = nn.Linear(3, 3)
        self.kernel = nn.Parameter(torch.ones(4, 7, 1))
        self.frozen = nn.Parameter(torch.ones(11), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.transposed(self.grouped(x) + self.grouped(x))
        z = self.linear(y.flatten(2).transpose(1, 2)).transpose(1, 2)
        return F.conv1d(z, self.kernel)


def test_groups_transposes_functions_and_sharing() -> None:
    model = _Odd().train()
    costs = {cost.name: cost for cost in count(model, torch.empty(1, 8, 10, 10, device="meta"))}
    grouped = 12 * 2 * 9 * 25
    assert costs["grouped"] == PartCost("grouped", 12 * 2 * 9 + 12, 2 * grouped)
    assert costs["transposed"] == PartCost("transposed", 12 * 5 * 4 + 5, 25 * 12 * 5 * 4)
    assert costs["linear"] == PartCost("linear", 42, 100 * 35)
    assert costs["idle"] == PartCost("idle", 12, 0)
    assert costs["rest"] == PartCost("rest", 28 + 11, 100 * 28)
    assert total(costs.values()).parameters == sum(p.numel() for p in model.parameters())


def test_model_is_left_as_it_was() -> None:
    model = build_fcos("resnet18", 3, width=0.125, fpn_channels=16, levels=3, norm="bn").train()
    model.neck.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    costs = count(model, torch.rand(1, 3, 64, 64))
    assert [module.training for module in model.modules()] == modes
    assert all(value.device.type == "cpu" and torch.equal(value, before[n]) for n, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert costs == count(model, torch.empty(1, 3, 64, 64, device="meta"))
    assert total(count(model, torch.rand(2, 3, 64, 64))).macs == 2 * total(costs).macs


def test_hooks_go_even_when_the_model_fails() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(RuntimeError, match="channel"):
        count(model, torch.rand(1, 5, 8, 8))
    assert model.training and not model[0]._forward_hooks and not model[0]._forward_pre_hooks


def test_total_of_nothing() -> None:
    assert total([]) == PartCost("total", 0, 0)


def test_modules_of_a_list_are_the_lists_cost() -> None:
    """As the predictors of a pyramid's levels are, which nobody calls together."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList([nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 5, 1, bias=False)])

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [head(x) for head in self.heads]

    assert count(Heads(), torch.empty(1, 3, 2, 2)) == [("heads", 3 * 9, 4 * 3 * 9)]
