"""A slice of ``make fuzz`` that takes seconds, and whether it notices planted bugs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import convolutions
import fuzz
import losses_and_sums
import overlaps
import pooling
import pytest
import suppression

pytestmark = pytest.mark.needs("cpp")
CASES = 60


@pytest.mark.parametrize("op", fuzz.FUZZERS)
def test_random_cases(op: str) -> None:
    failures = [failure for index in range(CASES) if (failure := fuzz.run_case(2024, op, index, "cpp"))]
    assert not failures, failures[0]


def test_every_op_is_fuzzed() -> None:
    import nasdet.ops  # noqa: F401  enters every op in the registry
    from nasdet._dispatch import OPS

    assert set(fuzz.FUZZERS) == {*OPS, "box_iou", "generalized_box_iou"}


def test_a_case_depends_on_seed_op_and_index_alone() -> None:
    def drawn(*key: Any) -> list[float]:
        draw = fuzz.Draw(*key, "cpp")
        return [draw.random.random(), *draw.normal(3).tolist()]

    assert drawn(0, "nms", 5) == drawn(0, "nms", 5)
    assert len({tuple(drawn(*key)) for key in ((0, "nms", 5), (1, "nms", 5), (0, "mix", 5), (0, "nms", 6))}) == 4


def _equal_to_the_threshold_drops(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda boxes, scores, threshold, **more: real(boxes, scores, threshold - 1e-9, **more)


def _ties_by_last_index(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda boxes, scores, *rest, **more: len(boxes) - 1 - real(boxes.flip(0), scores.flip(0), *rest, **more)


def _classes_are_ignored(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda boxes, scores, idxs, *rest, **more: real(boxes, scores, idxs * 0, *rest, **more)


def _one_kept_box_is_lost(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda boxes, scores, threshold, max_out, **more: (
        real(boxes, scores, threshold, max_out, **more)[:1]
        + (real(boxes, scores, threshold, max_out, **more)[1].clamp(max=3),)
    )


def _wider_gaussian(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda boxes, scores, threshold, sigma, *rest, **more: real(
        boxes, scores, threshold, sigma * 1.02, *rest, **more
    )


def _coordinates_in_16_bits(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, boxes, *rest, backend: real(
        x, boxes.bfloat16() if backend == "cpp" else boxes, *rest, backend=backend
    )


def _an_epsilon(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda boxes1, boxes2: real(boxes1, boxes2) * (1 - 2e-6)


def _other_epsilon(real: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*arguments: Any, backend: str, canonical_level: int, **more: Any) -> Any:
        return real(*arguments, backend=backend, canonical_level=canonical_level + (backend == "cpp"), **more)

    return wrong


def _no_gradient_for_one_map(real: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(xs: Any, *rest: Any, backend: str, **more: Any) -> Any:
        return real([xs[0].detach(), *xs[1:]] if backend == "cpp" else xs, *rest, backend=backend, **more)

    return wrong


def _a_thousandth_off(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *rest, backend, **more: real(*rest, backend=backend, **more) * (1.001 if backend == "cpp" else 1)


def _other_dilation(real: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(x: Any, weight: Any, dilations: Any, *rest: Any, backend: str, **more: Any) -> Any:
        return real(x, weight, [1, *dilations[1:]] if backend == "cpp" else dilations, *rest, backend=backend, **more)

    return wrong


def _a_row_too_low(real: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(x: Any, *rest: Any, backend: str) -> Any:
        return real(x.roll(1, 2) if backend == "cpp" else x, *rest, backend=backend)

    return wrong


@pytest.mark.parametrize(
    ("module", "op", "bug"),
    [
        pytest.param(suppression, "nms", _equal_to_the_threshold_drops, id="nms-at-the-threshold"),
        pytest.param(suppression, "nms", _ties_by_last_index, id="nms-ties"),
        pytest.param(suppression, "batched_nms", _classes_are_ignored, id="batched_nms-classes"),
        pytest.param(suppression, "nms_padded", _one_kept_box_is_lost, id="nms_padded-count"),
        pytest.param(suppression, "soft_nms", _wider_gaussian, id="soft_nms-sigma"),
        pytest.param(overlaps, "box_iou", _an_epsilon, id="box_iou-value"),
        pytest.param(overlaps, "generalized_box_iou", _an_epsilon, id="generalized_box_iou-value"),
        pytest.param(pooling, "roi_align", _coordinates_in_16_bits, id="roi_align-coordinates"),
        pytest.param(pooling, "multilevel_roi_align", _other_epsilon, id="multilevel_roi_align-level"),
        pytest.param(losses_and_sums, "mix", _no_gradient_for_one_map, id="mix-gradient"),
        pytest.param(losses_and_sums, "norm_act_mix", _a_thousandth_off, id="norm_act_mix-value"),
        pytest.param(losses_and_sums, "sigmoid_focal_loss", _a_thousandth_off, id="sigmoid_focal_loss-value"),
        pytest.param(convolutions, "mixed_dilation_conv2d", _a_thousandth_off, id="mixed_dilation_conv2d-value"),
        pytest.param(convolutions, "grouped_dilation_conv2d", _other_dilation, id="grouped_dilation_conv2d-dilation"),
        pytest.param(convolutions, "depthwise_conv2d", _a_row_too_low, id="depthwise_conv2d-padding"),
    ],
)
def test_planted_bugs_are_found(monkeypatch: pytest.MonkeyPatch, module: Any, op: str, bug: Callable[..., Any]) -> None:
    monkeypatch.setattr(module, op, bug(getattr(module, op)))
    failure = next((text for index in range(200) if (text := fuzz.run_case(7, op, index, "cpp"))), "")
    assert failure.startswith(f"{op}, seed 7, case ") and "AssertionError" in failure


def test_a_failure_says_how_to_repeat_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(draw: fuzz.Draw) -> None:
        draw.note(drawn=draw.size(9))
        raise AssertionError("planted")

    monkeypatch.setitem(fuzz.FUZZERS, "mix", wrong)
    assert fuzz.main(["--op", "mix", "--seed", "3", "--index", "14"]) == 1
    text = capsys.readouterr().out
    assert "mix, seed 3, case 14, backend cpp" in text and "drawn: " in text and "planted" in text


def test_the_time_limit_holds_and_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.run_batch(0, "nms", 0, 1000, "cpp", deadline=0.0) == fuzz.Batch("nms", 0)
    assert fuzz.fuzz(0, 0.0, ["nms", "mix"], 150, 1, "cpp") == 2
    assert "time was up before 150 cases of nms, mix" in capsys.readouterr().out


def test_every_case_is_in_one_batch() -> None:
    batches = list(fuzz._batches(["a", "b"], 250))
    indices = [index for op, first, count in batches if op == "b" for index in range(first, first + count)]
    assert indices == list(range(250)) and {op for op, *_ in batches[:2]} == {"a", "b"}
