"""Layer normalisation that does not leave autocast's number format."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm in autocast's number format, where its kernel computes the statistics in float32.

    Autocast itself would widen the tokens, only for the next product to narrow them again.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        if torch.jit.is_scripting():
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        device = x.device.type
        if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), self.weight.to(dtype), self.bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
