"""The arithmetic of a run: the global batch is kept, or refused with the numbers that fit."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vip.plan import make_plan


def test_the_published_run_on_8_gpus() -> None:
    plan = make_plan(2048, None, 8, 1_281_167, 310, None)
    assert (plan.micro_batch, plan.accumulation, plan.steps_per_epoch, plan.total_steps) == (256, 1, 625, 310 * 625)
    assert plan.epoch_at(625) == 1.0
    assert plan.describe() == "2048 images a step = 8 processes x 1 pass x 256; 193750 steps, 625 an epoch"


@settings(deadline=None, max_examples=100)
@given(
    st.integers(1, 8),
    st.integers(1, 32),
    st.integers(1, 6),
    st.integers(0, 5000),
    st.integers(1, 4),
    st.none() | st.integers(1, 99),
)
def test_the_global_batch_is_the_contract(
    world: int, micro: int, passes: int, more_images: int, epochs: int, max_steps: int | None
) -> None:
    batch = world * micro * passes
    plan = make_plan(batch, micro, world, batch + more_images, epochs, max_steps)
    assert plan.world_size * plan.micro_batch * plan.accumulation == plan.batch_size == batch
    assert plan.steps_per_epoch == (batch + more_images) // batch
    assert plan.total_steps == min(plan.steps_per_epoch * epochs, max_steps or 10**9)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(2, 16))
def test_every_number_that_a_refusal_offers_fits(batch: int, world: int) -> None:
    if batch % world == 0:
        return
    with pytest.raises(ValueError, match=f"^batch_size={batch}: does not divide over {world} processes") as refused:
        make_plan(batch, None, world, 10_000, 1, None)
    batches, counts = re.findall(
        r"batch_size=([\d, ]+) would, or this batch on ([\d, ]+) processes", str(refused.value)
    )[0]
    for offered in batches.split(", "):
        assert make_plan(int(offered), None, world, 10_000, 1, None).world_size == world
    for offered in counts.split(", "):
        assert make_plan(batch, None, int(offered), 10_000, 1, None).batch_size == batch


def test_a_micro_batch_that_does_not_fit_is_told_the_ones_that_do() -> None:
    with pytest.raises(ValueError, match=r"micro_batch=5: 12 images a rank .* can be 1, 2, 3, 4, 6, 12$"):
        make_plan(24, 5, 2, 100, 1, None)
    with pytest.raises(ValueError, match=r"batch_size=64.* 50 "):
        make_plan(64, None, 1, 50, 1, None)
