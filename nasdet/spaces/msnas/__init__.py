"""MSNAS: strides of a multi-scale encoder, and the maps that its detection heads use (under review, ICLR 2021)."""

from __future__ import annotations

from nasdet.spaces.msnas.costs import VARIANTS, encoder_macs, macs, macs_range, parameters, rpn_macs
from nasdet.spaces.msnas.genotype import (
    FPN_HEADS,
    check_genotype,
    genotype,
    head_blocks,
    head_vectors,
    laterals,
    legal_heads,
    resolutions,
    stage_ends,
)
from nasdet.spaces.msnas.sampling import chain_count, pair_count, random_genotype, random_strides
from nasdet.spaces.msnas.space import MSNASSpace

__all__ = [
    "FPN_HEADS",
    "VARIANTS",
    "MSNASSpace",
    "chain_count",
    "check_genotype",
    "encoder_macs",
    "genotype",
    "head_blocks",
    "head_vectors",
    "laterals",
    "legal_heads",
    "macs",
    "macs_range",
    "pair_count",
    "parameters",
    "random_genotype",
    "random_strides",
    "resolutions",
    "rpn_macs",
    "stage_ends",
]
