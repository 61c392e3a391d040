"""The memory of a supernet's step: forecast from shapes alone against what was held, and the modes in comparison."""

from __future__ import annotations

from typing import Any

import pytest

from nasdet.measure.forecast import forecast_memory
from nasdet.measure.memory import peak_memory
from nasdet.spaces.hit import HitSpace, Sizes, mixed_layers
from nasdet.spaces.hit.costs import activations_table
from nasdet.spaces.hit.steps import PartStep

STAGES = ((16, 1, 2), (24, 1, 2), (32, 1, 2), (48, 1, 2))
SIZES = Sizes(stem=8, stages=STAGES, tail=(64, 96), channels=24, inputs=("c3", "c4", "c5"), blocks=1, hidden=32)
NAMES = ("ir_k3_d1_e1", "ir_k5_d2_e6", "ir_k3_d1_e3", "sep_k3_d3", "conv_k5_d1", "conv_k3_d2")
SPACE, ALL = HitSpace(SIZES, NAMES), HitSpace(SIZES, "full")
RETINA = HitSpace(Sizes(channels=16, inputs=("c3", "c4", "c5"), extra="convs", blocks=1), NAMES, parts=("towers",))
OPTIONS: dict[str, Any] = {"size": (96, 128), "rois": 32}
CASES = {
    f"{part}-{memory}-{learns}": (part, memory, learns)
    for part in ("backbone", "neck", "head")
    for memory in ("full", "recompute", "sampled")
    for learns in ("weights", "alphas")
    if learns == "weights" or part == "backbone"
}


def measured(step: Any) -> int:
    return peak_memory(step, warmup=1, tensors_only=True)


@pytest.mark.parametrize(("part", "memory", "learns"), CASES.values(), ids=CASES)
def test_the_forecast_is_what_is_held(part: str, memory: str, learns: str) -> None:
    options = OPTIONS | {"memory": memory, "learns": learns}
    if part == "neck":  # larger maps: on the smallest the weights' gradients are most of all
        options["size"] = (192, 256)
    forecast = forecast_memory(lambda: PartStep(SPACE, part, **options))
    assert forecast == pytest.approx(measured(PartStep(SPACE, part, **options)), rel=0.15)


def test_the_forecast_of_towers_on_five_levels() -> None:
    options: dict[str, Any] = {"size": (96, 160), "batch": 2, "memory": "recompute"}
    forecast = forecast_memory(lambda: PartStep(RETINA, "towers", **options))
    assert forecast == pytest.approx(measured(PartStep(RETINA, "towers", **options)), rel=0.15)


def test_the_modes_in_their_order() -> None:
    """Of 32 operations in two layers one at a time is held, and it is less than a tenth of all.

    In the alphas' half of a step: the weights' gradients, which are the same in all modes, are not there. The largest
    operation keeps 26 of the 344 maps of a layer, and needs some more while its gradient is computed.
    """
    space = HitSpace(Sizes(channels=24, blocks=2, hidden=32), "full")
    peaks = {
        memory: forecast_memory(
            lambda memory=memory: PartStep(space, "head", **OPTIONS, memory=memory, learns="alphas")
        )
        for memory in ("full", "recompute", "sampled")
    }
    assert peaks["recompute"] < 0.1 * peaks["full"]
    assert peaks["recompute"] < peaks["sampled"] < 0.25 * peaks["full"]


def test_kept_numbers_are_most_of_the_full_modes_peak() -> None:
    """The table of what is kept for backward, summed over all candidates, against the traced peak."""
    table = activations_table(SPACE.sizes, SPACE.candidates, (96, 128), 32).parts["backbone"]
    kept = 4 * (table.fixed + sum(sum(row.values()) for row in table.rows))
    peak = forecast_memory(lambda: PartStep(SPACE, "backbone", **OPTIONS))
    assert 0.8 * peak < kept < peak


def test_a_sampled_steps_forecast_is_for_the_largest_candidates() -> None:
    """Of the 32 at every place of the neck an inverted residual of expansion 6; more candidates need more."""
    step = PartStep(ALL, "neck", **OPTIONS, memory="sampled", samples=1)
    chosen = [layer.names[index] for layer in mixed_layers(step.model)["neck"] for index in layer.drawn or ()]
    assert len(chosen) == 6 and all(name.endswith("_e6") for name in chosen)
    one, two = (
        forecast_memory(lambda n=n: PartStep(SPACE, "neck", **OPTIONS, memory="sampled", samples=n)) for n in (1, 2)
    )
    assert one < two < forecast_memory(lambda: PartStep(SPACE, "neck", **OPTIONS))


def test_nothing_is_allocated_for_a_forecast() -> None:
    """A step that no machine of ours could hold: 8 operations on 16 images' RoIs, 256 channels of 28 x 28."""
    space = HitSpace(Sizes(pooled=28, blocks=1), parts=("head",))
    peak = forecast_memory(lambda: PartStep(space, "head", rois=1000, batch=16))
    assert peak > 100e9


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="learns must be one of weights, alphas, got 'both'"):
        PartStep(SPACE, "neck", learns="both")
    with pytest.raises(ValueError, match="samples must be a positive integer, got 0"):
        PartStep(SPACE, "neck", memory="sampled", samples=0)
