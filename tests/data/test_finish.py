"""The device side: normalising, erasing, mixing and targets, against timm's arithmetic."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.mixup import Mixup

from data.batch import Batch
from data.buffers import Buffers
from data.config import AugmentConfig
from data.finish import BatchFinisher, Normalize, ToDevice, draw_mixing, mix_with_reversed

NONE = AugmentConfig.none()
NUM_CLASSES = 7


def make_batch(num: int, size: int = 24, erase: tuple[int, int, int, int] = (0, 0, 0, 0)) -> Batch:
    pixels = torch.randint(256, (num, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(num))
    return Batch(
        images=pixels.permute(0, 3, 1, 2),
        labels=torch.arange(num) % NUM_CLASSES,
        indices=torch.arange(num),
        erase=torch.tensor([erase] * num),
        keys=torch.arange(num) + 1000,
    )


def normalizer(device: str = "cpu", channels_last: bool = False) -> Normalize:
    return Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, torch.device(device), channels_last)


def finisher(config: AugmentConfig, rank: int = 0) -> BatchFinisher:
    return BatchFinisher(config, NUM_CLASSES, normalizer(), seed=3, rank=rank)


class TimmDraws:
    """numpy's legacy generator under the names of the new one: feeds `draw_mixing` with timm's draws."""

    def __init__(self, seed: int) -> None:
        state = np.random.RandomState(seed)
        self.random, self.beta, self.integers = state.random_sample, state.beta, state.randint


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cutmix": 0.0},
        {"mixup": 0.0},
        {"mix_prob": 0.5, "mix_switch_prob": 0.2, "label_smoothing": 0.0},
    ],
)
def test_mixing_equals_timm(options: dict[str, Any]) -> None:
    config = AugmentConfig(**options)
    timm = Mixup(
        config.mixup,
        config.cutmix,
        prob=config.mix_prob,
        switch_prob=config.mix_switch_prob,
        label_smoothing=config.label_smoothing,
        num_classes=NUM_CLASSES,
    )
    batch = make_batch(6)
    saved = np.random.get_state()
    for seed in range(40):
        images = normalizer()(batch.images)
        np.random.seed(seed)
        expected_images, expected_targets = timm(images.clone(), batch.labels)
        lam, box = draw_mixing(config, (24, 24), TimmDraws(seed))  # type: ignore[arg-type]
        mix_with_reversed(images, lam, box)
        torch.testing.assert_close(images, expected_images, rtol=0, atol=0)
        weights = BatchFinisher(replace(config, mixup=0.0, cutmix=0.0), NUM_CLASSES, normalizer(), seed=0)
        unmixed = weights.finish(batch, step=0)[1]
        torch.testing.assert_close(unmixed * lam + unmixed.flip(0) * (1 - lam), expected_targets)
    np.random.set_state(saved)


def test_all_off_is_normalised_and_one_hot() -> None:
    batch = make_batch(4)
    images, targets = finisher(NONE).finish(batch, step=0)
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1)
    torch.testing.assert_close(images, (batch.images / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    assert torch.equal(targets, torch.nn.functional.one_hot(batch.labels, NUM_CLASSES).float())
    assert images.is_contiguous()
    torch.testing.assert_close(normalizer().invert(images), batch.images.contiguous())


def test_label_smoothing_without_mixing() -> None:
    _, targets = finisher(replace(NONE, label_smoothing=0.1)).finish(make_batch(3), step=0)
    assert targets[1, 1].item() == pytest.approx(0.9 + 0.1 / NUM_CLASSES)
    assert targets[1, 0].item() == pytest.approx(0.1 / NUM_CLASSES)


def test_targets_carry_the_share_of_pixels() -> None:
    """In a batch of two uniform images the mixed pixels themselves tell the weights that the targets must have."""
    batch = make_batch(2)._replace(
        images=torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 24, 24)
    )
    finish = finisher(replace(AugmentConfig(), erase_prob=0.0, label_smoothing=0.0))
    low, high = normalizer()(batch.images)[:, 0, 0, 0]
    for step in range(20):
        images, targets = finish.finish(batch, step)
        share = (images[1, 0].mean() - low) / (high - low)
        assert targets[1].tolist()[:2] == pytest.approx([1 - share.item(), share.item()], abs=1e-4)


def test_mixing_is_a_function_of_seed_step_micro_rank() -> None:
    batch = make_batch(4)
    config = replace(AugmentConfig(), erase_prob=0.0)
    first = finisher(config)
    reference = first.finish(batch, step=5, micro=1)[1]
    assert torch.equal(finisher(config).finish(batch, step=5, micro=1)[1], reference)
    first.finish(batch, step=6)
    assert torch.equal(first.finish(batch, step=5, micro=1)[1], reference)
    others = [
        first.finish(batch, step=6, micro=1),
        first.finish(batch, step=5, micro=0),
        finisher(config, rank=1).finish(batch, step=5, micro=1),
        BatchFinisher(config, NUM_CLASSES, normalizer(), seed=4).finish(batch, step=5, micro=1),
    ]
    assert all(not torch.equal(targets, reference) for _, targets in others)


def test_switch_and_alpha_statistics() -> None:
    draws = [draw_mixing(AugmentConfig(), (224, 224), np.random.default_rng(seed)) for seed in range(3000)]
    assert np.mean([box is not None for _, box in draws]) == pytest.approx(0.5, abs=0.03)
    assert np.var([lam for lam, box in draws if box is None]) == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.01)
    off = [
        draw_mixing(AugmentConfig(mix_prob=0.3), (224, 224), np.random.default_rng(seed))[0] == 1
        for seed in range(3000)
    ]
    assert np.mean(off) == pytest.approx(0.7, abs=0.03)


def test_pixel_erasing_is_unit_noise_inside_the_box_only() -> None:
    batch = make_batch(8, size=64, erase=(10, 20, 30, 40))
    plain = normalizer()(batch.images)
    erased = finisher(NONE).finish(batch, step=0)[0]
    inside = torch.zeros(64, 64, dtype=torch.bool)
    inside[10:40, 20:60] = True
    assert torch.equal(erased[:, :, ~inside], plain[:, :, ~inside])
    noise = erased[:, :, inside]
    assert noise.mean().item() == pytest.approx(0, abs=0.03)
    assert noise.std().item() == pytest.approx(1, abs=0.03)
    assert not torch.equal(noise[0], noise[1])


def test_erasing_depends_on_the_sample_alone() -> None:
    batch = make_batch(6, erase=(2, 3, 10, 9))
    whole = finisher(NONE).finish(batch, step=0)[0]
    part = finisher(NONE, rank=1).finish(Batch(*(field[2:5] for field in batch)), step=9)[0]
    assert torch.equal(whole[2:5], part)


def test_erase_modes() -> None:
    batch = make_batch(3, erase=(0, 0, 5, 5))
    constant = finisher(replace(NONE, erase_mode="const")).finish(batch, step=0)[0][:, :, :5, :5]
    assert not constant.any()
    colours = finisher(replace(NONE, erase_mode="rand")).finish(batch, step=0)[0][:, :, :5, :5]
    assert torch.equal(colours, colours[:, :, :1, :1].expand_as(colours))
    assert len(colours[:, :, 0, 0].unique()) == 9


@pytest.mark.parametrize("num", [1, 3, 5])
def test_odd_batches(num: int) -> None:
    batch = make_batch(num)
    finish = finisher(replace(AugmentConfig(), erase_prob=0.0))
    plain = normalizer()(batch.images)
    for step in range(10):
        images, targets = finish.finish(batch, step)
        torch.testing.assert_close(images[num // 2], plain[num // 2])
        torch.testing.assert_close(targets.sum(1), torch.ones(num))


def test_channels_last_changes_memory_not_values() -> None:
    batch = make_batch(4, erase=(1, 2, 8, 8))
    last = BatchFinisher(AugmentConfig(), NUM_CLASSES, normalizer(channels_last=True), seed=3).finish(batch, step=1)[0]
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, finisher(AugmentConfig()).finish(batch, step=1)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_never_waits_for_the_gpu() -> None:
    batch = make_batch(8, erase=(1, 2, 8, 8))
    finish = BatchFinisher(AugmentConfig(), NUM_CLASSES, normalizer("cuda"), seed=3)
    pinned = batch._replace(images=batch.images.pin_memory(), labels=batch.labels.pin_memory())
    finish.finish(pinned, step=0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        images, targets = finish.finish(pinned, step=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected_images, expected_targets = finisher(AugmentConfig(erase_mode="const")).finish(batch, step=1)
    torch.testing.assert_close(targets.cpu(), expected_targets)
    outside = expected_images[:, :, 12:] != 0  # below the box
    torch.testing.assert_close(images.cpu()[:, :, 12:][outside], expected_images[:, :, 12:][outside])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_reach_the_gpu_whole_while_their_memory_is_used_again() -> None:
    """The copies run behind work that keeps the GPU busy; a buffer must not be filled anew before its copy is made."""
    to_device, buffers, work = ToDevice(torch.device("cuda")), Buffers(pin=True), torch.randn(4096, 4096, device="cuda")
    arrived = []
    for number in range(20):
        pixels = buffers.take((64, 224, 224, 3))
        pixels[...] = number
        batch = make_batch(64, size=1)._replace(images=torch.from_numpy(pixels).permute(0, 3, 1, 2))
        del pixels
        for _ in range(5):
            work = work @ work / 64
        arrived.append(to_device(batch).images)
        del batch
    for number, images in enumerate(arrived):
        assert (images == number).all()
