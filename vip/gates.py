"""What each block of a Vision Permutator listens to: the mean weights of its three branches over the images it saw.

The weighted Permute-MLP fuses height, width and channel by a softmax per sample and channel; its mean tells how much a layer
uses each, which the paper's ablations ask of the network as a whole.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from vip.distributed import World
from vip.models.permutator import PermuteMlp

BRANCHES = ("height", "width", "channel")
Gates = dict[str, tuple[float, float, float]]  # block -> weights of height, width, channel; their sum is 1


class GateMeans:
    """Watches a network's gates while it runs inside `with`; `result()`, on every rank, is the mean over all ranks' images.

    Networks without gates give an empty result.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self.world = world
        found = [
            (name.rpartition(".")[0], module.reweight)
            for name, module in model.named_modules()
            if isinstance(module, PermuteMlp) and module.reweight is not None
        ]
        self.names = [name for name, _ in found]
        self.modules = [module for _, module in found]
        self.sums = torch.zeros(len(found), 4, dtype=torch.float64, device=world.device)  # the branches, images

    def __enter__(self) -> Self:
        self.hooks = [
            module.register_forward_hook(self._add_to(row)) for module, row in zip(self.modules, self.sums, strict=True)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _add_to(self, row: Tensor) -> Any:
        def add(_module: nn.Module, _inputs: Any, logits: Tensor) -> None:
            """(B, 3 C), as PermuteMlp reads it."""
            gate = logits.float().unflatten(1, (-1, 3)).softmax(2).mean(1)
            row[:3] += gate.sum(0)
            row[3] += len(gate)

        return add

    def result(self) -> Gates:
        if not self.names:
            return {}
        sums = self.world.sum(self.sums).cpu()
        rows = (sums[:, :3] / sums[:, 3:].clamp(min=1)).tolist()
        return {name: (height, width, channel) for name, (height, width, channel) in zip(self.names, rows, strict=True)}


def means(gates: Gates) -> dict[str, float]:
    """The mean over all blocks, as metrics."""
    return {
        f"gate/{name}": sum(row[i] for row in gates.values()) / len(gates) for i, name in enumerate(BRANCHES) if gates
    }
