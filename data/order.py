"""Which sample comes when: pure functions of (seed, epoch, position), the same for every world size and worker count.

A step of the run takes one global batch of consecutive positions; ranks and accumulation only slice it. Nothing here
has a state, so starting at any step costs one permutation (about 15 ms for ImageNet) and reads no image.
"""

from dataclasses import dataclass

import numpy as np

from data.randomness import stream_key

WINDOW = 4096  # blocks that are mixed with one another


@dataclass(frozen=True)
class EpochOrder:
    """The order of the samples in each epoch.

    With `repeats` > 1 an epoch holds every drawn image that many times side by side (Hoffer et al., arXiv 1901.09335)
    and is no longer for it: it ends after `num_images` samples and shows fewer images.

    With `block` > 0 the images are cut into blocks of so many neighbours, the blocks are drawn in random order, and the
    images of each WINDOW of blocks are mixed: what is read within a window are whole blocks. An image can come anywhere in
    an epoch, but always within WINDOW x block positions of its neighbours (65,536 for blocks of 16: 5 % of ImageNet's
    epoch), where a full permutation knows no such bound. Where neighbours are of one class, as in a pack of a class-folder
    tree, a window of ImageNet holds about 980 of the 1,000 classes, some of them several times as often as others. A set of
    no more than WINDOW blocks is permuted in full.
    """

    num_images: int
    seed: int
    repeats: int = 1
    block: int = 0

    def indices(self, epoch: int) -> np.ndarray:
        """Image index at every position of `epoch`: int64, (num_images,)."""
        generator = self._generator("order", epoch)
        if not self.block:
            drawn = generator.permutation(self.num_images)
        else:
            drawn = (self.blocks(epoch)[:, None] * self.block + np.arange(self.block)).ravel()
            for start in range(0, len(drawn), WINDOW * self.block):
                generator.shuffle(drawn[start : start + WINDOW * self.block])
            drawn = drawn[drawn < self.num_images]  # the last block may be short
        return drawn.repeat(self.repeats)[: self.num_images]

    def blocks(self, epoch: int) -> np.ndarray:
        """The blocks in the order in which `epoch` reads them: int64, (ceil(num_images / block),)."""
        return self._generator("blocks", epoch).permutation(-(-self.num_images // self.block))

    def coming(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """The blocks to read ahead while the positions `start` to `stop` of `epoch` are taken: int64, (n,).

        Those of one window further on, so that a window is read, in order, while the one before is used; at an epoch's end
        they are of the next. The first window of a run has none before it.
        """
        shown = -(-self.num_images // self.repeats)  # images that an epoch shows
        num_windows = -(-shown // (WINDOW * self.block))
        ours, theirs = (self.blocks(number)[: num_windows * WINDOW] for number in (epoch, epoch + 1))
        ahead = min(WINDOW, len(ours))
        first, last = (-(-position * len(ours) // self.num_images) + ahead for position in (start, stop))
        return np.concatenate([ours, theirs])[first:last]

    def _generator(self, purpose: str, epoch: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(stream_key(purpose, self.seed, epoch)))

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
