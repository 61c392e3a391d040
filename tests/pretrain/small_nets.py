"""Backbones of a few thousand parameters: a plain one, and a supernet of two choices at each of two places."""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import nn

from nasdet.arch import Card
from nasdet.engine.paths import Paths, uniform_draw
from nasdet.engine.pretrain import PretrainConfig

CHOICES = ("k1", "k3")


def conv(inp, out, kernel=3, stride=2):
    layers = nn.Conv2d(inp, out, kernel, stride=stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(out)
    return nn.Sequential(*layers, nn.ReLU())


class Small(nn.Module):
    """Three convolutions of stride 2."""

    def __init__(self, width=8):
        super().__init__()
        self.stem, self.channels = conv(3, width), {"c4": 4 * width}
        self.first, self.second = self.block(width, 2 * width), self.block(2 * width, 4 * width)

    def block(self, inp, out):
        return conv(inp, out)

    def forward(self, images):
        return {"c4": self.second(self.first(self.stem(images)))}


class Choice(nn.Module):
    def __init__(self, inp, out):
        super().__init__()
        self.k1, self.k3 = conv(inp, out, 1), conv(inp, out, 3)
        self.chosen = "k3"

    def forward(self, x):
        return getattr(self, self.chosen)(x)


class SmallSupernet(Small):
    """The same with a 1x1 or a 3x3 convolution at the last two places."""

    def block(self, inp, out):
        return Choice(inp, out)

    def activate(self, card):
        self.first.chosen, self.second.chosen = card.genotype


class SmallSpace:
    """Its four paths."""

    def __init__(self):
        self.mutations = {"mutate": lambda card, rng: self.random(rng)}
        self.crossovers = {"crossover": lambda one, two, rng: self.card(one.genotype[0], two.genotype[1])}

    def card(self, *genotype):
        return Card("small", "small", list(genotype))

    def random(self, rng: random.Random):
        return self.card(rng.choice(CHOICES), rng.choice(CHOICES))

    def check(self, card):
        if len(card.genotype) != 2 or not set(card.genotype) <= set(CHOICES):
            raise ValueError(f"genotype must be two of {CHOICES}, got {card.genotype}")

    def macs(self, genotype: Sequence[str]) -> float:
        return sum({"k1": 1.0, "k3": 9.0}[choice] for choice in genotype)


CONFIG = PretrainConfig(
    steps=6,
    batch=8,
    lr=0.05,
    last=12,
    size=24,
    flip=False,
    recalibration_images=16,
    eval_batch=16,
    workers=0,
    log_every=2,
    checkpoint_every=2,
    eval_every=4,
    device="cpu",
)
PATHS = Paths(uniform_draw(SmallSpace(), 0))
