"""NATS: a trained backbone transformed for detection by dilations per channel group (Peng et al., NeurIPS 2019)."""

from __future__ import annotations

from nasdet.spaces.nats.export import plain_source, save_plain_source, to_plain_torch
from nasdet.spaces.nats.genotype import SETS, check_genotype, decode, intensities
from nasdet.spaces.nats.layers import Layer, bottleneck_convs, depthwise_convs, find_layers, spatial_convs
from nasdet.spaces.nats.space import NATSSpace

__all__ = [
    "SETS",
    "Layer",
    "NATSSpace",
    "bottleneck_convs",
    "check_genotype",
    "decode",
    "depthwise_convs",
    "find_layers",
    "intensities",
    "plain_source",
    "save_plain_source",
    "spatial_convs",
    "to_plain_torch",
]
