"""Memory for batches that is used again once nobody looks at it: touching fresh pages costs as much as copying into them."""

import weakref
from collections import defaultdict

import numpy as np
import torch


class Buffers:
    """Gives out uint8 memory; what was given comes back by itself when the last tensor over it is gone.

    Args:
        pin: page-locked memory, for asynchronous copies to a GPU. Then `take` belongs in the thread that uses the GPU:
            another one would open a context on the first device.
    """

    def __init__(self, pin: bool = False) -> None:
        self.pin = pin
        self._free: dict[int, list[torch.Tensor]] = defaultdict(list)

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """uint8 array of `shape`, of undefined content. `torch.from_numpy` it: views that numpy makes of it do not count."""
        num_bytes = int(np.prod(shape))
        free = self._free[num_bytes]
        memory = free.pop() if free else torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.pin)
        array = memory.numpy().reshape(shape)
        weakref.finalize(array, free.append, memory).atexit = False
        return array
