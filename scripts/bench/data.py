"""`benchmark.py data`: images per second from files to a normalised float batch, against timm's loader and others'.

Every pipeline does the published recipe on the same files: random resized crop 224 (random filter), flip, RandAugment
rand-m9-mstd0.5-inc1, normalising, random erasing of a quarter. Speeds of one core are images per second of CPU time.
"""

import importlib.util
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_loader
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import datasets
from torchvision.transforms import v2

from data import decoders, native, ops
from data.augment import TrainTransform
from data.config import AugmentConfig, DataConfig
from data.finish import BatchFinisher, Normalize
from data.loader import BatchIterator, Request, TrainBatches, train_loader
from data.order import BatchPlan, EpochOrder
from data.sources import Source, open_source
from scripts.bench.timing import interleaved

BATCH = 64
SIZE = (224, 224)
RECIPE = AugmentConfig(mixup=0.0, cutmix=0.0)
Work = Callable[[], int]


def speeds(root: Path, packs: dict[str, Path], rounds: int, batches: int) -> dict[str, float]:
    """Images per second of one core, by pipeline; timm's first."""
    candidates = {"timm create_loader": _work(_timm(root, 0), batches)}
    for name, path in {"plain files": root, **packs}.items():
        if native.available():
            candidates[f"native, {name}"] = _work(_ours(path, "native", 0), batches)
    candidates["torch, plain files"] = _work(_ours(root, "torch", 0), batches)
    candidates["torchvision references"] = _work(_torchvision(root), batches)
    if importlib.util.find_spec("nvidia.dali") is not None:
        candidates["DALI on the CPU"] = _work(_dali(root), batches)
    return interleaved(candidates, rounds)


def scaling(root: Path, rounds: int, batches: int, workers: tuple[int, ...] = (1, 2)) -> dict[str, float]:
    """Images per second of the wall's clock up to uint8 batches, by number of threads or processes."""
    candidates: dict[str, Work] = {}
    for num in workers:
        if native.available():
            candidates[f"native, {num} threads"] = _work(_loaded(root, "native", num), batches)
        candidates[f"torch, {num} processes"] = _work(_loaded(root, "torch", num), batches)
    return interleaved(candidates, rounds, time.perf_counter)


def _work(batches: Iterator[torch.Tensor], num: int) -> Work:
    return lambda: sum(len(next(batches)) for _ in range(num))


def _loader(root: Path, decoder: str, workers: int) -> BatchIterator:
    source = _source(root)
    return train_loader(
        source,
        TrainTransform(RECIPE, SIZE),
        EpochOrder(len(source), 0),
        BatchPlan(BATCH),
        decoder=decoders.choose(decoder),  # type: ignore[arg-type]
        start_step=0,
        total_steps=10**6,
        workers=workers,
    )


def _loaded(root: Path, decoder: str, workers: int) -> Iterator[torch.Tensor]:
    return (batch.images for batch in _loader(root, decoder, workers))


def _ours(root: Path, decoder: str, workers: int) -> Iterator[torch.Tensor]:
    normalize = Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, torch.device("cpu"))
    finisher = BatchFinisher(RECIPE, 1000, normalize, seed=0)
    return (finisher.finish(batch, step)[0] for step, batch in enumerate(_loader(root, decoder, workers)))


def _source(root: Path) -> Source:
    return open_source(DataConfig(kind="folder", root=str(root)), "train")


