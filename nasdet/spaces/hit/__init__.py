"""Hit-Detector: backbone, neck and head of a detector searched together (Guo et al., CVPR 2020)."""

from __future__ import annotations

from nasdet.spaces.hit.costs import CostTable, PartTable, macs_table, parameters_table, table
from nasdet.spaces.hit.genotype import (
    LAYOUTS,
    ONE_STAGE,
    OPERATIONS,
    PARTS,
    SUBSPACES,
    TWO_STAGE,
    Operation,
    Place,
    Sizes,
    check_genotype,
    decode,
    named_operation,
    places,
)
from nasdet.spaces.hit.mixture import recomputed_mix
from nasdet.spaces.hit.networks import HitBackbone, HitHead, HitNeck, HitTowers, network, two_stage
from nasdet.spaces.hit.operations import operation
from nasdet.spaces.hit.screening import Screening, column_penalty, scores
from nasdet.spaces.hit.space import HitSpace, card_sizes
from nasdet.spaces.hit.supernet import (
    MEMORY,
    MixedLayer,
    all_mixed_layers,
    alpha_matrix,
    draw,
    expected_cost,
    expected_part_cost,
    keep,
    kept_names,
    mixed_layers,
    set_memory,
)

__all__ = [
    "LAYOUTS",
    "MEMORY",
    "ONE_STAGE",
    "OPERATIONS",
    "PARTS",
    "SUBSPACES",
    "TWO_STAGE",
    "CostTable",
    "HitBackbone",
    "HitHead",
    "HitNeck",
    "HitSpace",
    "HitTowers",
    "MixedLayer",
    "Operation",
    "PartTable",
    "Place",
    "Screening",
    "Sizes",
    "all_mixed_layers",
    "alpha_matrix",
    "card_sizes",
    "check_genotype",
    "column_penalty",
    "decode",
    "draw",
    "expected_cost",
    "expected_part_cost",
    "keep",
    "kept_names",
    "macs_table",
    "mixed_layers",
    "named_operation",
    "network",
    "operation",
    "parameters_table",
    "places",
    "recomputed_mix",
    "scores",
    "set_memory",
    "table",
    "two_stage",
]
