"""Modules over the operators."""

from nasdet.nn.accelerate import AcceleratedConv2d, Acceleration, accelerate, decelerate
from nasdet.nn.depthwise_conv import DepthwiseConv2d
from nasdet.nn.dilation_conv import GroupedDilationConv2d, MixedDilationConv2d, check_same_conv2d
from nasdet.nn.group_norm_relu import GroupNormReLU, group_norm_relu
from nasdet.nn.roi_align import MultiScaleRoIAlign, RoIAlign

__all__ = [
    "AcceleratedConv2d",
    "Acceleration",
    "DepthwiseConv2d",
    "GroupNormReLU",
    "GroupedDilationConv2d",
    "MixedDilationConv2d",
    "MultiScaleRoIAlign",
    "RoIAlign",
    "accelerate",
    "check_same_conv2d",
    "decelerate",
    "group_norm_relu",
]
