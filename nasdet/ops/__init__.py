"""The operators. Each is one file; importing it enters it in the registry that tests and benchmarks iterate over."""

from nasdet._dispatch import use_backend
from nasdet.ops.boxes import box_iou, generalized_box_iou
from nasdet.ops.depthwise_conv2d import depthwise_conv2d
from nasdet.ops.grouped_dilation_conv2d import grouped_dilation_conv2d
from nasdet.ops.mix import mix
from nasdet.ops.mixed_dilation_conv2d import mixed_dilation_conv2d
from nasdet.ops.nms import batched_nms, nms, nms_padded
from nasdet.ops.norm_act_mix import norm_act_mix
from nasdet.ops.roi_align import multilevel_roi_align, roi_align
from nasdet.ops.sigmoid_focal_loss import sigmoid_focal_loss
from nasdet.ops.soft_nms import soft_nms

__all__ = [
    "batched_nms",
    "box_iou",
    "depthwise_conv2d",
    "generalized_box_iou",
    "grouped_dilation_conv2d",
    "mix",
    "mixed_dilation_conv2d",
    "multilevel_roi_align",
    "nms",
    "nms_padded",
    "norm_act_mix",
    "roi_align",
    "sigmoid_focal_loss",
    "soft_nms",
    "use_backend",
]
