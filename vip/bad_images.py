"""Training images that cannot be decoded: others take their place (data.loader), here they are listed and counted."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from data.sources import Source
from vip.config import ConfigError


class BadImages:
    """The list `bad_images.jsonl` in the run folder, and the budget: how many an epoch may have.

    Args:
        share: of the training images, that may be bad (`data.max_bad`).
    """

    def __init__(self, folder: Path, source: Source, share: float, warn: Callable[[str], object]) -> None:
        self.path = folder / "bad_images.jsonl"
        self.source = source
        self.share = share
        self.warn = warn
        self.noted: set[int] = set()
        self.epoch, self.count = 0, 0

    def note(self, indices: list[int]) -> None:
        """List images of this rank by index, each once a process; the reason is found by decoding them once more."""
        for index in sorted(set(indices) - self.noted):
            self.noted.add(index)
            reason = "could be decoded the second time"
            try:
                self.source.load(index)
            except (ValueError, OSError) as error:
                reason = str(error)
            with contextlib.suppress(OSError), self.path.open("a") as file:  # ranks append whole lines
                file.write(json.dumps({"index": index, "name": self.source.name(index), "reason": reason}) + "\n")

    def count_in(self, epoch: int, num_bad: int) -> None:
        """Count images of all ranks, in `epoch`. Raises ConfigError beyond the budget."""
        self.epoch, self.count = epoch, num_bad + (self.count if epoch == self.epoch else 0)
        allowed = max(1, int(self.share * len(self.source)))
        if self.count > allowed:
            raise ConfigError(
                f"data.max_bad={self.share:g}: {self.count} training images of epoch {epoch + 1} cannot be decoded, {allowed} were "
                f"allowed; {self.path} names them: repair or remove them, or raise data.max_bad"
            )
        if num_bad:
            self.warn(
                f"warning: {num_bad} training images cannot be decoded, others took their place; {self.path} names them"
            )
