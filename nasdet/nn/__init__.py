"""Modules over the operators."""

from nasdet.nn.group_norm_relu import GroupNormReLU, group_norm_relu

__all__ = ["GroupNormReLU", "group_norm_relu"]
