"""Data sets, splits, transforms and loaders."""

from __future__ import annotations

from nasdet.data.base import DetectionDataset
from nasdet.data.classification import ClassificationDataset, ClassificationFolder
from nasdet.data.coco import CocoDetection
from nasdet.data.digit_classes import write_digit_classes
from nasdet.data.digits import write_digits
from nasdet.data.errors import DataError, TestSplitError
from nasdet.data.folder import DataFolder, open_data
from nasdet.data.loader import Loader, make_eval_loader, make_loader
from nasdet.data.pictures import Box, Picture, read_image
from nasdet.data.split import Split, require_selectable
from nasdet.data.transforms import PAPER_SIZES, Batch, Compose, HorizontalFlip, Resize, collate
from nasdet.data.voc import VocDetection

__all__ = [
    "PAPER_SIZES",
    "Batch",
    "Box",
    "ClassificationDataset",
    "ClassificationFolder",
    "CocoDetection",
    "Compose",
    "DataError",
    "DataFolder",
    "DetectionDataset",
    "HorizontalFlip",
    "Loader",
    "Picture",
    "Resize",
    "Split",
    "TestSplitError",
    "VocDetection",
    "collate",
    "make_eval_loader",
    "make_loader",
    "open_data",
    "read_image",
    "require_selectable",
    "write_digit_classes",
    "write_digits",
]
