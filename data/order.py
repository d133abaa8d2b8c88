"""Which sample comes when: pure functions of (seed, epoch, position), the same for every world size and worker count.

A step of the run takes one global batch of consecutive positions; ranks and accumulation only slice it. Nothing here
has a state, so starting at any step costs one permutation (about 15 ms for ImageNet) and reads no image.
"""

from dataclasses import dataclass

import numpy as np

from data.randomness import stream_key


@dataclass(frozen=True)
class EpochOrder:
    """The order of the samples in each epoch.

    With `repeats` > 1 an epoch holds every drawn image that many times side by side (Hoffer et al., arXiv 1901.09335)
    and is no longer for it: it ends after `num_images` samples and shows fewer images.
    """

    num_images: int
    seed: int
    repeats: int = 1

    def indices(self, epoch: int) -> np.ndarray:
        """Image index at every position of `epoch`: int64, (num_images,)."""
        generator = np.random.Generator(np.random.PCG64(stream_key("order", self.seed, epoch)))
        return generator.permutation(self.num_images).repeat(self.repeats)[: self.num_images]

    def copies(self, positions: np.ndarray) -> np.ndarray:
        """Which copy of its image the sample at each position is: 0 .. repeats - 1."""
        return positions % self.repeats


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut: first into `accumulation` parts, each of them into one micro-batch per rank.

    Raises:
        ValueError: the global batch does not divide evenly, naming the nearest sizes that do.
    """

    global_batch: int
    world: int = 1
    rank: int = 0
    accumulation: int = 1

    def __post_init__(self) -> None:
        unit = self.world * self.accumulation
        if self.global_batch < unit or self.global_batch % unit:
            below, above = self.global_batch // unit * unit, (self.global_batch // unit + 1) * unit
            raise ValueError(
                f"batch_size={self.global_batch} cannot be split over {self.world} processes x {self.accumulation} "
                f"accumulation steps: use {f'{below} or ' if below else ''}{above}"
            )

    @property
    def micro_batch(self) -> int:
        """Images that one rank puts through the network at a time."""
        return self.global_batch // (self.world * self.accumulation)

    def positions(self, step_in_epoch: int, micro: int) -> np.ndarray:
        """Positions within the epoch of this rank's micro-batch number `micro`: int64, (micro_batch,)."""
        start = step_in_epoch * self.global_batch + (micro * self.world + self.rank) * self.micro_batch
        return np.arange(start, start + self.micro_batch)


def steps_per_epoch(num_images: int, global_batch: int) -> int:
    """Whole global batches in one epoch; what is left over waits for another epoch's order.

    Raises:
        ValueError: not even one batch fits.
    """
    if global_batch > num_images:
        raise ValueError(
            f"batch_size={global_batch} is larger than the training set: use {num_images} (its images) or less"
        )
    return num_images // global_batch