def _timm(root: Path, workers: int) -> Iterator[torch.Tensor]:
    """Without its prefetcher, which needs a GPU."""
    loader = create_loader(
        ImageDataset(str(root / "train")),
        input_size=(3, *SIZE),
        batch_size=BATCH,
        is_training=True,
        use_prefetcher=False,
        re_prob=0.25,
        re_mode="pixel",
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="random",
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return _endless(loader)


def _torchvision(root: Path) -> Iterator[torch.Tensor]:
    """As its references train, on PIL images; its RandAugment does about twice as many operations."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
            v2.RandomErasing(0.25),
        ]
    )
    dataset = datasets.ImageFolder(str(root / "train"), transform)
    return _endless(torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, drop_last=True))


def _dali(root: Path) -> Iterator[torch.Tensor]:
    """On the CPU, with its own RandAugment and without erasing, which it lacks."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.auto_aug import rand_augment

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, enable_conditionals=True)
    def pipeline():  # type: ignore[no-untyped-def]
        files, labels = fn.readers.file(file_root=str(root / "train"), random_shuffle=True)
        images = fn.decoders.image_random_crop(files, device="cpu", random_area=[0.08, 1.0])
        images = fn.resize(images, size=SIZE, antialias=True)
        images = rand_augment.rand_augment(images, n=1, m=9)
        mean, std = ([255 * value for value in values] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        flip = fn.random.coin_flip()
        return fn.crop_mirror_normalize(images, mean=mean, std=std, mirror=flip, dtype=types.FLOAT), labels

    made = pipeline()
    made.build()

    def batches() -> Iterator[torch.Tensor]:
        while True:
            yield torch.from_numpy(made.run()[0].as_array())

    return batches()


def _endless(loader: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[torch.Tensor]:
    while True:
        for images, _ in loader:
            yield images


def stages(root: Path, rounds: int) -> dict[str, float]:
    """Microseconds per image of each stage of the native path, and of the same with Pillow and torch."""
    source = _source(root)
    count = min(len(source), 192)
    indices, keys = np.arange(count), np.arange(count) * 7919
    paths = [source.path(index) for index in range(count)]  # type: ignore[attr-defined]
    files = [source.read(index) for index in range(count)]  # type: ignore[attr-defined]
    heights, widths, _ = native.sizes(files)
    transform, arena = TrainTransform(RECIPE, SIZE), native.Arena()
    augmented, _ = transform.plan(keys, heights, widths)
    plain = augmented.copy()
    plain["num_ops"] = 0
    tiny = plain.copy()  # a single pixel of output: decoding alone
    tiny["resized_height"] = tiny["resized_width"] = 1
    out, dot = np.empty((count, *SIZE, 3), np.uint8), np.empty((count, 1, 1, 3), np.uint8)
    images = torch.from_numpy(out).permute(0, 3, 1, 2)
    normalize = Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, torch.device("cpu"))
    torch_batches = TrainBatches(source, transform, 0, decoders.choose("torch"))
    work: dict[str, Callable[[], object]] = {
        "read files": lambda: arena.read(paths),
        "sizes from headers": lambda: native.sizes(files),
        "draw the samples": lambda: transform.plan(keys, heights, widths),
        "decode the region": lambda: native.load(files, tiny, dot),
        "decode, resize, flip": lambda: native.load(files, plain, out),
        "decode, resize, flip, RandAugment": lambda: native.load(files, augmented, out),
        "normalise to float": lambda: normalize(images),
        "Pillow: full decode": lambda: [source.load(index) for index in range(count)],
        "torch decoder: all up to uint8": lambda: torch_batches.fill(Request(0, indices, indices * 0), out),
    }

    def counted(name: str) -> Work:
        return lambda: (work[name](), count)[1]

    return {name: 1e6 / speed for name, speed in interleaved({name: counted(name) for name in work}, rounds).items()}


def quality(root: Path) -> Iterator[tuple[str, float, float]]:
    """What, and its lowest and median PSNR in dB between the native path and Pillow's: crops alone, then each operation."""
    source = _source(root)
    count = min(len(source), 192)
    files = [source.read(index) for index in range(count)]  # type: ignore[attr-defined]
    images = [source.load(index) for index in range(count)]
    heights, widths, _ = native.sizes(files)
    samples, _ = TrainTransform(RECIPE, SIZE).plan(np.arange(count) * 7919, heights, widths)
    samples["num_ops"] = 0
    out = np.empty((count, *SIZE, 3), np.uint8)
    native.load(files, samples, out)
    yield "crop, resize, flip", *_psnr(out, [_pillow(*pair) for pair in zip(images, samples, strict=True)])
    drawn = ops.RandAugment("rand-m9-n1-mstd0.5-inc1-p1", SIZE).draw(
        np.random.default_rng(0).random((4096, ops.DRAWS_PER_OP))
    )
    for kind in sorted(set(drawn["kind"][:, 0].tolist())):
        chosen = drawn[drawn["kind"][:, 0] == kind][:count, 0]
        pixels = [pixels.copy() for pixels in out[: len(chosen)]]
        expected = []
        for image, op in zip(pixels, chosen, strict=True):
            expected.append(np.asarray(ops.apply_ops(Image.fromarray(image), op[None], (124, 116, 104))))
            native.apply_ops(image, op[None], (124, 116, 104))
        yield ops.Kind(kind).name.lower().replace("_", " "), *_psnr(pixels, expected)


def _pillow(image: Image.Image, sample: np.void) -> np.ndarray:
    left, top = int(sample["left"]), int(sample["top"])
    box = image.crop((left, top, left + int(sample["width"]), top + int(sample["height"])))
    resized = np.asarray(box.resize(SIZE[::-1], Image.Resampling(int(sample["filter"]))))
    return resized[:, ::-1] if sample["flip"] else resized


def _psnr(images: Iterable[np.ndarray], expected: Iterable[np.ndarray]) -> tuple[float, float]:
    """Lowest and median; infinite where images are equal."""
    errors = [np.square(one.astype(float) - other).mean() for one, other in zip(images, expected, strict=True)]
    values = [10 * math.log10(255**2 / error) if error else math.inf for error in errors]
    return round(min(values), 1), round(float(np.median(values)), 1)
