"""Derived nets without nasdet: torch's own parts, and a file that makes them."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import foreign_net
import pytest
import torch
from foreign_net import foreign
from torch import Tensor, nn

from nasdet.arch import Card
from nasdet.detectors import BACKBONES
from nasdet.nn import GroupedDilationConv2d
from nasdet.spaces.nats import NATSSpace, plain_source, save_plain_source, to_plain_torch
from nasdet.spaces.nats.plain import SplitConv2d


def tiny(name: str = "resnet50") -> nn.Module:
    net: nn.Module = BACKBONES[name](width=0.25)
    net(torch.randn(2, 3, 64, 64))
    return net.eval()


def image() -> Tensor:
    return torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(5))


def maps(net: nn.Module, x: Tensor) -> Tensor:
    """All maps of a backbone as one vector."""
    with torch.no_grad():
        return torch.cat([level.flatten() for level in net(x).values()])


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d"])
def test_plain_torch_gives_the_same(name: str) -> None:
    net = tiny(name)
    card = NATSSpace(backbone=net, channels_per_group=32 if "next" in name else 4).random(random.Random(2))
    derived = NATSSpace.build(card, net)
    plain = to_plain_torch(derived)
    assert not [m for m in plain.modules() if type(m).__module__.startswith(("nasdet.ops", "nasdet.nn"))]
    torch.testing.assert_close(maps(plain, image()), maps(derived, image()), rtol=1e-4, atol=1e-5)
    assert list(plain.state_dict()) == list(derived.state_dict())
    assert isinstance(derived.get_submodule("layer2.0.conv2"), GroupedDilationConv2d), "a copy was changed"
    with pytest.raises(ValueError, match="network must be a derived one, got ResNet without"):
        to_plain_torch(tiny())


def test_a_copy_trains_what_the_original_trains() -> None:
    """Norms that were put into evaluation by hand stay there: their statistics would change else."""
    net = nn.Sequential(GroupedDilationConv2d(3, 8, 3, [1, 2]), nn.BatchNorm2d(8), GroupedDilationConv2d(8, 8, 3))
    net.train()
    net[1].eval()
    net[2].eval()
    copied = to_plain_torch(net)
    assert [part.training for part in copied.modules()] == [True, True, False, False]
    x = torch.randn(2, 3, 9, 7)
    torch.testing.assert_close(copied(x), net(x), rtol=1e-4, atol=1e-5)


def test_hooks_of_a_derived_layer_are_not_lost_in_silence() -> None:
    part = GroupedDilationConv2d(4, 4, 3, [1, 2])
    part.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match="0 must have nothing but a weight and a bias, got forward hooks"):
        to_plain_torch(nn.Sequential(part))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_a_convolution_alone_in_plain_torch(training: bool, groups: int) -> None:
    conv = GroupedDilationConv2d(4, 8, 3, [1, (2, 3)], stride=2, groups=groups).train(training)
    alone, x = to_plain_torch(conv), torch.randn(1, 4, 9, 7)
    assert type(alone) is SplitConv2d and alone.training == training
    torch.testing.assert_close(alone(x), conv(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone(x[0]), conv(x[0]), rtol=1e-4, atol=1e-5)
    assert list(alone.state_dict()) == ["weight", "bias"] and alone.weight is not conv.weight


def test_exported_file_works_without_nasdet(tmp_path: Path) -> None:
    net = foreign(bias=True)
    card = NATSSpace(backbone=net, channel_groups=4).random(random.Random(4), "mine")
    file = save_plain_source(card, tmp_path / "mine.py")
    torch.save({"state": net.state_dict(), "x": image()}, tmp_path / "in.pt")
    shutil.copy(foreign_net.__file__, tmp_path)
    (tmp_path / "use.py").write_text(
        "import sys\n"
        "sys.modules['nasdet'] = None  # whoever imports it now fails\n"
        "import torch, foreign_net, mine\n"
        "given = torch.load('in.pt', weights_only=True)\n"
        "net = foreign_net.foreign(True)\n"
        "net.load_state_dict(given['state'])\n"
        "mine.transform(net, mine.GENOTYPE)\n"
        "torch.save({'y': net(given['x']).detach()}, 'out.pt')\n"
    )
    subprocess.run([sys.executable, "use.py"], cwd=tmp_path, check=True, env={"PATH": "", "PYTHONPATH": ""})
    theirs = torch.load(tmp_path / "out.pt", weights_only=True)["y"]
    torch.testing.assert_close(theirs, NATSSpace.build(card, net)(image()).detach())
    assert "nasdet" not in [line.split(".")[0] for line in file.read_text().splitlines() if "import" in line]


def test_exported_source_holds_the_genotype(tmp_path: Path) -> None:
    card = NATSSpace(width=0.25).random(random.Random(0), "mine")
    (tmp_path / "mine.py").write_text(plain_source(card))
    spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert json.loads(json.dumps(module.GENOTYPE)) == card.genotype
    with pytest.raises(TypeError, match="layer2.0.conv2 must be a plain Conv2d, got SplitConv2d"):
        module.transform(module.transform(tiny(), card.genotype), card.genotype)
    with pytest.raises(ValueError, match="method must be 'nats', got 'fad'"):
        plain_source(Card("fad", "x", {"box": [1]}))
