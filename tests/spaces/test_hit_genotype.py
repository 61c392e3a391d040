"""Hit-Detector's operations, sub-spaces, layouts, genotypes and cost tables, without a network."""

from __future__ import annotations

from itertools import product
from random import Random
from typing import Any

import pytest

from nasdet.arch import Card, load_card
from nasdet.spaces.hit import (
    LAYOUTS,
    ONE_STAGE,
    OPERATIONS,
    SUBSPACES,
    TWO_STAGE,
    HitSpace,
    Operation,
    Sizes,
    card_sizes,
    check_genotype,
    decode,
    macs_table,
    parameters_table,
    places,
    table,
)

TINY = Sizes(
    stem=4,
    stages=((8, 1, 2), (8, 1, 2), (12, 1, 2), (16, 1, 2)),
    tail=(),
    channels=8,
    inputs=("c5",),
    blocks=1,
    hidden=6,
)
# the appendix: kernel, dilation, expansion
SCREENED = {
    "backbone": "ir313 ir316 ir323 ir513 ir516 ir526 ir536 ir716",
    "neck": "conv33 conv51 ir321 ir513 sep31 sep33 sep52 sep53",
    "head": "ir313 ir316 ir326 ir513 ir516 ir716 conv31 conv51",
}


def short(name: str) -> str:
    op = OPERATIONS[name]
    return f"{op.kind}{op.kernel}{op.dilation}{op.expansion or ''}"


def test_the_list_has_32_operations() -> None:
    assert len(OPERATIONS) == 32
    expected = [f"ir{k}{d}{e}" for k in (3, 5) for d in (1, 2, 3) for e in (1, 3, 6)] + ["ir711", "ir716"]
    expected += [f"{kind}{k}{d}" for kind in ("sep", "conv") for k in (3, 5) for d in (1, 2, 3)]
    assert [short(name) for name in OPERATIONS] == expected
    assert all(op.name == name for name, op in OPERATIONS.items())
    assert OPERATIONS["ir_k7_d1_e6"] == Operation("ir", 7, 1, 6) and OPERATIONS["sep_k5_d2"].expansion is None


def test_the_screened_spaces() -> None:
    assert {part: " ".join(map(short, SUBSPACES[part])) for part in SCREENED} == SCREENED
    assert SUBSPACES["towers"] == SUBSPACES["head"]
    assert all(len(set(names)) == 8 for names in SUBSPACES.values())


def test_both_layouts_of_the_backbone() -> None:
    released, paper = LAYOUTS["released"], LAYOUTS["paper"]
    assert released.level_channels() == {"c2": 48, "c3": 96, "c4": 256, "c5": 2048}
    assert paper.level_channels() == {"c2": 48, "c3": 96, "c4": 256, "c5": 352}
    for sizes in (released, paper):
        made = places("backbone", sizes)
        assert len(made) == 20 and len(places("backbone", sizes.halved())) == 10
        assert made[0].inp == 16 and all(b.inp == a.out for a, b in zip(made, made[1:], strict=False))
    assert [p.index for p in places("backbone", released) if p.stride == 2] == [0, 4, 8, 16]
    assert [p.index for p in places("backbone", paper) if p.stride == 2] == [0, 4, 8, 16]
    assert [stage[1] for stage in paper.halved().stages] == [2, 2, 4, 2]
    assert [p.inp for p in places("neck", released)] == [48, 96, 256, 2048, 256, 256, 256, 256]
    assert [p.inp for p in places("neck", paper)][3] == 352
    assert len(places("head", released)) == 4 and len(places("towers", released)) == 8
    assert released.pyramid() == ("c2", "c3", "c4", "c5", "c6")


def test_sizes_of_the_spaces() -> None:
    assert HitSpace().size() == 8**32 == 79228162514264337593543950336
    assert HitSpace(candidates="full", parts=("neck",)).size() == 32**8
    shared = HitSpace("paper", ["ir_k3_d1_e3", "sep_k3_d1", "conv_k3_d1"])
    assert shared.size() == 3**32 and len(set(shared.candidates.values())) == 1
    assert HitSpace(parts=ONE_STAGE).size() == 8 ** (20 + 8 + 8)
    assert HitSpace().parts == TWO_STAGE


