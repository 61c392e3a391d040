"""Batches: the same whatever the workers, the same when resumed, each image for one rank."""

from __future__ import annotations

import itertools
import os
from collections import Counter

import pytest
import torch

from nasdet.data import Compose, DataError, HorizontalFlip, Resize, make_eval_loader, make_loader, open_data
from nasdet.data.loader import epoch_order

TRANSFORM = Compose([Resize(range(24, 61)), HorizontalFlip(0.5)])


def ids(loader):
    return [[target["image_id"] for target in batch.targets] for batch in loader]


def assert_same(first, second):
    assert (first.sizes, first.scales) == (second.sizes, second.scales)
    assert torch.equal(first.images, second.images)
    for a, b in zip(first.targets, second.targets, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert type(value) is type(b[key])
            assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], key


@pytest.fixture
def data(digits_folder):
    return open_data(digits_folder, masks=True).train()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_what_it_would_have_seen(data, workers):
    whole = list(make_loader(data, 5, TRANSFORM, seed=3, steps=7))  # 35 places: almost three epochs of 12
    torch.manual_seed(99)  # what was drawn elsewhere must not matter
    resumed = list(make_loader(data, 5, TRANSFORM, seed=3, steps=7, start_step=4, workers=workers))
    assert (len(whole), len(resumed)) == (7, 3)
    for first, second in zip(whole[4:], resumed, strict=True):
        assert_same(first, second)


def test_workers_change_nothing(data):
    loaders = [make_loader(data, 3, TRANSFORM, seed=1, steps=5, workers=workers) for workers in (0, 1, 2)]
    for batches in zip(*loaders, strict=True):
        assert_same(batches[0], batches[1])
        assert_same(batches[0], batches[2])


def test_the_global_random_state_is_left_alone(data):
    state = torch.get_rng_state()
    list(make_loader(data, 2, TRANSFORM, steps=2, workers=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_every_epoch_holds_every_image_once_in_a_new_order(data):
    seen = list(itertools.chain(*ids(make_loader(data, 5, steps=12))))
    epochs = [seen[at : at + 12] for at in range(0, 60, 12)]
    assert all(sorted(epoch) == sorted(data.image_ids) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_seeds_differ_and_passes_repeat(data):
    loader = make_loader(data, 4, seed=0, steps=3)
    assert len(loader) == 3
    assert ids(loader) == ids(loader) == ids(make_loader(data, 4, seed=0, steps=3))
    assert ids(loader) != ids(make_loader(data, 4, seed=1, steps=3))
    assert ids(make_loader(data, 4, steps=3, shuffle=False)) == [data.image_ids[at : at + 4] for at in (0, 4, 8)]


def test_the_order_is_pinned():
    assert epoch_order(8, 0, 0) == [4, 5, 0, 7, 2, 3, 1, 6]
    assert epoch_order(8, 0, 1) != epoch_order(8, 0, 0) != epoch_order(8, 1, 0)


def test_an_image_is_augmented_anew_in_every_epoch(data):
    sizes = Counter(batch.sizes[0] for batch in make_loader(data.subset(data.image_ids[:1]), 1, TRANSFORM, steps=30))
    assert len(sizes) > 5


def test_ranks_share_one_order(data):
    together = ids(make_loader(data, 6, seed=2, steps=5))
    ranks = [ids(make_loader(data, 2, seed=2, steps=5, rank=rank, world_size=3)) for rank in range(3)]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == together
    assert all(len(set(step)) == 6 for step in together[::2])  # within an epoch no image for two ranks


def test_a_data_set_smaller_than_a_batch_repeats(data):
    few = data.subset(data.image_ids[:3])
    assert [len(set(step)) for step in ids(make_loader(few, 8, steps=2))] == [3, 3]


def test_no_step_left(data):
    loader = make_loader(data, 2, steps=5, start_step=5)
    assert len(loader) == 0 and list(loader) == []


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 4])
def test_evaluation_sees_every_image_once_in_order(data, workers, world_size):
    ranks = [
        list(itertools.chain(*ids(make_eval_loader(data, 2, workers=workers, rank=rank, world_size=world_size))))
        for rank in range(world_size)
    ]
    assert ranks == [data.image_ids[rank::world_size] for rank in range(world_size)]


def test_evaluation_with_more_ranks_than_images(data):
    few = data.subset(data.image_ids[:2])
    assert [ids(make_eval_loader(few, 2, rank=rank, world_size=3)) for rank in range(3)] == [
        [[few.image_ids[0]]],
        [[few.image_ids[1]]],
        [],
    ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("evaluation", [False, True], ids=["training", "evaluation"])
def test_a_bad_image_is_its_own_error_from_any_worker(make_coco, workers, evaluation):
    folder = make_coco()
    path = folder / "train" / "3.png"
    path.write_bytes(path.read_bytes()[:40])
    data = open_data(folder).train()
    loader = (
        make_eval_loader(data, 2, workers=workers) if evaluation else make_loader(data, 2, steps=3, workers=workers)
    )
    with pytest.raises(DataError) as caught:
        list(loader)
    assert str(caught.value).startswith(f"{path}: image 3 (3.png): truncated or unreadable image: ")
    assert "Traceback" not in str(caught.value)


def test_training_never_meets_a_skipped_image(make_coco):
    folder = make_coco()
    (folder / "train" / "3.png").write_bytes(b"")
    data = open_data(folder, skip_bad=True).train()
    seen = set(itertools.chain(*ids(make_loader(data, 2, steps=6))))
    assert seen == {1, 2, 4, 5, 6}


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files through /proc")
def test_many_targets_do_not_open_many_files(data):
    loader = make_loader(data, 12, steps=6, workers=1)
    before = len(os.listdir("/proc/self/fd"))
    kept = list(loader)
    assert len(kept) == 6
    # per batch one for the images, not five more per picture
    assert len(os.listdir("/proc/self/fd")) - before < 6 + 10


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0, "steps": 1}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 1, "steps": 1, "start_step": 2}, "steps must be at least start_step = 2, got 1"),
        ({"batch_size": 1, "steps": 1, "start_step": -1}, "start_step must be at least 0, got -1"),
        ({"batch_size": 1, "steps": 1, "workers": -1}, "workers must be at least 0, got -1"),
        ({"batch_size": 1, "steps": 1, "rank": 2, "world_size": 2}, "rank must be in 0..world_size - 1 = 1, got 2"),
    ],
)
def test_bad_settings(data, options, message):
    with pytest.raises(ValueError, match=message):
        make_loader(data, **options)
