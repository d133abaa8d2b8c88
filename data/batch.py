"""The batch: what crosses from loader processes to the training process, and from the host to the device.

B images per batch, H, W height and width in pixels.
"""

from typing import NamedTuple

import torch

NONE = torch.empty(0, dtype=torch.int64)


class Batch(NamedTuple):
    """uint8 images and the facts that go with them.

    `images` is (B, 3, H, W) over memory in (B, H, W, 3) order, torch's channels_last, as the decoder left it.
    """

    images: torch.Tensor  # uint8 (B, 3, H, W)
    labels: torch.Tensor  # int64 (B,)
    indices: torch.Tensor  # int64 (B,): which image of the source
    erase: torch.Tensor  # int64 (B, 4): top, left, height, width of the box to erase; height 0 for none
    keys: torch.Tensor  # int64 (B,): seed of the noise that fills the box
    bad: torch.Tensor = NONE  # int64 (n,): images that could not be decoded; others stand in their place

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """Images and labels on `device`; the rest stays on the host, which steers the device by it without waiting."""
        return self._replace(
            images=self.images.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
        )
