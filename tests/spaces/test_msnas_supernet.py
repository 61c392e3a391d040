"""MSNAS's encoders and their supernet: costs, sizes, weight sharing, and what inactive parts keep."""

from __future__ import annotations

from copy import deepcopy
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasdet.arch import Card, load_card, published
from nasdet.measure import count, total
from nasdet.spaces.msnas import FPN_HEADS, MSNASSpace, encoder_macs, genotype, parameters
from nasdet.spaces.msnas.encoder import HEADS, MSNASEncoder
from nasdet.spaces.msnas.supernet import MSNASSupernet

H = 0.5
SPACES = {
    "basic": MSNASSpace(blocks=8, channels=16),
    "basic-64": MSNASSpace(blocks=5, channels=64),  # the stem's width: no shortcut in a first block of stride 1
    "bottleneck": MSNASSpace(blocks=7, channels=8, block="bottleneck"),
}
NETS = [name for name in published() if name.startswith("msnas-")]


@pytest.fixture(params=SPACES)
def space(request: pytest.FixtureRequest) -> MSNASSpace:
    return SPACES[request.param]


@pytest.fixture(scope="module")
def shaken() -> Any:
    """``shaken(module)``: its norms with statistics and weights unlike each other's, in evaluation mode."""

    def shake(module: nn.Module) -> nn.Module:
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                for value in (norm.weight, norm.bias, norm.running_mean):
                    nn.init.normal_(value, 0.5, 0.3)
                nn.init.uniform_(norm.running_var, 0.5, 2.0)
        return module.eval()

    return shake


