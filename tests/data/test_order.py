"""Order as a function: permutations, repeats, slicing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.order import WINDOW, BatchPlan, EpochOrder, steps_per_epoch
from data.randomness import sample_key


def test_each_epoch_is_a_permutation_of_its_own() -> None:
    order = EpochOrder(100, seed=7)
    first, second = order.indices(0), order.indices(1)
    assert sorted(first) == sorted(second) == list(range(100))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, EpochOrder(100, seed=7).indices(0))
    assert not np.array_equal(first, EpochOrder(100, seed=8).indices(0))


def test_order_and_keys_never_change() -> None:
    """Runs resumed on another machine or a newer numpy must see the same samples."""
    assert EpochOrder(10, seed=42).indices(3).tolist() == [4, 7, 1, 3, 6, 8, 9, 0, 2, 5]
    assert sample_key(42, 3, 1_281_166, 1) == 6007378774287624491


def test_repeats_stand_side_by_side_and_differ_in_copy_number() -> None:
    order = EpochOrder(10, seed=0, repeats=3)
    indices, copies = order.indices(5), order.copies(np.arange(10))
    assert len(indices) == 10
    assert indices[:9:3].tolist() == indices[1:9:3].tolist() == indices[2:9:3].tolist()
    assert len(set(indices.tolist())) == 4
    assert copies.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


@given(num_images=st.integers(1, 5 * WINDOW), block=st.integers(1, 3), seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_blocks_are_read_in_pieces_and_mixed_within_a_window(
    num_images: int, block: int, seed: int, epoch: int
) -> None:
    order = EpochOrder(num_images, seed, block=block)
    indices, blocks = order.indices(epoch), order.blocks(epoch)
    np.testing.assert_array_equal(np.sort(indices), np.arange(num_images))
    np.testing.assert_array_equal(indices, EpochOrder(num_images, seed, block=block).indices(epoch))
    start = 0
    for first in range(0, len(blocks), WINDOW):
        window = blocks[first : first + WINDOW]
        size = int(np.minimum(block, num_images - window * block).sum())
        assert set((indices[start : start + size] // block).tolist()) == set(window.tolist())
        start += size
    assert start == num_images


def test_blocks_never_change() -> None:
    assert EpochOrder(10, seed=42, block=3).indices(3).tolist() == [0, 9, 1, 4, 3, 6, 8, 5, 2, 7]
    assert EpochOrder(10, seed=42, block=3).blocks(3).tolist() == [3, 0, 1, 2]


def test_a_window_mixes_the_classes_of_a_sorted_set() -> None:
    order = EpochOrder(1_281_167, seed=0, block=16)
    first, second = (order.indices(epoch)[:2048] // 1282 for epoch in (0, 1))
    assert min(len(set(first.tolist())), len(set(second.tolist()))) > 700  # of a full permutation: 870
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("num_images", "block", "repeats"), [(40_000, 4, 1), (40_001, 3, 1), (40_001, 2, 3), (50, 4, 1)]
)
def test_every_block_is_announced_once_in_its_turn_and_before_its_window(
    num_images: int, block: int, repeats: int
) -> None:
    order = EpochOrder(num_images, seed=1, repeats=repeats, block=block)
    num_windows = -(-num_images // (repeats * WINDOW * block))
    turns = [order.blocks(epoch)[: num_windows * WINDOW].tolist() for epoch in range(4)]
    expected = [block for turn in turns for block in turn]
    announced = turns[0][:WINDOW]  # the first window has none before it
    for epoch in range(3):
        indices = order.indices(epoch)
        for start in range(0, num_images, 512):
            stop = min(start + 512, num_images)
            used = set((indices[start:stop] // block).tolist())
            assert used <= set(announced[epoch * len(turns[0]) :])
            half = (start + stop) // 2
            announced += [*order.coming(epoch, start, half).tolist(), *order.coming(epoch, half, stop).tolist()]
    assert announced == expected[: len(announced)]
    assert len(announced) >= 3 * len(turns[0])


@given(world=st.integers(1, 5), accumulation=st.integers(1, 4), micro_batch=st.integers(1, 6), step=st.integers(0, 50))
def test_ranks_and_accumulation_partition_the_global_batch(
    world: int, accumulation: int, micro_batch: int, step: int
) -> None:
    global_batch = world * accumulation * micro_batch
    pieces = [
        BatchPlan(global_batch, world, rank, accumulation).positions(step, micro)
        for micro in range(accumulation)
        for rank in range(world)
    ]
    assert np.concatenate(pieces).tolist() == list(range(step * global_batch, (step + 1) * global_batch))


def test_uneven_batch_names_what_fits() -> None:
    with pytest.raises(ValueError, match=r"batch_size=100 .* 3 processes x 2 accumulation steps: use 96 or 102"):
        BatchPlan(100, world=3, accumulation=2)
    with pytest.raises(ValueError, match=r"batch_size=2 .*: use 4$"):
        BatchPlan(2, world=4)


def test_steps_per_epoch() -> None:
    assert steps_per_epoch(1_281_167, 2048) == 625
    assert steps_per_epoch(5, 5) == 1
    with pytest.raises(ValueError, match=r"batch_size=2048 is larger than the training set: use 1437"):
        steps_per_epoch(1437, 2048)
