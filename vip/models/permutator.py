"""Vision Permutator (arXiv 2106.12368): tokens on a grid, mixed along rows, columns and channels by linear layers.

Tokens stay contiguous as (B, H, W, C) from the patches to the head. Each block regroups them once per direction and
copies the results back, since a sum of views permuted in different ways costs more than the copies; one expression
mixes them. A compiler sees plain operations throughout, and fuses them. Names of parameters are
those of the published checkpoints, which is why the token mixer is called `attn` though nothing attends.

Legend: B batch, H rows and W columns of the token grid, C channels = N segments of S channels, P pixels or tokens per
side of a patch.
"""

# ruff: noqa: N806 (capital letters are dimensions)

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from timm.layers import to_2tuple
from timm.models import checkpoint, checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vip.models.checks import check_choice, check_img_size, nearest
from vip.models.fusion import gate_of, mean_of_sum, scaled_sum, weighted_sum
from vip.models.norm import LayerNorm
from vip.models.products import Linear, linear
from vip.models.recompute import Mlp, regroup, regroup_back, regrouped_linear
from vip.stochastic_depth import Mode as DropPathMode
from vip.stochastic_depth import SubsetDropPath, build_drop_path, depth_rates

Mixer = Literal["weighted", "plain"]


@dataclass(frozen=True)
class Stage:
    """`depth` blocks of `dim` channels, cut into segments of `segment_dim` channels for the spatial projections."""

    depth: int
    dim: int
    segment_dim: int


class PatchProjection(nn.Module):
    """Non-overlapping P x P patches, each projected to one token: a convolution with stride P, done as one product."""

    def __init__(self, in_dim: int, dim: int, patch_size: int, **factory: Any) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_dim, dim, patch_size, patch_size, **factory)  # holds the parameters; never called

    def forward(self, x: Tensor) -> Tensor:
        """(B, H*P, W*P, C_in), contiguous or not -> (B, H, W, C)."""
        B, rows, columns, C_in = x.shape
        P = self.patch_size
        H, W = rows // P, columns // P
        patches = x.view(B, H, P, W, P, C_in).permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, P * P * C_in)
        return linear(patches, self.proj.weight.permute(0, 2, 3, 1).flatten(1), self.proj.bias)


