"""The scaling model: what shrinks with the nodes, what does not, and by how much they wait."""

import dataclasses

import pytest

from vip.scaling import BUCKET_BYTES, OVERLAP, Work, ring_bytes, scale

# About vip_m7 on V100s: 55 M parameters in float32, 400 images/s a GPU.
WORK = Work(
    images_per_s=400.0,
    gradient_bytes=220_000_000,
    batch_size=2048,
    micro_batch=128,
    num_images=1_281_167,
    num_val_images=50_000,
    total_epochs=310,
    max_steps=None,
    eval_every=1,
    num_evaluated=1,
)


def test_one_node_waits_for_no_network_and_takes_images_by_speed() -> None:
    found = scale(WORK, 1, 8, network_gbit=100)
    assert (found.plan.accumulation, found.plan.micro_batch) == (2, 128)
    assert found.step == pytest.approx(2048 / 8 / 400)
    assert found.all_reduce == found.exposed == 0
    training = 310 * 625 * 2048 / (8 * 400)
    validation = 310 * 50_000 / (3 * 8 * 400)
    assert found.hours == pytest.approx((training + validation) / 3600)
    assert found.process_hours == pytest.approx(8 * found.hours)


def test_a_fast_network_leaves_the_last_bucket_alone_to_wait_for() -> None:
    found = scale(WORK, 4, 8, network_gbit=100)
    assert found.all_reduce == pytest.approx(2 * 31 / 32 * 220e6 / 12.5e9)
    assert found.exposed == pytest.approx(found.all_reduce * BUCKET_BYTES / 220e6)
    assert found.images_per_s > 0.95 * 4 * scale(WORK, 1, 8, 100).images_per_s


def test_a_slow_network_hides_only_what_a_pass_can() -> None:
    found = scale(WORK, 8, 8, network_gbit=1)
    a_pass = 32 / 400
    assert found.plan.micro_batch == 32
    assert found.exposed == pytest.approx(found.all_reduce - OVERLAP * a_pass)
    assert found.step == pytest.approx(a_pass + found.exposed)
    assert found.exposed > 0.9 * found.step, "such nodes mostly wait"


@pytest.mark.parametrize("gbit", [1, 10, 100, 400])
def test_more_nodes_are_never_slower_to_the_end_nor_cheaper_by_the_process(gbit: float) -> None:
    hours = [scale(WORK, nodes, 8, gbit) for nodes in (1, 2, 4, 8)]
    costs = [found.process_hours for found in hours]
    assert costs == sorted(costs)
    if gbit >= 10:
        assert [found.hours for found in hours] == sorted((found.hours for found in hours), reverse=True)


def test_a_micro_batch_that_no_longer_fits_the_share_becomes_the_largest_that_does() -> None:
    uneven = dataclasses.replace(WORK, batch_size=96, micro_batch=20)
    plan = scale(uneven, 2, 4, 100).plan
    assert (plan.micro_batch, plan.accumulation) == (12, 1)
    plan = scale(uneven, 1, 2, 100).plan
    assert (plan.micro_batch, plan.accumulation) == (16, 3)
    with pytest.raises(ValueError, match="batch_size=96: does not divide over 64 processes"):
        scale(uneven, 8, 8, 100)


def test_averages_are_validated_too_and_max_steps_ends_sooner() -> None:
    once = scale(WORK, 1, 8, 100)
    twice = scale(dataclasses.replace(WORK, num_evaluated=2), 1, 8, 100)
    validation = 310 * 50_000 / (3 * 8 * 400) / 3600
    assert twice.hours - once.hours == pytest.approx(validation)
    short = scale(dataclasses.replace(WORK, max_steps=625), 1, 8, 100)
    assert short.hours == pytest.approx(once.hours / 310)


def test_a_ring_sends_nearly_twice_the_gradients() -> None:
    assert ring_bytes(100, 1) == 0
    assert ring_bytes(100, 2) == 100
    assert ring_bytes(1000, 1000) == pytest.approx(1998)
