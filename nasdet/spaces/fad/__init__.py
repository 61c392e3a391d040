"""FAD: sub-networks in the heads of detectors (Zhong et al., ECCV 2020), with representation sharing."""

from __future__ import annotations

from nasdet.spaces.fad.cells import FADStack, FADTower
from nasdet.spaces.fad.genotype import CHAINS, EDGES, SUBSETS, check_genotype, decode
from nasdet.spaces.fad.space import PARTS, FADSpace, FADSupernet
from nasdet.spaces.fad.transformations import set_backend

__all__ = [
    "CHAINS",
    "EDGES",
    "PARTS",
    "SUBSETS",
    "FADSpace",
    "FADStack",
    "FADSupernet",
    "FADTower",
    "check_genotype",
    "decode",
    "set_backend",
]