class PermuteMlp(nn.Module):
    """The Permute-MLP layer of the paper: a linear map over (H, S), one over (W, S), one over C, fused.

    The plain form adds the three results. The weighted form ("Weighted Permute-MLP") scales each first, per sample and
    channel, by a softmax over the three: split attention (ResNeSt, arXiv 2004.08955) on the mean of their sum.
    """

    def __init__(self, dim: int, segment_dim: int, grid: tuple[int, int], mixer: Mixer, **factory: Any) -> None:
        super().__init__()
        H, W = grid
        S = self.segment_dim = segment_dim
        self.mlp_c = Linear(dim, dim, bias=False, **factory)
        self.mlp_h = Linear(H * S, H * S, bias=False, **factory)
        self.mlp_w = Linear(W * S, W * S, bias=False, **factory)
        self.reweight = Mlp(dim, dim // 4, dim * 3, **factory) if mixer == "weighted" else None
        self.proj = Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        B, H, W, C = x.shape
        x = x.view(B, H, W, -1, self.segment_dim)
        x_h, x_w, x_c = self.mix_rows(x), self.mix_columns(x), self.mix_channels(x)
        if self.reweight is None:
            mixed = x_c + x_h + x_w
        elif torch.jit.is_scripting():
            mixed = scaled_sum(x_h, x_w, x_c, gate_of(self.reweight(mean_of_sum(x_h, x_w, x_c))))
        else:
            mixed = weighted_sum(x_h, x_w, x_c, self.reweight)
        return self.proj(mixed.reshape(B, H, W, C))

    def mix_rows(self, x: Tensor) -> Tensor:
        """x_h: mixes the rows of each column and segment. (B, H, W, N, S) -> (B, H, W, N, S)."""
        axes = [0, 2, 3, 1, 4]
        if torch.jit.is_scripting():
            return regroup_back(self.mlp_h(regroup(x, axes)), x, axes)
        return regrouped_linear(x, self.mlp_h, axes)

    def mix_columns(self, x: Tensor) -> Tensor:
        """x_w: mixes the columns of each row and segment. (B, H, W, N, S) -> (B, H, W, N, S)."""
        axes = [0, 1, 3, 2, 4]
        if torch.jit.is_scripting():
            return regroup_back(self.mlp_w(regroup(x, axes)), x, axes)
        return regrouped_linear(x, self.mlp_w, axes)

    def mix_channels(self, x: Tensor) -> Tensor:
        """x_c: mixes the channels of each token. (B, H, W, N, S) -> (B, H, W, N, S)."""
        return self.mlp_c(x.flatten(3)).view(x.shape)


class PermutatorBlock(nn.Module):
    """The paper's Permutator, a pre-norm residual block: the Permute-MLP mixes tokens, then an MLP their channels."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: nn.Module, **factory: Any) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, **factory)
        self.attn = attn
        self.norm2 = LayerNorm(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **factory)
        self.drop_path = drop_path
        self.drops = not isinstance(drop_path, nn.Identity)
        self.skips = isinstance(drop_path, SubsetDropPath)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        if self.skips and self.training and not torch.jit.is_scripting():
            return self.skip(x)
        x = self.add(x, self.attn(self.norm1(x)))
        return self.add(x, self.mlp(self.norm2(x)))

    @torch.jit.unused
    def skip(self, x: Tensor) -> Tensor:
        """The same, computed only for the samples that are kept."""
        assert isinstance(self.drop_path, SubsetDropPath)
        x = self.drop_path.add(x, self.norm1, self.attn)
        return self.drop_path.add(x, self.norm2, self.mlp)

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        """x + drop_path(branch), in one pass over both."""
        if not self.drops or not self.training:
            return x + branch
        ones = torch.ones((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device)
        scale = self.drop_path(ones)  # of each sample: 0, or what keeps the expectation
        return torch.addcmul(x, branch, scale)


class VisionPermutator(nn.Module):
    """Images to logits. The interface is that of timm's image models; feature i is the output of stage i.

    Args:
        stages: blocks in order; where a stage's `dim` differs from the one before, a 2x2 merging comes between.
        patch_size: pixels per side of a patch.
        img_size: pixels, one number or (height, width). The weights depend on it, so the network takes no other size.
        num_classes: width of the logits; 0 leaves the head out.
        global_pool: "avg", or "" for a head on every token.
        mixer: "weighted" (published) or "plain".
        mlp_ratio: hidden width of the channel MLPs over C.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth of the deepest block, growing linearly from 0 at the first; 0 builds none.
        drop_path_mode: "bernoulli" (published), or "subset" to skip what is dropped.
        device, dtype: of the parameters, as in torch.nn.

    Raises:
        ValueError: a size or a choice that cannot be; the message has those that can.
    """

    output_fmt = "NHWC"  # of forward_features, as timm asks

    def __init__(
        self,
        stages: Sequence[Stage],
        patch_size: int,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        mixer: Mixer = "weighted",
        mlp_ratio: float = 3.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_path_mode: DropPathMode = "bernoulli",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("mixer", mixer, get_args(Mixer))
        check_choice("global_pool", global_pool, ("avg", ""))
        check_choice("drop_path_mode", drop_path_mode, get_args(DropPathMode))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.grad_checkpointing = False
        self.num_features = self.head_hidden_size = stages[-1].dim
        num_merges = sum(stage.dim != previous.dim for previous, stage in pairwise(stages))
        self.stride = patch_size * 2**num_merges  # pixels per side of a token of the last stage
        self.height, self.width = to_2tuple(img_size)
        check_img_size(self.height, self.width, self.stride)

        self.patch_embed = PatchProjection(in_chans, stages[0].dim, patch_size, **factory)
        rates = iter(depth_rates(drop_path_rate, sum(stage.depth for stage in stages)))
        network: list[nn.Module] = []
        feature_info: list[dict[str, Any]] = []
        dim, reduction = stages[0].dim, patch_size
        for stage in stages:
            if stage.dim != dim:
                network.append(PatchProjection(dim, stage.dim, patch_size=2, **factory))
                dim, reduction = stage.dim, reduction * 2
            grid = self.height // reduction, self.width // reduction
            blocks = [
                PermutatorBlock(
                    dim,
                    PermuteMlp(dim, stage.segment_dim, grid, mixer, **factory),
                    mlp_ratio,
                    build_drop_path(next(rates), drop_path_mode, device) if drop_path_rate > 0 else nn.Identity(),
                    **factory,
                )
                for _ in range(stage.depth)
            ]
            feature_info.append({"module": f"network.{len(network)}", "num_chs": dim, "reduction": reduction})
            network.append(nn.Sequential(*blocks))
        self.network = nn.Sequential(*network)
        self.feature_info = feature_info
        self.norm: nn.Module = LayerNorm(dim, **factory)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = Linear(dim, num_classes, **factory) if num_classes > 0 else nn.Identity()
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Fills all parameters as published: linear layers from a normal of std 0.02, the rest by torch's defaults."""
        self.apply(_init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """None beyond the 1-D parameters, which optimizers leave out by shape."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order the parameters by depth, for layer-wise learning rates."""
        blocks = [(r"^network\.(\d+)" if coarse else r"^network\.(\d+)\.(\d+)\.", None)]
        merging, last = (r"^network\.(\d+)\.proj", None), (r"^norm", (99999,))  # timm: the group of what came before
        return {"stem": r"^patch_embed", "blocks": [*blocks, merging, last]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory: blocks keep only their input and run again in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for `num_classes`, or none for 0."""
        if global_pool is not None:
            check_choice("global_pool", global_pool, ("avg", ""))
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = self.patch_embed.proj.weight
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            _init_weights(self.head)

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the stages, alone or after the final features.

        Args:
            x: images, (B, in_chans, height, width).
            indices: the stages wanted; the last n for a number, all for None.
            norm: apply the final norm to the last stage's (no other stage has its channels).
            stop_early: skip what comes after the last stage wanted.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: leave out the final features.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NHWC"))
        taken, last = feature_take_indices(len(self.feature_info), indices)
        ends = self._stage_ends()
        network = list(self.network)[: ends[last] + 1 if stop_early else None]
        intermediates = []
        x = self._embed(x)
        for position, part in enumerate(network):
            x = self._run(part, x)
            if position in ends and ends.index(position) in taken:
                feature = self.norm(x) if norm and position == ends[-1] else x
                intermediates.append(feature.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else feature)
        if intermediates_only:
            return intermediates
        return (self.norm(x) if len(network) == len(self.network) else x), intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what the given stages do not need, and returns their indices."""
        taken, last = feature_take_indices(len(self.feature_info), indices)
        shorter = last < len(self.feature_info) - 1
        self.network = nn.Sequential(*list(self.network)[: self._stage_ends()[last] + 1])
        if prune_norm or shorter:
            self.norm = nn.Identity()  # it is as wide as the last stage
        if shorter:
            self.feature_info = self.feature_info[: last + 1]
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return taken

    @torch.jit.ignore
    def _stage_ends(self) -> list[int]:
        """The position in `network` of each stage (mergings lie between them)."""
        return [int(info["module"].split(".")[1]) for info in self.feature_info]

    @torch.jit.ignore
    def _run(self, part: nn.Module, x: Tensor) -> Tensor:
        if not self.grad_checkpointing:
            return part(x)
        return checkpoint_seq(part, x) if isinstance(part, nn.Sequential) else checkpoint(part, x)

    def _embed(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, height, width) -> tokens (B, H, W, C)."""
        _, channels, height, width = x.shape
        if channels != self.in_chans or height != self.height or width != self.width:
            raise ValueError(
                f"images of {channels}x{height}x{width} do not fit this network, built for "
                f"{self.in_chans}x{self.height}x{self.width}: resize them, or build it with their in_chans and "
                f"img_size (multiples of {self.stride}; the nearest heights are {nearest(height, self.stride)}, "
                f"the nearest widths {nearest(width, self.stride)})"
            )
        return self.patch_embed(x.permute(0, 2, 3, 1))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, height, width) -> normalised tokens (B, H, W, C).

        Raises:
            ValueError: the images are not of the size that the network was built for.
        """
        x = self._embed(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for part in self.network:
                x = self._run(part, x)
        else:
            x = self.network(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, H, W, C) -> logits (B, num_classes), or the pooled (B, C) if `pre_logits`."""
        if self.global_pool == "avg":
            x = x.mean((1, 2))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, height, width) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d | nn.LayerNorm):
        module.reset_parameters()
