"""What happens to a batch on the device: normalise, fill the erased boxes, mix, and turn labels into soft targets.

Arithmetic as in timm (PrefetchLoader, RandomErasing, Mixup in batch mode), each draw a function of its coordinates: the
noise of a box of its sample's key, mixing of (seed, step, micro-batch, rank). All draws are made on the host, so nothing waits
for the device. B images, H, W pixels, K classes.
"""

import math
from collections import deque

import numpy as np
import torch
from timm.data.mixup import mixup_target

from data.batch import Batch
from data.buffers import Buffers
from data.config import AugmentConfig
from data.randomness import stream_key

Box = tuple[int, int, int, int]
NOISE_STARTS = 1 << 22


class ToDevice:
    """Batches on `device`. On a GPU they are copied on a stream of their own, while the step before still computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.in_flight: deque[tuple[torch.cuda.Event, Batch]] = deque()  # their memory must not be used again yet

    def __call__(self, batch: Batch) -> Batch:
        if self.stream is None:
            return batch
        while self.in_flight and self.in_flight[0][0].query():
            self.in_flight.popleft()
        with torch.cuda.stream(self.stream):
            copied = batch.to(self.device, non_blocking=True)
            self.in_flight.append((self.stream.record_event(), batch))
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        copied.images.record_stream(current)
        copied.labels.record_stream(current)
        return copied


class Normalize:
    """uint8 (B, 3, H, W) in channels_last memory -> float32 (pixel / 255 - mean) / std, on `device`.

    Args:
        mean, std: per channel, on the 0-to-1 scale.
        channels_last: memory order of the result.
    """

    def __init__(
        self,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        device: torch.device,
        channels_last: bool = False,
    ) -> None:
        self.mean = torch.tensor(mean, device=device).mul_(255).view(1, 3, 1, 1)
        self.std = torch.tensor(std, device=device).mul_(255).view(1, 3, 1, 1)
        self.channels_last = channels_last
        self.buffers = Buffers()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if images.device.type != "cpu":
            layout = torch.channels_last if self.channels_last else torch.contiguous_format
            return images.to(torch.float32, memory_format=layout).sub_(self.mean).div_(self.std)
        num, _, height, width = images.shape
        # Image by image all three passes stay in the cache, and the memory has been touched before: a quarter of the time.
        if self.channels_last:
            result = self._take(num, height, width, 3)
            mean, std = (value.view(3).repeat(height * width) for value in (self.mean, self.std))
            for row, image in zip(result, images.permute(0, 2, 3, 1), strict=True):
                row.copy_(image).view(-1).sub_(mean).div_(std)
            return result.permute(0, 3, 1, 2)
        result = self._take(num, 3, height, width)
        for row, image in zip(result, images, strict=True):
            row.copy_(image).sub_(self.mean[0]).div_(self.std[0])
        return result

    def _take(self, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self.buffers.take((4 * math.prod(shape),))).view(torch.float32).view(shape)

    def invert(self, images: torch.Tensor) -> torch.Tensor:
        """Back to uint8 for the eye; values out of range are clipped."""
        return (images * self.std + self.mean).round().clamp(0, 255).to(torch.uint8)


class BatchFinisher:
    """Training batches as the network and the loss want them.

    Args:
        config: erasing, mixing and label smoothing.
        num_classes: K, columns of the targets.
        normalize: decides the device too.
        seed, rank: coordinates of the mixing draws.
    """

    def __init__(self, config: AugmentConfig, num_classes: int, normalize: Normalize, seed: int, rank: int = 0) -> None:
        self.config = config
        self.num_classes = num_classes
        self.normalize = normalize
        self.seed = seed
        self.rank = rank
        self.to_device = ToDevice(normalize.mean.device)
        self.noise = torch.empty(0)

    def finish(self, batch: Batch, step: int, micro: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Images float32 (B, 3, H, W) and targets float32 (B, K) whose rows sum to 1.

        Args:
            batch: as the loader gives it.
            step, micro: optimizer step of the run and micro-batch within it.
        """
        batch = self.to_device(batch)
        images = self.normalize(batch.images)
        self._erase(images, batch)
        size_h, size_w = images.shape[-2:]
        generator = np.random.default_rng(stream_key("mix", self.seed, step, micro, self.rank))
        lam, box = draw_mixing(self.config, (size_h, size_w), generator)
        mix_with_reversed(images, lam, box)
        return images, mixup_target(batch.labels, self.num_classes, lam, self.config.label_smoothing)

    def _erase(self, images: torch.Tensor, batch: Batch) -> None:
        mode = self.config.erase_mode
        if not len(self.noise):  # drawn once, for all boxes: each begins at a place of its own
            num = NOISE_STARTS + images[0].numel()
            self.noise = torch.randn(num, generator=torch.Generator().manual_seed(0)).to(images.device)
        boxes, keys = batch.erase.tolist(), batch.keys.tolist()  # host tensors: no wait
        for image, (top, left, height, width), key in zip(images, boxes, keys, strict=True):
            if not height:
                continue
            target = image[:, top : top + height, left : left + width]
            if mode == "const":
                target.zero_()
                continue
            shape = (3, height, width) if mode == "pixel" else (3, 1, 1)
            start = key * 0x9E3779B1 % NOISE_STARTS  # neighbouring keys far from each other
            target.copy_(self.noise[start : start + math.prod(shape)].view(shape))


def draw_mixing(
    config: AugmentConfig, size: tuple[int, int], generator: np.random.Generator
) -> tuple[float, Box | None]:
    """How one batch is mixed: the weight of each image itself and, for CutMix, the box that comes from its partner.

    Returns:
        (lam, box) with the box as (top, left, bottom, right); (1.0, None) for an unmixed batch. CutMix's lam is the
        share of the image that the box, cut off at the border, leaves (arXiv 1905.04899).
    """
    if not (config.mixup or config.cutmix) or generator.random() >= config.mix_prob:
        return 1.0, None
    use_cutmix = bool(config.cutmix) and (not config.mixup or generator.random() < config.mix_switch_prob)
    alpha = config.cutmix if use_cutmix else config.mixup
    lam = float(generator.beta(alpha, alpha))
    if not use_cutmix:
        return lam, None
    size_h, size_w = size
    cut_h, cut_w = int(size_h * (1 - lam) ** 0.5), int(size_w * (1 - lam) ** 0.5)
    center_y, center_x = int(generator.integers(size_h)), int(generator.integers(size_w))
    top, bottom = max(center_y - cut_h // 2, 0), min(center_y + (cut_h + 1) // 2, size_h)
    left, right = max(center_x - cut_w // 2, 0), min(center_x + (cut_w + 1) // 2, size_w)
    return 1 - (bottom - top) * (right - left) / (size_h * size_w), (top, left, bottom, right)


def mix_with_reversed(images: torch.Tensor, lam: float, box: Box | None) -> None:
    """Mixes each image with its partner in the reversed batch, in place; an odd batch's middle one stays itself."""
    if box is not None:
        top, left, bottom, right = box
        images[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right].flip(0)
    elif lam < 1:
        partners = images.flip(0).mul_(1 - lam)
        images.mul_(lam).add_(partners)
