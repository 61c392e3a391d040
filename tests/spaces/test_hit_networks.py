"""Hit-Detector's operations and parts: published counts, costs against the networks, shapes, and what they compute."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasdet.arch import load_card
from nasdet.detectors import FixedRoIs, RetinaNet
from nasdet.detectors.norm import FrozenBatchNorm2d, GroupNorm
from nasdet.measure import count, total
from nasdet.nn import DepthwiseConv2d
from nasdet.spaces.hit import LAYOUTS, ONE_STAGE, OPERATIONS, HitSpace, Sizes, operation, places, two_stage
from nasdet.spaces.hit.costs import operation_layers

STAGES = ((8, 2, 2), (12, 1, 2), (16, 2, 2), (16, 1, 1), (24, 1, 2))
SMALL = Sizes(stem=4, stages=STAGES, tail=(20, 32), channels=8, hidden=6)
RETINA = Sizes(stem=4, stages=STAGES, tail=(), channels=8, inputs=("c3", "c4", "c5"), extra="convs", blocks=2)


def test_parameters_and_macs_of_the_published_net() -> None:
    card = load_card("hit-detector")
    with torch.device("meta"):
        parts = [HitSpace.build(card, part) for part in ("backbone", "neck", "head")]
        model = two_stage(*parts, num_classes=80)
    costs = {cost.name: cost for cost in count(FixedRoIs(model), torch.empty(1, 3, 800, 1200, device="meta"))}
    assert {name: cost.parameters for name, cost in costs.items()} == {
        "backbone": 13_881_848,
        "neck": 2_715_952,
        "rpn": 593_935,
        "boxes": 9_932_181,
    }
    assert sum(cost.parameters for cost in costs.values()) == 27_123_916
    assert [round(cost.macs / 1e9, 1) for cost in costs.values()] == [34.6, 19.1, 47.5, 167.1]
    table = HitSpace().macs()
    assert {name: costs[name].macs for name in ("backbone", "neck")} == {
        name: table.parts[name](card.genotype[name]) for name in ("backbone", "neck")
    }


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("inp", "out", "stride"), [(6, 6, 1), (4, 10, 2), (5, 7, 1)])
def test_an_operation_is_what_its_layers_say(name: str, inp: int, out: int, stride: int) -> None:
    with torch.device("meta"):
        module, x = operation(name, inp, out, stride), torch.empty(2, inp, 13, 18)
    y = module.train()(x)
    assert y.shape == (2, out, -(-13 // stride), -(-18 // stride))
    layers = operation_layers(name, inp, out, 13 * 18, y.shape[2] * y.shape[3])
    assert sum(layer.macs for layer in layers) == total(count(module, x[:1])).macs
    assert sum(layer.parameters for layer in layers) == sum(p.numel() for p in module.parameters())
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    op, middle = OPERATIONS[name], convs[{"ir": 1, "sep": 0, "conv": 0}[OPERATIONS[name].kind]]
    assert [conv.bias for conv in convs] == [None] * len(layers)
    assert (middle.kernel_size[0], middle.dilation[0], middle.stride[0]) == (op.kernel, op.dilation, stride)
    assert isinstance(middle, DepthwiseConv2d) == (op.kind != "conv")
    assert sum(isinstance(m, nn.ReLU) for m in module.modules()) == {"ir": 2, "sep": 1, "conv": 1}[op.kind]


@pytest.mark.parametrize(
    ("name", "inp", "skips"), [("ir_k3_d1_e3", 6, True), ("sep_k3_d2", 6, True), ("ir_k3_d1_e1", 4, False)]
)
def test_the_shortcut_stands_where_the_shape_stays(name: str, inp: int, skips: bool) -> None:
    module, x = operation(name, inp, 6).eval(), torch.randn(1, inp, 5, 5)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)  # the last norm's shift and scale too: what is left is the shortcut
    assert torch.equal(module(x), x if skips else torch.zeros(1, 6, 5, 5))
    strided = operation(name, 6, 6, 2).eval()
    for parameter in strided.parameters():
        nn.init.zeros_(parameter)
    assert not strided(torch.randn(1, 6, 5, 5)).any()


def test_a_convolution_computes_convolution_norm_relu() -> None:
    module, x = operation("conv_k5_d2", 3, 4).train(), torch.randn(2, 3, 9, 8)
    conv = F.conv2d(x, next(module.parameters()), padding=4, dilation=2)
    assert torch.allclose(module(x), F.relu(F.batch_norm(conv, None, None, training=True)), atol=1e-6)


@pytest.mark.parametrize(
    ("norm", "kind"), [("gn", GroupNorm), ("frozen_bn", FrozenBatchNorm2d), ("bn", nn.BatchNorm2d)]
)
def test_norms(norm: str, kind: type[nn.Module]) -> None:
    card = HitSpace(SMALL).random(Random(0))
    parts = [HitSpace.build(card, part, norm=norm) for part in ("backbone", "neck", "head")]
    norms = [m for part in parts for m in part.modules() if "Norm" in type(m).__name__]
    assert norms and all(isinstance(m, kind) for m in norms)


@pytest.mark.parametrize("size", [(64, 96), (65, 77)])
@pytest.mark.parametrize("sizes", [SMALL, RETINA, LAYOUTS["paper"]], ids=["small", "retina", "paper"])
def test_costs_are_those_of_the_networks(sizes: Sizes, size: tuple[int, int]) -> None:
    space = HitSpace(sizes, "full", ONE_STAGE if sizes is RETINA else ("backbone", "neck", "head"))
    card = space.random(Random(1))
    macs, parameters = space.macs(size, proposals=3).by_part(card.genotype), space.parameters().by_part(card.genotype)
    with torch.device("meta"):
        parts = {part: HitSpace.build(card, part) for part in space.parts}
        features = parts["backbone"].eval()(torch.empty(1, 3, *size))
        inputs: dict[str, list[Any]] = {"backbone": [torch.empty(1, 3, *size)], "neck": [features]}
        inputs["head"] = [torch.empty(3, sizes.channels, 7, 7)]
        inputs["towers"] = list(parts["neck"](features).values())
    for part, net in parts.items():
        assert parameters[part] == sum(p.numel() for p in net.parameters()), part
        if part == "neck":
            net = Fed(net, features)
        assert macs[part] == sum(total(count(net, x)).macs for x in inputs[part]), part


class Fed(nn.Module):
    """A neck on maps of its own: ``count`` takes no dict."""

    def __init__(self, neck: nn.Module, features: dict[str, Tensor]) -> None:
        super().__init__()
        self.neck, self.features = neck, features

    def forward(self, _: Any) -> Any:
        return self.neck(self.features)


def test_the_backbones_maps() -> None:
    net = HitSpace.build(HitSpace(SMALL).random(Random(2)), "backbone")
    maps = net(torch.randn(1, 3, 70, 90))
    assert {name: tuple(map_.shape[1:]) for name, map_ in maps.items()} == {
        "c2": (8, 18, 23), "c3": (12, 9, 12), "c4": (16, 5, 6), "c5": (32, 3, 3)
    }  # fmt: skip
    assert net.strides == {"c2": 4, "c3": 8, "c4": 16, "c5": 32}
    assert net.channels == {name: map_.shape[1] for name, map_ in maps.items()}
    assert list(net.parts()) == ["stem", "c2", "c3", "c4", "c5"]


def test_a_backbone_ends_at_its_last_output_and_freezes() -> None:
    card = HitSpace(SMALL).random(Random(2))
    short = HitSpace.build(card, "backbone", outputs=("c2", "c3"), frozen_stages=2)
    assert len(short.blocks) == 3 and not hasattr(short, "tail")
    assert [name for name, p in short.named_parameters() if not p.requires_grad and name.startswith("blocks.2")] == []
    assert not any(p.requires_grad for index in (0, 1) for p in short.blocks[index].parameters())
    assert not short.train().stem.training and short.blocks[2].training


def test_the_neck_is_a_top_down_and_a_bottom_up_path() -> None:
    """Against the formula, with plain functions, on maps of odd sizes."""
    space = HitSpace(SMALL)
    neck = HitSpace.build(space.random(Random(3)), "neck").eval()
    shapes = {"c2": (8, 17, 23), "c3": (12, 9, 12), "c4": (16, 5, 6), "c5": (32, 3, 3)}
    maps = {name: torch.randn(1, *shape) for name, shape in shapes.items()}
    found = neck({**maps, "c1": torch.empty(0)})
    p = [lateral(maps[name]) for lateral, name in zip(neck.lateral, maps, strict=True)]
    for fine, coarse in ((2, 3), (1, 2), (0, 1)):
        p[fine] = p[fine] + F.interpolate(p[coarse], size=p[fine].shape[-2:], mode="nearest")
    p = [output(value) for output, value in zip(neck.output, p, strict=True)]
    n = [p[0]]
    for value, down in zip(p[1:], neck.down, strict=True):
        pooled = F.max_pool2d(F.pad(n[-1], (0, n[-1].shape[3] % 2, 0, n[-1].shape[2] % 2), value=-torch.inf), 2)
        n.append(F.conv2d(pooled + value, down.weight, down.bias, padding=1))
    n.append(n[-1][..., ::2, ::2])
    assert list(found) == ["p2", "p3", "p4", "p5", "p6"] and neck.strides["p6"] == 64
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found.values(), n, strict=True))


def test_a_neck_needs_the_maps_that_it_was_made_for() -> None:
    card = HitSpace(SMALL).random(Random(3))
    with pytest.raises(ValueError, match="in_channels of c4 must be 16, got 17"):
        HitSpace.build(card, "neck", in_channels={"c2": 8, "c3": 12, "c4": 17, "c5": 32})
    with pytest.raises(ValueError, match="part must be one of backbone, neck, head for hit-random, got 'towers'"):
        HitSpace.build(card, "towers")
    with pytest.raises(ValueError, match="operation must be .*, got 'conv_k9'"):
        operation("conv_k9", 3, 3)
    with pytest.raises(TypeError, match="options of head must be none, got outputs"):
        HitSpace.build(card, "head", outputs=("c2",))


def target() -> dict[str, Tensor]:
    return {"boxes": torch.tensor([[8.0, 8.0, 40.0, 50.0]]), "labels": torch.tensor([1])}


@pytest.mark.parametrize("sizes", [SMALL, RETINA], ids=["two-stage", "one-stage"])
def test_a_whole_detector_learns_and_detects(sizes: Sizes) -> None:
    torch.manual_seed(0)
    one_stage = sizes is RETINA
    card = HitSpace(sizes, parts=ONE_STAGE if one_stage else ("backbone", "neck", "head")).random(Random(4))
    parts = [HitSpace.build(card, part) for part in card.genotype]
    model: Any = RetinaNet(*parts, num_classes=3) if one_stage else two_stage(*parts, num_classes=3)
    images = torch.randn(2, 3, 64, 96)
    losses = model.train().loss(model(images), [target(), target()])
    torch.stack(list(losses.values())).sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None]
    assert silent == []
    found = model.eval().detect(model(images), [(64, 96)] * 2)
    assert len(found) == 2 and all({"boxes", "scores", "labels"} <= set(entry) for entry in found)


def test_places_and_modules_agree() -> None:
    card = HitSpace(SMALL).random(Random(5))
    net = HitSpace.build(card, "backbone")
    assert len(net.blocks) == len(places("backbone", SMALL)) == 7
