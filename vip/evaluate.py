"""Exact evaluation: every image once, and the same result to the last bit for every world size and batch size.

The network sees fixed slices of consecutive images (`data.loader.EVAL_SLICE`), however many of them a batch holds and whichever
rank they fall to, so each image's logits come from the same products everywhere. What is known of each image is
gathered and added up in the order of the data set: sums and counts, never means of means.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.batch import Batch
from data.finish import ToDevice
from data.loader import EVAL_SLICE
from vip.distributed import World
from vip.precision import Precision

TOP = 5


@dataclass(frozen=True)
class Evaluation:
    """Results over N images: `loss` (mean cross-entropy, nats), `top1` and `top5` (percent), and per image, in the
    order of the data set, `top_classes` (N, 5) int64 and `top_probabilities` (N, 5)."""

    num_images: int
    loss: float
    top1: float
    top5: float
    top_classes: Tensor
    top_probabilities: Tensor

    def metrics(self) -> dict[str, float]:
        return {"loss": self.loss, "top1": self.top1, "top5": self.top5}


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    num_images: int,
    normalise: Callable[[Tensor], Tensor],
    precision: Precision,
    world: World,
) -> Evaluation:
    """Run `model` over this rank's share of the validation images and put all shares together on every rank.

    `normalise` turns uint8 images (B, 3, H, W) into the network's input. The model runs in evaluation mode and eagerly (a
    compiled one would be compiled again for the slice), and is left in the mode it was found in.
    """
    was_training = model.training
    model.eval()
    world.share_buffers(model)
    num_slices = -(-num_images // EVAL_SLICE)
    share = -(-num_slices // world.size) * EVAL_SLICE
    # One row an image: index, loss, rank of the label among the classes, top classes, top probabilities.
    rows = torch.full((share, 3 + 2 * TOP), -1.0, dtype=torch.float64, device=world.device)
    filled, to_device = 0, ToDevice(world.device)
    with torch.compiler.set_stance("force_eager"):
        for batch in batches:
            batch = to_device(batch)
            indices = batch.indices.to(world.device, non_blocking=True)
            parts = (values.split(EVAL_SLICE) for values in (normalise(batch.images), batch.labels, indices))
            for images, labels, positions in zip(*parts, strict=True):
                with precision.autocast():
                    logits = model(images)
                rows[filled : filled + len(images)] = _judge(logits.double(), labels, positions)
                filled += len(images)
    model.train(was_training)
    table = world.gather(rows).cpu()
    table = table[table[:, 0] >= 0]
    table = table[table[:, 0].argsort()]
    if not torch.equal(table[:, 0].long(), torch.arange(num_images)):
        raise RuntimeError(f"evaluation met {len(table)} images of {num_images}, or some of them twice")
    return _summarise(table)


def _judge(logits: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
    """Rows (B, 3 + 2 TOP) of one slice from float64 `logits` (B, K); with fewer classes than TOP the rest is class -1."""
    probabilities = logits.softmax(dim=1)
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    # A stable order breaks ties (frequent in bf16) by class, the same way in every count; NaN logits are always wrong.
    order = logits.argsort(dim=1, descending=True, stable=True)
    rank_of_label = (order == labels[:, None]).int().argmax(dim=1).double()
    rank_of_label[logits.isnan().any(dim=1)] = logits.shape[1] + TOP
    top_classes = order[:, :TOP]
    top_probabilities = probabilities.gather(1, top_classes)
    padding = (0, TOP - top_classes.shape[1])
    return torch.cat(
        [
            torch.stack([indices.double(), losses, rank_of_label], dim=1),
            nn.functional.pad(top_classes.double(), padding, value=-1.0),
            nn.functional.pad(top_probabilities, padding, value=0.0),
        ],
        dim=1,
    )


def _summarise(table: Tensor) -> Evaluation:
    num_images = len(table)
    rank_of_label = table[:, 2]
    return Evaluation(
        num_images=num_images,
        loss=table[:, 1].sum().item() / num_images,
        top1=100.0 * (rank_of_label < 1).sum().item() / num_images,
        top5=100.0 * (rank_of_label < TOP).sum().item() / num_images,
        top_classes=table[:, 3 : 3 + TOP].long(),
        top_probabilities=table[:, 3 + TOP :],
    )
