"""A ResNet as others write it: bottlenecks that torchvision's and timm's users know, without anything of nasdet."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """A bottleneck as torchvision and timm spell it, with a bias in the 3x3 to be awkward."""

    def __init__(self, inp: int, planes: int, stride: int = 1, bias: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inp, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=bias)
        self.bn2, self.conv3 = nn.BatchNorm2d(planes), nn.Conv2d(planes, inp, 1, bias=False)
        self.bn3, self.act1 = nn.BatchNorm2d(inp), nn.ReLU(inplace=True)
        self.downsample = nn.AvgPool2d(stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.act1(self.bn2(self.conv2(y)))))
        return self.act1(y + (x if self.downsample is None else self.downsample(x)))


def foreign(bias: bool = False) -> nn.Sequential:
    stages: dict[str, nn.Module] = {"conv1": nn.Conv2d(3, 8, 3, 4, 1), "layer1": nn.Sequential(Bottleneck(8, 4))}
    for stage in (2, 3, 4):
        stages[f"layer{stage}"] = nn.Sequential(Bottleneck(8, 4, 2, bias), Bottleneck(8, 4, 1, bias))
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(stages)).eval()
