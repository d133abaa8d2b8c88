"""Loaders: the same samples for every number of workers, ranks and accumulation steps; exact seeking; bad images."""

import os
import random
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data import decoders
from data.augment import EvalTransform, TrainTransform
from data.batch import NONE, Batch
from data.config import AugmentConfig, DataConfig
from data.decode import BadImageError, ImageReadError
from data.decoders import Decoder
from data.loader import EVAL_SLICE, Request, TrainBatches, eval_loader, eval_requests, train_loader
from data.order import BatchPlan, EpochOrder
from data.sources import Source, open_source
from tests.data.reference import jpeg, photo

TRANSFORM = TrainTransform(AugmentConfig(), (32, 32))
SEED = 11
DECODER = decoders.choose("auto")


@pytest.fixture(scope="module")
def synthetic() -> Source:
    """20 images: two global batches of 8 to an epoch."""
    return open_source(DataConfig(kind="synthetic", num_images=20, num_classes=5), "train")


def global_batches(
    source: Source,
    *,
    world: int = 1,
    accumulation: int = 1,
    workers: int = 0,
    start: int = 0,
    total: int = 5,
    repeats: int = 1,
    decoder: Decoder = DECODER,
) -> list[Batch]:
    """What all ranks together load, put together step by step in the order of positions."""
    order = EpochOrder(len(source), SEED, repeats)
    plans = [BatchPlan(8, world, rank, accumulation) for rank in range(world)]
    per_rank = [
        list(
            train_loader(
                source, TRANSFORM, order, plan, decoder=decoder, start_step=start, total_steps=total, workers=workers
            )
        )
        for plan in plans
    ]
    micro_batches = [batch for same_turn in zip(*per_rank, strict=True) for batch in same_turn]
    pieces = world * accumulation
    return [
        Batch(*(torch.cat(fields) for fields in zip(*micro_batches[first : first + pieces], strict=True)))
        for first in range(0, len(micro_batches), pieces)
    ]


def assert_same(ours: list[Batch], expected: list[Batch]) -> None:
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected, strict=True):
        for name, field, expected_field in zip(Batch._fields, one, other, strict=True):
            assert torch.equal(field, expected_field), name


@pytest.fixture(scope="module")
def reference(synthetic: Source) -> list[Batch]:
    return global_batches(synthetic)


