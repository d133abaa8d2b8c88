"""What happens to a batch on the device: normalise, fill the erased boxes, mix, and turn labels into soft targets.

Arithmetic as in timm (PrefetchLoader, RandomErasing, Mixup in batch mode), each draw a function of its coordinates: the
noise of a box of its sample's key, mixing of (seed, step, micro-batch, rank). All draws are made on the host or by
seeded device generators, so nothing waits for the device. B images, H, W pixels, K classes.
"""

import numpy as np
import torch
from timm.data.mixup import mixup_target

from data.batch import Batch
from data.config import AugmentConfig
from data.randomness import stream_key

Box = tuple[int, int, int, int]


class Normalize:
    """uint8 (B, 3, H, W) -> float32 (pixel / 255 - mean) / std, on `device`.

    Args:
        mean, std: per channel, on the 0-to-1 scale.
        channels_last: memory order of the result; either way the conversion is one pass.
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
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.to(torch.float32, memory_format=self.memory_format).sub_(self.mean).div_(self.std)

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
        self.noise = torch.Generator(device=normalize.mean.device)

    def finish(self, batch: Batch, step: int, micro: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Images float32 (B, 3, H, W) and targets float32 (B, K) whose rows sum to 1.

        Args:
            batch: already on the device (`Batch.to`).
            step, micro: optimizer step of the run and micro-batch within it.
        """
        images = self.normalize(batch.images)
        self._erase(images, batch)
        size_h, size_w = images.shape[-2:]
        generator = np.random.default_rng(stream_key("mix", self.seed, step, micro, self.rank))
        lam, box = draw_mixing(self.config, (size_h, size_w), generator)
        mix_with_reversed(images, lam, box)
        return images, mixup_target(batch.labels, self.num_classes, lam, self.config.label_smoothing)

    def _erase(self, images: torch.Tensor, batch: Batch) -> None:
        mode = self.config.erase_mode
        boxes, keys = batch.erase.tolist(), batch.keys.tolist()  # host tensors: no wait
        for image, (top, left, height, width), key in zip(images, boxes, keys, strict=True):
            if not height:
                continue
            target = image[:, top : top + height, left : left + width]
            if mode == "const":
                target.zero_()
                continue
            shape = (3, height, width) if mode == "pixel" else (3, 1, 1)
            generator = self.noise.manual_seed(key)
            target.copy_(torch.randn(shape, generator=generator, device=images.device))


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
