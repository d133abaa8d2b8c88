"""Running sums that stay on the device: the host learns of them on log steps, with one reduction and one copy."""

import torch
from torch import Tensor

from vip.distributed import World


class DeviceSums:
    """Named sums of 0-d tensors, kept in float64 on the device; `reduce()` is the one place that waits for it."""

    def __init__(self, names: tuple[str, ...], world: World) -> None:
        self.names = names
        self.world = world
        self.sums = torch.zeros(len(names), dtype=torch.float64, device=world.device)

    def add(self, **values: Tensor | float) -> None:
        # torch.stack of 0-d tensors would need them all on the device; adding one by one needs no copy and no wait.
        for i, name in enumerate(self.names):
            if name in values:
                self.sums[i] += values[name]

    def reduce(self) -> dict[str, float]:
        """Sums over all ranks since the last call; starts again from zero."""
        totals = self.world.sum(self.sums).tolist()
        self.sums.zero_()
        return dict(zip(self.names, totals, strict=True))