@pytest.mark.parametrize("name", NETS)
def test_published_nets_build_and_cost_what_the_formulas_say(name: str) -> None:
    card = load_card(name)
    space = MSNASSpace(name.split("-")[1])
    with torch.device("meta"):
        net = space.backbone(card)
    costs = total(count(net, torch.empty(1, 3, 832, 1280, device="meta")))
    reduced = 0
    if space.block == "bottleneck":
        reduced = sum(832 * 1280 // head**2 * 576 * 144 for head in set(card.genotype["heads"]))
    assert costs.macs == encoder_macs(card.genotype["strides"], space.channels, space.block) + reduced
    assert costs.parameters == space.parameters(card)
    assert len(NETS) == 15


def test_costs_of_any_net(space: MSNASSpace) -> None:
    rng = Random(1)
    for _ in range(5):
        card = space.random(rng)
        with torch.device("meta"):
            net = space.backbone(card, norm="gn")
        costs = total(count(net, torch.empty(1, 3, 128, 192, device="meta")))
        heads = len(set(card.genotype["heads"]))
        assert costs.parameters == parameters(card.genotype, space.channels, space.block)
        assert costs.macs <= space.macs(card, (128, 192))
        assert bool(net.reductions) == (space.block == "bottleneck") and len(net.reductions) in (0, heads)


@pytest.mark.parametrize("size", [(64, 128), (96, 160), (33, 97), (1, 40)], ids=str)
def test_maps_have_the_heads_strides_and_one_width(space: MSNASSpace, size: tuple[int, int]) -> None:
    """Whatever the picture's size: the maps of a resolution are of one size, the side divided and rounded up."""
    rng = Random(2)
    for _ in range(6):
        card = space.random(rng)
        net = space.backbone(card).eval()
        maps = net(torch.randn(2, 3, *size))
        assert tuple(maps) == HEADS and list(net.strides.values()) == card.genotype["heads"] and net.pyramid
        for name, x in maps.items():
            assert x.shape == (2, net.channels[name], *(-(-side // net.strides[name]) for side in size))
            assert net.channels[name] == space.channels
        for one, other in zip(HEADS, HEADS[1:], strict=False):
            assert (maps[one] is maps[other]) == (net.strides[one] == net.strides[other])


def test_odd_sizes_are_cropped_from_twice_the_map() -> None:
    """A chain down to 1/8 and up again on 36 x 44 (maps of 9 x 11 and 5 x 6), written down."""
    torch.manual_seed(0)
    net = MSNASEncoder(genotype([1, 2, H], [4, 4, 4, 4, 8]), 8).eval()
    images = torch.randn(1, 3, 36, 44)
    x = F.max_pool2d(F.relu(net.bn1(net.conv1(images))), 3, 2, 1)
    first = net.blocks[0](x)
    second = net.blocks[1](first)
    large = second.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :9, :11]
    third = net.blocks[2](large) + net.laterals["1"](first)
    assert second.shape[-2:] == (5, 6)
    maps = net(images)
    torch.testing.assert_close(maps["h1"], third, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(maps["h5"], second, rtol=1e-5, atol=1e-5)


def test_lateral_reads_the_sum_of_the_earlier_one() -> None:
    """4 8 4 8 4: block 3 takes block 1's map, block 5 that of block 3 after its own addition."""
    torch.manual_seed(0)
    card = genotype([1, 2, H, 2, H], [4, 4, 4, 4, 8])
    assert card["laterals"] == [[3, 1], [4, 2], [5, 3]]
    net = MSNASEncoder(card, 8).eval()
    images = torch.randn(1, 3, 64, 64)
    before = net(images)["h1"]
    with torch.no_grad():
        net.laterals["1"][0].weight.zero_()  # reaches the last map only through block 3's
    assert not torch.equal(net(images)["h1"], before)


def test_supernet_restricted_to_a_card_is_the_built_net(space: MSNASSpace, shaken: Any) -> None:
    rng = Random(3)
    torch.manual_seed(3)
    supernet = space.supernet()
    shaken(supernet)
    for norm_training in (False, True):
        for _ in range(3):
            card = space.random(rng)
            net = space.backbone(card).train(norm_training)
            space.inherit(net, supernet, card)
            twin = deepcopy(supernet).train(norm_training)
            space.activate(twin, card)
            images = torch.randn(2, 3, 96, 128)
            ours, theirs = twin(images), net(images)
            assert twin.strides == net.strides
            assert all(torch.equal(ours[name], theirs[name]) for name in HEADS)
            sum(x.square().mean() for x in ours.values()).backward()
            sum(x.square().mean() for x in theirs.values()).backward()
            mine = sorted(p.grad.double().norm().item() for p in twin.parameters() if p.grad is not None)
            built = sorted(p.grad.double().norm().item() for p in net.parameters() if p.grad is not None)
            assert mine == built and len(built) > 10


def test_inactive_parts_stay_bit_for_bit(space: MSNASSpace) -> None:
    """Under momentum and weight decay too, and the statistics of their norms; the active ones all move."""
    torch.manual_seed(4)
    supernet = space.supernet().train()
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    rng = Random(4)

    def step(card: Card) -> None:
        space.activate(supernet, card)
        optimizer.zero_grad()
        sum(x.mean() for x in supernet(torch.randn(2, 3, 64, 96)).values()).backward()
        optimizer.step()

    for _ in range(4):  # momentum for many parts
        step(space.random(rng))
    card = space.random(rng)
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    step(card)
    net = space.backbone(card)
    space.inherit(net, supernet, card)
    built = sum(p.numel() for p in net.parameters() if p.requires_grad)
    active = {name for name, p in supernet.named_parameters() if p.grad is not None}
    assert sum(p.numel() for name, p in supernet.named_parameters() if name in active) == built
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for name, value in supernet.state_dict().items():
        part, _, last = name.rpartition(".")
        moved = name in active or (last in statistics and f"{part}.weight" in active)
        assert torch.equal(value, before[name]) != moved, name


def test_idle_blocks_do_not_train_and_can_be_left_out(shaken: Any) -> None:
    """Resolutions 8 16 32 16 16 8 4, and no head on the last one."""
    card = genotype([2, 2, 2, H, 1, H, H], [8, 8, 16, 16, 32])
    net = shaken(MSNASEncoder(card, 8))
    idle = {name.split(".")[1] for name, p in net.named_parameters() if not p.requires_grad and "blocks" in name}
    assert idle == {"6"}
    short = MSNASEncoder(card, 8, whole=False).eval()
    short.load_state_dict({name: value for name, value in net.state_dict().items() if name in short.state_dict()})
    images = torch.randn(1, 3, 64, 96)
    ours, theirs = net(images), short(images)
    assert len(short.blocks) == 6 and all(torch.equal(ours[name], theirs[name]) for name in HEADS)
    sum(x.sum() for x in theirs.values()).backward()
    assert all(p.grad is not None for p in short.parameters())


def test_every_trained_parameter_gets_a_gradient(space: MSNASSpace) -> None:
    rng = Random(5)
    for _ in range(10):
        net = space.backbone(space.random(rng)).train()
        sum(x.square().mean() for x in net(torch.randn(2, 3, 64, 64)).values()).backward()
        assert [n for n, p in net.named_parameters() if (p.grad is None) == p.requires_grad] == []


def test_supernet_has_what_legal_encoders_use_and_nothing_else() -> None:
    """In many steps every parameter is reached."""
    space, rng = MSNASSpace(blocks=5, channels=8), Random(6)
    supernet = space.supernet()
    reached: set[str] = set()
    for _ in range(400):
        space.activate(supernet, space.random(rng))
        supernet.zero_grad()
        sum(x.sum() for x in supernet(torch.ones(2, 3, 32, 32)).values()).backward()
        reached |= {name for name, p in supernet.named_parameters() if p.grad is not None}
        if len(reached) == len(list(supernet.parameters())):
            break
    assert reached == {name for name, _ in supernet.named_parameters()}


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_frozen_stages(frozen: int) -> None:
    space = SPACES["basic"]
    card = space.card(genotype([1, 2, 2, 2, 2, 1, 1, 1], FPN_HEADS))
    for module in (space.backbone(card, frozen_stages=frozen), space.supernet(frozen_stages=frozen)):
        module.train()
        names = [name.split(".") for name, p in module.named_parameters() if not p.requires_grad]
        still = {words[1] if words[0] == "blocks" else words[0] for words in names}
        assert still == ({"conv1", "bn1"} if frozen else set()) | {str(place) for place in range(frozen - 1)}
        assert module.bn1.training == (frozen == 0)
        trained = module.blocks[max(0, frozen - 1)]
        assert all(m.training for m in trained.modules() if isinstance(m, nn.BatchNorm2d))


def test_width_and_norm() -> None:
    space = SPACES["bottleneck"]
    card = space.random(Random(0))
    net = space.backbone(card, width=2, norm="frozen_bn")
    assert net.conv1.out_channels == 128 and set(net.channels.values()) == {16}
    assert MSNASSpace.pyramid_channels(card, 2) == 16
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())


def _wrong_inherit() -> None:
    space = SPACES["basic"]
    card = space.random(Random(0))
    space.inherit(space.backbone(card, norm="gn"), space.supernet(), card)


def _other_genotype() -> None:
    space = SPACES["basic"]
    one, two = space.random(Random(0)), space.random(Random(1))
    space.inherit(space.backbone(one), space.supernet(), two)


CARD = SPACES["basic"].random(Random(0))
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "block": (lambda: MSNASEncoder(CARD.genotype, 8, "wide"), ValueError, "block must be one of basic, bottleneck"),
    "channels": (lambda: MSNASEncoder(CARD.genotype, 0), ValueError, "channels must be a positive integer, got 0"),
    "width": (lambda: MSNASEncoder(CARD.genotype, 8, width=0), ValueError, "width must be positive, got 0"),
    "frozen": (
        lambda: MSNASEncoder(CARD.genotype, 8, frozen_stages=10),
        ValueError,
        r"frozen_stages must be in 0\.\.9, got 10",
    ),
    "norm": (lambda: MSNASEncoder(CARD.genotype, 8, norm="none"), ValueError, "norm must be one of bn, "),
    "blocks": (lambda: MSNASSupernet(1, 8), ValueError, "blocks must be an integer of at least 2, got 1"),
    "genotype": (lambda: MSNASEncoder({"strides": [1]}, 8), ValueError, "genotype must be an object of strides"),
    "places": (
        lambda: MSNASSupernet(7, 8).activate(CARD.genotype),
        ValueError,
        "genotype.strides must be 7, one for each block, got 8",
    ),
    "gene": (
        lambda: MSNASSupernet(2, 8).activate({"strides": [1, 3], "heads": [4, 4, 4, 4, 8], "laterals": []}),
        ValueError,
        "genotype.strides must be 0.5, 1 or 2, got 3 for block 2",
    ),
    "other-space": (
        lambda: SPACES["bottleneck"].activate(SPACES["bottleneck"].supernet(), CARD),
        ValueError,
        "genotype.strides must be 7, one for each block, got 8",
    ),
    "other-method": (
        lambda: SPACES["basic"].activate(SPACES["basic"].supernet(), load_card("fad-paper")),
        ValueError,
        "fad-paper: method must be 'msnas', got 'fad'",
    ),
    "no-supernet": (
        lambda: SPACES["basic"].activate(nn.Identity(), CARD),
        TypeError,
        "supernet must be an MSNASSupernet, got Identity",
    ),
    "settings": (
        lambda: MSNASSpace.backbone(Card("msnas", "bare", CARD.genotype)),
        ValueError,
        "bare: settings must have channels, got {}",
    ),
    "inherit": (_wrong_inherit, ValueError, "net must be of 8 blocks, .*'bn'.*, got 8, .*'gn'"),
    "genotypes": (_other_genotype, ValueError, "net must be the encoder of 'msnas-random', got that of another"),
}


@pytest.mark.parametrize(("call", "error", "words"), BAD.values(), ids=BAD)
def test_bad_input(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_supernet_weights_do_not_load_into_another() -> None:
    state: dict[str, Tensor] = MSNASSpace(blocks=6, channels=8).supernet().state_dict()
    with pytest.raises(RuntimeError, match="size mismatch|Missing key"):
        MSNASSpace(blocks=7, channels=8).supernet().load_state_dict(state)
