"""What a decision used: integrated gradients (arXiv 1703.01365), which take any network that has gradients.

Maps of the last features (Grad-CAM) say nothing of these networks: each token of the last block has long been mixed with
its whole row and column, and removing the pixels such a map names costs hardly more than removing others. Here every
pixel's share in the logit is counted on the way from a copy without content to the image; the shares add up to the whole
difference between the two.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

STEPS = 32  # along the way
AT_ONCE = 8  # steps in one batch: all of a large network's would take a machine's memory
SMOOTHING = 1 / 32  # of the shorter side; shares of neighbours that cancel out are noise


def without_content(image: Tensor) -> Tensor:
    """The mean colours of the four quarters, run into each other. (B, 3, H, W)."""
    return F.interpolate(F.adaptive_avg_pool2d(image, 2), image.shape[-2:], mode="bilinear")


class Explainer:
    """Raises ValueError where captum is not installed."""

    def __init__(self, model: nn.Module) -> None:
        try:
            from captum.attr import IntegratedGradients  # takes a second to import
        except ImportError as error:
            raise ValueError(
                "--explain: captum is not installed: pip install captum, or leave --explain out"
            ) from error
        self.method = IntegratedGradients(model)

    def shares(self, image: Tensor, label: int) -> Tensor:
        """Each pixel's share in the logit of `label`, float32 (H, W), positive where it speaks for it. image: (1, 3, H, W)."""
        start = without_content(image)
        shares = self.method.attribute(image, start, target=label, n_steps=STEPS, internal_batch_size=AT_ONCE)
        return shares[0].sum(0).float()

    def map(self, image: Tensor, label: int) -> Tensor:
        """What speaks for `label`: float32 (H, W) on the CPU, 0 where nothing does. image: (1, 3, H, W)."""
        shares = self.shares(image, label)
        sigma = SMOOTHING * min(shares.shape)
        width = 2 * math.ceil(3 * sigma) + 1
        return gaussian_blur(shares[None, None], [width, width], [sigma, sigma])[0, 0].clamp(min=0).cpu()
