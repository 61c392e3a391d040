"""DetNAS: backbones of ShuffleNetV2 blocks, one choice of four at each place (Chen et al., NeurIPS 2019)."""

from __future__ import annotations

from nasdet.spaces.detnas.costs import CostTable, macs_table, parameters_table
from nasdet.spaces.detnas.genotype import CHOICES, SPACES, Sizes, check_genotype, from_genes, to_genes
from nasdet.spaces.detnas.space import DetNASSpace, card_sizes

__all__ = [
    "CHOICES",
    "SPACES",
    "CostTable",
    "DetNASSpace",
    "Sizes",
    "card_sizes",
    "check_genotype",
    "from_genes",
    "macs_table",
    "parameters_table",
    "to_genes",
]
