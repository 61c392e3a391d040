"""Screening: the penalty, the schedule of removals, the ranking, and a planted preference that is found."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from nasdet.spaces.hit import (
    OPERATIONS,
    HitSpace,
    Screening,
    Sizes,
    alpha_matrix,
    column_penalty,
    keep,
    mixed_layers,
    scores,
)
from nasdet.spaces.hit.screening import MU, sizes_after, worst

NAMES = tuple(OPERATIONS)


def test_the_penalty_is_the_sum_of_the_columns_norms() -> None:
    alphas = torch.tensor([[3.0, 0.0, -1.0], [4.0, 0.0, 2.0]], requires_grad=True)
    value = column_penalty(alphas)
    assert value.item() == pytest.approx(5 + 0 + 5**0.5)
    value.backward()
    assert alphas.grad is not None
    assert torch.allclose(alphas.grad[:, 0], torch.tensor([0.6, 0.8]))
    assert torch.equal(alphas.grad[:, 1], torch.zeros(2))  # no NaN at a column of zeros
    assert MU == 0.1


def test_the_penalty_takes_whole_operations_together() -> None:
    """Of two matrices with the same entries the one that has them in fewer columns costs less."""
    spread, gathered = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert column_penalty(gathered) < column_penalty(spread)


def test_scores_are_mean_probabilities() -> None:
    found = scores([[0.0, 0.0], [100.0, 0.0]], ["a", "b"])
    assert found == {"a": pytest.approx(0.75), "b": pytest.approx(0.25)}
    assert sum(scores(torch.randn(5, 7).tolist(), list("abcdefg")).values()) == pytest.approx(1)


def test_the_default_schedule_drops_four_an_epoch() -> None:
    assert [sizes_after(epoch, 32) for epoch in range(1, 14)] == [32] * 6 + [28, 24, 20, 16, 12, 8] + [8]
    assert [sizes_after(epoch, 10, 3, 2, 4) for epoch in range(1, 6)] == [10, 7, 5, 3, 3]
    assert sizes_after(12, 8) == 8 and sizes_after(3, 5, 1, 3, 3) == 1


def test_the_worst_are_removed_and_of_equals_the_later() -> None:
    assert worst({"a": 0.2, "b": 0.1, "c": 0.1, "d": 0.6}, 2) == ["c", "b"]
    assert worst({"a": 0.5, "b": 0.5}, 0) == []


def test_a_screening_ends_with_eight_and_records_everything() -> None:
    screening = Screening("head", list(NAMES))
    liking = {name: float(place % 5) for place, name in enumerate(NAMES)}
    removed = {
        epoch: screening.end_epoch(epoch, [[liking[name] for name in screening.left]] * 4) for epoch in range(1, 13)
    }
    assert [len(names) for names in removed.values()] == [0] * 6 + [4] * 6
    assert len(screening.left) == 8 and {liking[name] for name in screening.left} <= {3.0, 4.0}
    assert screening.left == [name for name in NAMES if name in screening.left]
    # removed are always the worst of those that were left
    for entry in screening.history:
        rest = [score for name, score in entry["scores"].items() if name not in entry["removed"]]
        assert all(entry["scores"][name] <= min(rest) for name in entry["removed"])
        assert sum(entry["scores"].values()) == pytest.approx(1)
    plain = json.loads(json.dumps(screening.to_json()))
    assert Screening.from_json(plain) == screening and plain["left"] == screening.left
    HitSpace(candidates={part: plain["left"] for part in ("backbone", "neck", "head")})


def test_a_planted_preference_survives_screening() -> None:
    """Alphas of a real part learn, with the penalty, that four operations lower a loss; these are what is left.

    The preference outweighs the penalty: a weaker one would leave every column at 0.
    """
    torch.manual_seed(0)
    liked = {"ir_k3_d1_e6", "sep_k5_d2", "conv_k3_d1", "ir_k7_d1_e1"}
    sizes = Sizes(channels=4, blocks=3)
    net = HitSpace(sizes, "full", ("head",)).supernet("head")
    screening = Screening("head", list(NAMES), keep=4, first=2, last=8)
    gain = torch.tensor([1.0 if name in liked else 0.0 for name in NAMES])
    optimizer = torch.optim.Adam(HitSpace.arch_parameters(net), lr=0.02)
    for epoch in range(1, 9):
        left = torch.tensor([NAMES.index(name) for name in screening.left])
        for _ in range(15):
            alphas = alpha_matrix(mixed_layers(net)["head"])
            loss = -10 * (alphas.softmax(1) * gain[left]).sum() + MU * column_penalty(alphas)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        screening.end_epoch(epoch, alpha_matrix(mixed_layers(net)["head"]).tolist())
        keep(net, "head", screening.left)
    assert set(screening.left) == liked
    assert sum(p.numel() for p in HitSpace.arch_parameters(net)) == 3 * 32


def test_the_penalty_sets_operations_apart() -> None:
    """The paper's Figure 4: with mu probabilities differ more than without, here for a weak preference."""
    spreads = []
    for mu in (0.0, 0.1):
        alphas = nn.Parameter(1e-3 * torch.randn(6, 8, generator=torch.Generator().manual_seed(1)))
        gain = torch.linspace(0.2, 1.0, 8)
        optimizer = torch.optim.Adam([alphas], lr=0.05)
        for _ in range(400):
            optimizer.zero_grad()
            ((alphas.softmax(1) - gain / gain.sum()).square().sum() + mu * column_penalty(alphas) / 100).backward()
            optimizer.step()
        norms = alphas.detach().norm(dim=0)
        spreads.append(float(norms.max() / norms.min().clamp(min=1e-6)))
    assert spreads[1] > spreads[0]


CALLS: dict[str, tuple[Any, str]] = {
    "shape": (lambda: column_penalty(torch.zeros(3)), r"alphas must have shape \(layers, operations\), got \(3,\)"),
    "rows": (lambda: scores([[0.0]], ["a", "b"]), r"alphas must be rows of 2 numbers, got lengths \[1\]"),
    "nan": (lambda: scores([[float("nan"), 0.0]], ["a", "b"]), "alphas must be finite, got"),
    "keep": (lambda: sizes_after(1, 4, 5), "keep must be in 1..4, got 5"),
    "epochs": (lambda: sizes_after(1, 9, 8, 5, 4), "first must be in 1..4, got 5"),
    "count": (lambda: worst({"a": 1.0}, 1), "count must be in 0..0, got 1"),
    "names": (lambda: Screening("head", ["conv_k9"]), "names: operation must be .*, got 'conv_k9' at 0"),
    "few": (lambda: Screening("head", list(NAMES[:3])), "keep must be in 1..3, got 8"),
    "key": (lambda: Screening.from_json({"part": "head"}), "screening must have the key 'names', got part"),
}


@pytest.mark.parametrize(("call", "words"), CALLS.values(), ids=CALLS)
def test_bad_arguments(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_an_epoch_comes_once() -> None:
    screening = Screening("neck", list(NAMES))
    screening.end_epoch(1, [[0.0] * 32])
    with pytest.raises(ValueError, match="epoch must be after 1, got 1"):
        screening.end_epoch(1, [[0.0] * 32])
