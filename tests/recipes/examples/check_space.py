"""The new space makes models from cards, and its supernet is searched and derived."""

from __future__ import annotations

import random

import torch

from nasdet.arch import Card
from nasdet.search.gradient import Bilevel
from nasdet.search.random import RandomSearch
from nasdet.spaces import space_class
from nasdet.spaces.assemble import ModelConfig, build_model

space = space_class("kernel")()
TINY = {"backbone": "resnet18", "width": 0.125, "fpn_channels": 8, "levels": 2, "norm": "gn", "num_classes": 2}
images = torch.randn(1, 3, 64, 64)
targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}]

# A card that went through JSON builds the model that its genotype says.
for _ in range(4):
    card = Card.from_json(space.random(random.Random(0)).to_json())
    model = build_model(ModelConfig(**TINY, towers=card.to_json()))
    assert {g: conv.kernel_size[0] for g, conv in model.towers.convs.items()} == card.genotype
    assert len(model(images)["cls"]) == 2
try:
    build_model(ModelConfig(**TINY, towers=Card("kernel", "bad", {"box": 1, "cls": 5}).to_json()))
    raise AssertionError("an illegal card was built")
except ValueError as error:
    assert "cls must be one of (1, 3), got 5" in str(error)

# Every architecture is drawn; the supernet restricted to a card computes what the built towers do.
search = RandomSearch(space)
assert len({search.ask().key for _ in range(space.size())}) == space.size() == 4
supernet = space.supernet(8)
built = space.build(card, 8)
with torch.no_grad():
    for group, size in card.genotype.items():
        index = (1, 3).index(size)
        supernet.alphas[group].copy_(torch.tensor([1e9 * (i == index) for i in range(2)]))
        built.convs[group].load_state_dict(supernet.convs[group][index].state_dict())
    x = torch.randn(1, 8, 5, 5)
    for a, b in zip(supernet(x), built(x), strict=True):
        torch.testing.assert_close(a, b)
assert space.derive(supernet).genotype == card.genotype

# One bilevel step inside a detector moves both sides.
model = build_model(ModelConfig(**TINY), towers=space.supernet(8))
alphas = space.arch_parameters(model.towers)
before = [alpha.detach().clone() for alpha in alphas]
weights = [p for p in model.parameters() if not any(p is alpha for alpha in alphas)]


def loss() -> torch.Tensor:
    return torch.stack(list(model.loss(model(images), targets).values())).sum()


values = Bilevel(weights, alphas, arch_lr=0.1).step(0, loss, loss)
assert all(value.isfinite() for value in values.values())
assert any(not torch.equal(a, b) for a, b in zip(before, alphas, strict=True))
print("same")
