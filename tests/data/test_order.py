"""Order as a function: permutations, repeats, slicing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.order import BatchPlan, EpochOrder, steps_per_epoch
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
