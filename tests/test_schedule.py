"""The learning rate against timm's scheduler, epoch by epoch, and what holds of it for every configuration."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.scheduler import CosineLRScheduler

from vip.schedule import ScheduleConfig, lr_at

PUBLISHED = ScheduleConfig("cosine", "epoch", warmup_epochs=20, warmup_lr=1e-6, min_lr=1e-5, cooldown_epochs=10)


def test_the_published_schedule_is_timm_s_over_all_310_epochs() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=300, lr_min=1e-5, warmup_t=20, warmup_lr_init=1e-6, warmup_prefix=False, cycle_limit=1
    )
    for epoch in range(310):
        scheduler.step(epoch)
        expected = optimizer.param_groups[0]["lr"]
        for step in (625 * epoch, 625 * epoch + 624):
            assert lr_at(PUBLISHED, 2e-3, step, 625, 300) == pytest.approx(expected, rel=1e-12), epoch


@pytest.mark.parametrize(
    ("epoch", "lr"),
    [(0, 1e-6), (10, (1e-6 + 2e-3) / 2), (20, 1.978257e-3), (150, (2e-3 + 1e-5) / 2), (299, 1.005456e-5), (300, 1e-5), (309, 1e-5)],
)  # fmt: skip
def test_published_values(epoch: int, lr: float) -> None:
    assert lr_at(PUBLISHED, 2e-3, 625 * epoch, 625, 300) == pytest.approx(lr, rel=1e-6)


configs = st.builds(
    ScheduleConfig,
    kind=st.sampled_from(["cosine", "constant"]),
    per=st.sampled_from(["epoch", "step"]),
    warmup_epochs=st.floats(0, 9),
    warmup_lr=st.floats(0, 1e-2),
    min_lr=st.floats(0, 1e-2),
    cooldown_epochs=st.integers(0, 5),
)
steps_per_epoch = st.integers(1, 50)


@settings(deadline=None, max_examples=100)
@given(configs, steps_per_epoch, st.floats(1e-2, 1), st.integers(0, 600))
def test_bounds_and_phases(config: ScheduleConfig, spe: int, peak: float, step: int) -> None:
    lr, epoch = lr_at(config, peak, step, spe, 10), step // spe
    assert min(config.warmup_lr, config.min_lr) * (1 - 1e-9) <= lr <= peak * (1 + 1e-9)
    if step >= 10 * spe:
        assert lr == (config.min_lr if config.kind == "cosine" else peak)
    if step == 0 and config.warmup_epochs > 0:
        assert lr == config.warmup_lr
    if config.kind == "constant" and epoch >= config.warmup_epochs:
        assert lr == peak


@settings(deadline=None, max_examples=50)
@given(configs, steps_per_epoch, st.floats(1e-2, 1))
def test_up_to_the_peak_and_down_again(config: ScheduleConfig, spe: int, peak: float) -> None:
    rates = [lr_at(config, peak, step, spe, 10) for step in range(12 * spe)]
    times = [step / spe if config.per == "step" else step // spe for step in range(12 * spe)]
    for one, other, t in zip(rates, rates[1:], times[1:], strict=False):
        if t < config.warmup_epochs:
            assert other >= one
        elif t - 1 >= config.warmup_epochs:
            assert other <= one
    if config.per == "epoch":
        assert all(len(set(rates[e * spe : (e + 1) * spe])) == 1 for e in range(12))


def test_per_step_meets_per_epoch_at_the_start_of_every_epoch() -> None:
    smooth = ScheduleConfig("cosine", "step", warmup_epochs=20, warmup_lr=1e-6, min_lr=1e-5, cooldown_epochs=10)
    for epoch in range(310):
        assert lr_at(smooth, 2e-3, 7 * epoch, 7, 300) == lr_at(PUBLISHED, 2e-3, 7 * epoch, 7, 300)
    assert lr_at(smooth, 2e-3, 7 * 100 + 3, 7, 300) < lr_at(PUBLISHED, 2e-3, 7 * 100 + 3, 7, 300)