def test_the_published_card() -> None:
    card, space = load_card("hit-detector"), HitSpace()
    space.check(card)
    assert card_sizes(card) == LAYOUTS["released"]
    assert [short(name) for name in card.genotype["head"]] == ["ir516", "ir316", "ir516", "ir516"]
    assert " ".join(map(short, card.genotype["neck"])) == "sep53 sep53 sep52 sep33 sep33 sep53 sep53 sep33"
    assert " ".join(map(short, card.genotype["backbone"])) == (
        "ir313 ir313 ir323 ir313 ir516 ir516 ir313 ir313 ir716 ir516 ir526 ir513 ir516 ir526 ir516 ir526 "
        "ir716 ir516 ir526 ir516"
    )
    lines = space.describe(card)
    assert len(lines) == 5 + 2 + 1
    assert lines[3].startswith("backbone stage 4 (256 channels, stride 1): ir_k5_d1_e6 ir_k5_d2_e6")
    assert lines[5:7] == [
        "neck top-down: sep_k5_d3 sep_k5_d3 sep_k5_d2 sep_k3_d3",
        "neck bottom-up: sep_k3_d3 sep_k5_d3 sep_k5_d3 sep_k3_d3",
    ]


@pytest.mark.parametrize("space", [HitSpace(), HitSpace("paper", "full", ONE_STAGE), HitSpace(TINY, parts=("head",))])
def test_random_cards_are_of_the_space(space: HitSpace) -> None:
    rng = Random(0)
    cards = [space.random(rng) for _ in range(5)]
    for card in cards:
        space.check(card)
        assert Card.from_json(card.to_json()) == card and Sizes.from_json(card.settings) == space.sizes
        assert check_genotype(card.genotype, space.sizes) == space.parts
    assert len({card.key for card in cards}) == 5 or space.size() == 8
    drawn = {name for _ in range(60) for name in space.random(rng).genotype[space.parts[-1]]}
    assert drawn == set(space.candidates[space.parts[-1]])


def test_decoding_takes_the_highest_and_the_first_of_equals() -> None:
    names = {"neck": ("sep_k3_d1", "conv_k3_d1", "ir_k3_d1_e1")}
    assert decode({"neck": [[0.0, 2.0, 1.0], [1.0, -1.0, 1.0]]}, names) == {"neck": ["conv_k3_d1", "sep_k3_d1"]}
    with pytest.raises(ValueError, match=r"alphas of neck must have 3 columns, got \[2\]"):
        decode({"neck": [[0.0, 1.0]]}, names)


def test_costs_of_the_published_net() -> None:
    """At 800 x 1200 with 1,000 proposals; the RPN and the predictors come on top (268.2 G in all)."""
    card, space = load_card("hit-detector"), HitSpace()
    macs, parameters = space.macs().by_part(card.genotype), space.parameters().by_part(card.genotype)
    assert parameters == {"backbone": 13_881_848, "neck": 2_715_952, "head": 3_301_376 + 6_423_040}
    assert {part: round(value / 1e9, 1) for part, value in macs.items()} == {
        "backbone": 34.6,
        "neck": 19.1,
        "head": 166.9,
    }
    assert space.macs()(card.genotype) == sum(macs.values())


@pytest.mark.parametrize("make", [macs_table, parameters_table], ids=["macs", "parameters"])
def test_the_reachable_range_is_exact(make: Any) -> None:
    names = ("ir_k3_d1_e3", "sep_k5_d1", "conv_k3_d2")
    whole = make(TINY, {"backbone": names[:2], "neck": names})
    costs = [
        whole({"backbone": list(b), "neck": list(n)})
        for b in product(names[:2], repeat=4)
        for n in product(names, repeat=2)
    ]
    assert whole.reachable() == (min(costs), max(costs))
    assert len(set(costs)) > 20


def test_a_measured_cost_is_a_table_too() -> None:
    seconds = table(
        TINY, {"head": ("conv_k3_d1", "sep_k3_d1")}, lambda place, name: place.out * len(name) / 10, {"head": 0.5}
    )
    assert seconds({"head": ["conv_k3_d1"]}) == 0.5 + 8.0 and seconds.parts["head"].reachable() == (7.7, 8.5)


GOOD = HitSpace().random(Random(1))


def changed(**settings: Any) -> Card:
    return Card("hit", "x", GOOD.genotype, {**GOOD.settings, **settings})