def test_batches_follow_the_order(synthetic: Source, reference: list[Batch]) -> None:
    order = EpochOrder(20, SEED)
    expected = [order.indices(step // 2)[step % 2 * 8 :][:8].tolist() for step in range(5)]
    assert [batch.indices.tolist() for batch in reference] == expected
    first = reference[0]
    assert first.images.shape == (8, 3, 32, 32)
    assert first.images.dtype == torch.uint8
    assert first.labels.tolist() == synthetic.labels[first.indices.numpy()].tolist()
    assert any(batch.erase.any() for batch in reference)


@pytest.mark.parametrize(
    ("world", "accumulation", "workers"), [(1, 1, 1), (1, 1, 2), (2, 1, 0), (4, 1, 1), (1, 4, 2), (2, 2, 2), (8, 1, 0)]
)
def test_same_samples_however_sliced(
    synthetic: Source, reference: list[Batch], world: int, accumulation: int, workers: int
) -> None:
    ours = global_batches(synthetic, world=world, accumulation=accumulation, workers=workers)
    assert_same(ours, reference)


@pytest.mark.parametrize(("workers", "world"), [(1, 1), (2, 2), (3, 1)])
def test_processes_give_the_same_samples_too(synthetic: Source, workers: int, world: int) -> None:
    decoder = decoders.choose("torch")
    assert_same(
        global_batches(synthetic, workers=workers, world=world, decoder=decoder),
        global_batches(synthetic, decoder=decoder),
    )


@pytest.mark.parametrize(("start", "workers"), [(1, 0), (2, 2), (3, 1), (5, 0)])
def test_seek_equals_the_tail(synthetic: Source, reference: list[Batch], start: int, workers: int) -> None:
    assert_same(global_batches(synthetic, start=start, workers=workers), reference[start:])


def test_epochs_augment_differently(synthetic: Source, reference: list[Batch]) -> None:
    pixels = {}
    for step, batch in enumerate(reference):
        pixels.update(
            {(step // 2, index): image for index, image in zip(batch.indices.tolist(), batch.images, strict=True)}
        )
    both = [index for epoch, index in pixels if epoch == 0 and (1, index) in pixels]
    assert both
    assert all(not torch.equal(pixels[0, index], pixels[1, index]) for index in both)


def test_repeated_augmentation_differs_by_copy(synthetic: Source) -> None:
    batch = global_batches(synthetic, repeats=2, total=1)[0]
    assert torch.equal(batch.indices[::2], batch.indices[1::2])
    assert all(not torch.equal(one, other) for one, other in zip(batch.images[::2], batch.images[1::2], strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_state_is_neither_read_nor_changed(synthetic: Source, workers: int) -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = global_batches(synthetic, workers=workers, total=2)
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())
    assert_same(global_batches(synthetic, workers=workers, total=2), first)


def test_too_few_images(synthetic: Source) -> None:
    with pytest.raises(ValueError, match=r"batch_size=21 is larger than the training set: use 20"):
        train_loader(
            synthetic,
            TRANSFORM,
            EpochOrder(20, SEED),
            BatchPlan(21),
            decoder=DECODER,
            start_step=0,
            total_steps=1,
            workers=0,
        )


@given(num_images=st.integers(1, 200), batch_size=st.integers(1, 150), world=st.integers(1, 4))
def test_evaluation_slices_each_image_once(num_images: int, batch_size: int, world: int) -> None:
    slices = []
    for rank in range(world):
        for batch in eval_requests(num_images, batch_size, rank, world):
            assert len(batch) <= max(batch_size, EVAL_SLICE)
            slices += [part.tolist() for part in torch.from_numpy(batch).split(EVAL_SLICE)]
    assert sorted(slices) == [
        list(range(first, min(first + EVAL_SLICE, num_images))) for first in range(0, num_images, EVAL_SLICE)
    ]


@pytest.mark.parametrize(
    ("world", "batch_size", "workers"), [(1, 1, 0), (1, 100, 2), (2, 64, 1), (3, 7, 0), (4, 32, 0)]
)
def test_evaluation_loads_each_image_once(
    digits: tuple[Source, Source], world: int, batch_size: int, workers: int
) -> None:
    source = digits[1]
    transform = EvalTransform((32, 32), 1.0)
    counts: Counter[int] = Counter()
    for rank in range(world):
        loader = eval_loader(
            source, transform, decoder=DECODER, batch_size=batch_size, rank=rank, world=world, workers=workers
        )
        for batch in loader:
            counts.update(batch.indices.tolist())
            assert batch.labels.tolist() == source.labels[batch.indices.numpy()].tolist()
            first = np.asarray(source.load(int(batch.indices[0])))
            assert np.array_equal(batch.images[0].permute(1, 2, 0).numpy(), first)
    assert counts == Counter(range(len(source)))


def test_a_rank_without_slices_has_nothing_to_do(synthetic: Source) -> None:
    transform = EvalTransform((32, 32), 1.0)
    assert list(eval_loader(synthetic, transform, decoder=DECODER, batch_size=32, rank=1, world=2, workers=0)) == []
    passes = [
        list(eval_loader(synthetic, transform, decoder=DECODER, batch_size=32, world=2, workers=workers))
        for workers in (1, 0)
    ]
    assert_same(*passes)


@pytest.fixture
def damaged(tmp_path: Path) -> Source:
    """20 training images of two classes, of which 5, 6 and 12 cannot be decoded."""
    for split in ("train", "val"):
        for number in range(20):
            path = tmp_path / split / f"class{number // 10}" / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((24, 24), 20 + number).save(path)
            if number in (5, 6, 12):
                path.write_bytes(path.read_bytes()[:200])
    return open_source(DataConfig(kind="folder", root=str(tmp_path)), "train")


BAD = {5, 6, 12}


@pytest.mark.parametrize(("workers", "world", "repeats"), [(0, 1, 1), (1, 1, 1), (2, 2, 1), (3, 1, 2)])
def test_bad_training_images_are_replaced_the_same_way_by_every_number_of_workers(
    damaged: Source, workers: int, world: int, repeats: int
) -> None:
    reference = global_batches(damaged, repeats=repeats, total=10)
    ours = global_batches(damaged, workers=workers, world=world, repeats=repeats, total=10)
    for one, other in zip(ours, reference, strict=True):
        assert sorted(one.bad.tolist()) == sorted(other.bad.tolist())
    assert_same([batch._replace(bad=NONE) for batch in ours], [batch._replace(bad=NONE) for batch in reference])
    order = EpochOrder(20, SEED, repeats)
    asked = [order.indices(step // 2)[step % 2 * 8 :][:8] for step in range(10)]
    for batch, wanted in zip(ours, asked, strict=True):
        replaced = np.isin(wanted, list(BAD))
        assert np.array_equal(batch.indices.numpy()[~replaced], wanted[~replaced])
        assert not set(batch.indices.tolist()) & BAD
        assert Counter(wanted[replaced].tolist()) <= Counter(batch.bad.tolist())
        assert set(batch.bad.tolist()) <= BAD
        assert batch.labels.tolist() == damaged.labels[batch.indices.numpy()].tolist()


def test_a_replacement_is_the_sample_that_it_would_be_by_itself(damaged: Source) -> None:
    batches = TrainBatches(damaged, TRANSFORM, SEED, DECODER)
    seen = set()
    for epoch in range(30):
        replaced = batches.load(Request(epoch, np.array([1, 5]), np.array([0, 1])))
        stand_in = int(replaced.indices[1])
        seen.add(stand_in)
        alone = batches.load(Request(epoch, np.array([stand_in]), np.array([1])))
        assert torch.equal(replaced.images[1:], alone.images)
        assert (replaced.keys[1], replaced.labels[1]) == (alone.keys[0], alone.labels[0])
        assert alone.bad.tolist() == []
        assert torch.equal(replaced.images[:1], batches.load(Request(epoch, np.array([1]), np.array([0]))).images)
    assert len(seen) > 5, "each epoch draws another one"


def test_a_set_without_a_good_image_ends_by_name(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        for number in range(3):
            (tmp_path / split / "cat" / f"bad{number}.png").write_bytes(b"no image")
    source = open_source(DataConfig(kind="folder", root=str(tmp_path)), "train")
    for workers in (0, 1):
        batches = train_loader(
            source,
            TRANSFORM,
            EpochOrder(3, 0),
            BatchPlan(2),
            decoder=DECODER,
            start_step=0,
            total_steps=1,
            workers=workers,
        )
        with pytest.raises(BadImageError, match=r"cannot decode .*train/cat/bad\d.png") as caught:
            next(batches)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_never_replaced(damaged: Source, tmp_path: Path, workers: int) -> None:
    (tmp_path / "train" / "class1" / "13.png").unlink()  # after it was listed
    with pytest.raises(ImageReadError, match=r"cannot read .*class1/13.png \(No such file or directory\)"):
        global_batches(damaged, workers=workers, total=10)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_validation_image_is_named_not_replaced(damaged: Source, workers: int) -> None:
    with pytest.raises(BadImageError, match=r"cannot decode .*class0/05.png"):
        list(eval_loader(damaged, EvalTransform((32, 32), 1.0), decoder=DECODER, batch_size=32, workers=workers))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """64 JPEGs of two classes."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(64):
        path = root / "train" / f"class{number % 2}" / f"{number:02d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(photo(60 + number, 120 - number, number), quality=90))
    return open_source(DataConfig(kind="folder", root=str(root)), "train")


@pytest.mark.parametrize("name", ["native", "torch"])
@pytest.mark.parametrize(("workers", "world", "accumulation"), [(1, 1, 1), (2, 1, 2), (4, 2, 1), (2, 4, 2)])
def test_jpegs_come_out_the_same_whoever_decodes_them(
    photos: Source, name: Literal["native", "torch"], workers: int, world: int, accumulation: int
) -> None:
    decoder = decoders.choose(name)
    ours = global_batches(photos, workers=workers, world=world, accumulation=accumulation, decoder=decoder, total=10)
    assert_same(ours, global_batches(photos, decoder=decoder, total=10))


def resident() -> float:
    """MiB of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_stays_flat_over_50_epochs(photos: Source, workers: int) -> None:
    batches = train_loader(
        photos,
        TRANSFORM,
        EpochOrder(64, SEED),
        BatchPlan(16),
        decoder=DECODER,
        start_step=0,
        total_steps=240,
        workers=workers,
    )  # 4 batches an epoch
    for _ in range(40):
        next(batches)
    after_10 = resident()
    assert sum(len(batch.images) for batch in batches) == 200 * 16
    assert resident() - after_10 < 4
