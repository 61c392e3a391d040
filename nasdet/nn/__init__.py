"""Modules over the operators."""

from nasdet.nn.group_norm_relu import GroupNormReLU, group_norm_relu
from nasdet.nn.roi_align import MultiScaleRoIAlign, RoIAlign

__all__ = ["GroupNormReLU", "MultiScaleRoIAlign", "RoIAlign", "group_norm_relu"]
