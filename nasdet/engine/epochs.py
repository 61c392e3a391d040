"""Epochs of a gradient search whose alphas wait: the first ones train the weights alone."""

from __future__ import annotations

import math


class FrozenEpochs:
    """For settings with ``epochs``, ``frozen_epochs``, ``steps`` and ``batch``."""

    epochs: int
    frozen_epochs: int
    steps: int | None
    batch: int

    def check_epochs(self) -> None:
        """Raise ``ValueError`` unless the alphas move in some epoch."""
        if not 0 <= self.frozen_epochs < self.epochs:
            raise ValueError(f"frozen_epochs must be in 0..{self.epochs - 1}, got {self.frozen_epochs}")

    def total_steps(self, images: int) -> int:
        """Steps of the weights on ``images`` images."""
        return self.steps or self.epochs * math.ceil(images / self.batch)

    def alphas_from(self, total: int) -> int:
        """The first step after which the alphas move; at least one does."""
        return min(total * self.frozen_epochs // self.epochs, total - 1)
