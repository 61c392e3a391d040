"""Drop-ins: the names, argument orders and defaults of torchvision, mmcv and detectron2 over ``nasdet.ops``.

``from nasdet.compat import torchvision`` (or ``mmcv``, ``detectron2``) gives functions and modules that can stand
where that library's did; none of them needs that library. :func:`patch_torchvision` goes the other way round: it puts
nasdet's kernels under an installed, unchanged torchvision, and so under every model that calls it.
"""

from __future__ import annotations

from nasdet.compat import detectron2, mmcv, torchvision
from nasdet.compat.patch import Patch, patch_torchvision

__all__ = ["Patch", "detectron2", "mmcv", "patch_torchvision", "torchvision"]