CALLS: dict[str, tuple[Any, str]] = {
    "list": (lambda: check_genotype(["x"]), "genotype must be an object of parts, got"),
    "part": (lambda: check_genotype({"tail": []}), "genotype parts must be among backbone, .*, got 'tail'"),
    "both": (
        lambda: check_genotype({"head": ["conv_k3_d1"], "towers": ["conv_k3_d1"]}),
        "genotype must have head or towers, got both",
    ),
    "names": (lambda: check_genotype({"head": "conv_k3_d1"}), "genotype.head must be a list of operations, got 'conv"),
    "name": (lambda: check_genotype({"head": ["conv_k9"]}), "genotype.head: operation must be .*, got 'conv_k9' at 0"),
    "count": (
        lambda: check_genotype({"head": ["conv_k3_d1"]}, Sizes()),
        "genotype.head must have 4 operations, one for each place, got 1",
    ),
    "layout": (lambda: HitSpace("small"), "sizes must be one of released, paper, tiny, or Sizes, got 'small'"),
    "candidates": (lambda: HitSpace(candidates="best"), "candidates must be screened, full, or lists .*, got 'best'"),
    "missing": (lambda: HitSpace(candidates={"neck": ["conv_k3_d1"]}), "candidates must have backbone, got neck"),
    "unknown": (
        lambda: HitSpace(candidates=["conv_k1"]),
        "candidates of backbone: operation must be .*, got 'conv_k1' at 0",
    ),
    "twice": (lambda: HitSpace(candidates=["conv_k3_d1"] * 2), "candidates of backbone must be different, got conv"),
    "parts": (lambda: HitSpace(parts=("head", "towers")), "parts must be different ones, and not both head and towers"),
    "no-part": (lambda: HitSpace(parts=("tail",)), "part must be one of backbone, neck, head, towers, got 'tail'"),
    "stem": (lambda: Sizes(stem=0), "stem must be a positive integer, got 0"),
    "stage": (
        lambda: Sizes(stages=((8, 1, 3),)),
        "stages must be .channels, blocks, stride 1 or 2., got .* for stage 1",
    ),
    "strides": (
        lambda: Sizes(stages=((8, 1, 2), (8, 1, 1))),
        r"stages must have 4 of stride 2, .* got strides \[2, 1\]",
    ),
    "blocks": (lambda: Sizes(stages=((8, 0, 2),)), "blocks of stage 1 must be a positive integer, got 0"),
    "tail": (lambda: Sizes(tail=(8,)), r"tail must be empty or two numbers of channels, got \(8,\)"),
    "inputs": (lambda: Sizes(inputs=("c3",)), "inputs must be the last of c2, c3, c4, c5, got .'c3',."),
    "extra": (lambda: Sizes(extra="none"), "extra must be one of pool, convs, got 'none'"),
    "method": (lambda: HitSpace().check(load_card("fad-paper")), "fad-paper: method must be 'hit', got 'fad'"),
    "settings": (lambda: card_sizes(Card("hit", "x", GOOD.genotype)), "x: settings must have stem, got nothing"),
    "setting": (lambda: card_sizes(changed(stages=3)), "x: settings.stages must be a list, got 3"),
    "numbers": (
        lambda: card_sizes(changed(stages=[1])),
        r"x: settings.stages must be lists of three integers, got \[1\]",
    ),
    "other": (lambda: HitSpace().check(changed(hidden=7)), "x: settings must be .*'hidden': 512"),
    "fewer": (
        lambda: HitSpace(parts=("neck",)).check(GOOD),
        "hit-random: genotype parts must be neck, got backbone, neck, head",
    ),
    "outside": (
        lambda: HitSpace(candidates=["conv_k5_d3"]).check(GOOD),
        "hit-random: genotype.backbone must be among conv_k5_d3, got",
    ),
    "picture": (lambda: HitSpace().macs((0, 5)), r"size and proposals must be positive, got \(0, 5\)"),
    "table": (
        lambda: HitSpace(parts=("neck",)).macs()(GOOD.genotype),
        "genotype parts must be among neck, got 'backbone'",
    ),
    "row": (
        lambda: HitSpace().macs().parts["head"](["sep_k3_d1"] * 4),
        "names must be among ir_k3_d1_e3, .*, got 'sep_k3_d1' at 0",
    ),
    "rows": (lambda: HitSpace().macs().parts["head"]([]), "names must be 4 operations, one for each place, got 0"),
}


@pytest.mark.parametrize(("call", "words"), CALLS.values(), ids=CALLS)
def test_bad_genotypes_and_arguments(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_a_wrong_type_of_sizes() -> None:
    with pytest.raises(TypeError, match="sizes must be one of released, paper, tiny, or Sizes, got int"):
        HitSpace(20)  # type: ignore[arg-type]  # wrong on purpose
