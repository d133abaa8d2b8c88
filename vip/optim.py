"""Optimizers: timm's factory, one rule for weight decay, and NVIDIA apex's fused kernels where they are installed.

Parameters with one dimension (biases, norm scales) and those a network lists in `no_weight_decay()` are not decayed, as in
the published recipe. The learning rate is set anew before every step (`set_lr`): it is a function of the step, never a
state of the optimizer.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import Tensor, nn

from vip import apex_kernels

APEX = {"apex_adam": "fusedadamw", "apex_lamb": "fusedlamb"}


@dataclass(frozen=True)
class OptimizerConfig:
    name: Annotated[
        str, Field(description="adamw, sgd, lamb ... any of timm's; apex_adam, apex_lamb with apex installed")
    ]
    lr: Annotated[float, Field(gt=0, description="peak learning rate, at a global batch of lr_batch images")]
    lr_batch: Annotated[
        int | None, Field(gt=0, description="lr grows linearly with batch_size / lr_batch; null: lr as it is")
    ]
    weight_decay: Annotated[float, Field(ge=0, description="decay of matrices; biases and norms are never decayed")]
    momentum: Annotated[float, Field(ge=0, lt=1, description="SGD's momentum (Adam-like optimizers use betas)")] = 0.9
    betas: Annotated[
        tuple[float, float] | None, Field(description="Adam-like coefficients; null: the optimizer's own")
    ] = None
    eps: Annotated[float | None, Field(gt=0, description="Adam-like epsilon; null: the optimizer's own")] = None
    clip_grad: Annotated[
        float | None, Field(gt=0, description="largest L2 norm of all gradients; null: no clipping")
    ] = None


def peak_lr(config: OptimizerConfig, batch_size: int) -> float:
    """The learning rate at a global batch of `batch_size` images: linear scaling (Goyal et al. 2017)."""
    return config.lr * (batch_size / config.lr_batch if config.lr_batch else 1.0)


def build_optimizer(config: OptimizerConfig, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Raises ValueError for a name that timm does not know, options that it does not take, and apex without its kernels."""
    name = config.name
    if name in APEX:
        instead = f"optimizer={'adamw' if name == 'apex_adam' else 'lamb'}"
        apex_kernels.require(f"optimizer={name}", apex_kernels.OPTIMIZERS, instead)
        if device.type != "cuda":
            raise ValueError(f"optimizer={name}: apex's kernels need a GPU; take {instead} on {device.type}")
        name = APEX[name]
    elif name not in list_optimizers():
        raise ValueError(
            f"optimizer.name={config.name}: unknown; known are {', '.join(sorted([*map(str, list_optimizers()), *APEX]))}"
        )
    info = get_optimizer_info(name)
    if info.second_order:
        raise ValueError(
            f"optimizer.name={config.name}: needs second derivatives, which a step does not have; take adamw"
        )
    options: dict[str, Any] = {}
    for key, takes in (("betas", info.has_betas), ("eps", info.has_eps)):
        value = getattr(config, key)
        if value is not None and not takes:  # timm would drop it without a word
            raise ValueError(f"optimizer.{key}={value}: {config.name} has no {key}; set it to null")
        if value is not None:
            options[key] = value
    if device.type == "cuda" and name in ("adam", "adamw"):
        options["fused"] = True
    try:
        return create_optimizer_v2(
            model, opt=name, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum, **options
        )
    # Assertions and missing imports: no GPU or library for it; the others: betas of 2, Nesterov without momentum ...
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        raise ValueError(f"optimizer.name={config.name}: {error}; change its keys, or take optimizer=adamw") from error


def clip_gradients(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, limit: float | None
) -> Tensor:
    """L2 norm of all gradients, which lose their loss scale and are clipped to `limit` where there is one."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if scaler.is_enabled():
        # The scaler looks at gradients, not at the norm.
        gradients[0].mul_(torch.where(norm.isfinite(), 1.0, torch.nan))
        scaler.unscale_(optimizer)
        norm = norm / scaler.scale(torch.ones_like(norm))
    if limit:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def load_moments(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Moments and counters from a checkpoint, every setting from the configuration (LAMB counts steps in its groups)."""
    own_groups = optimizer.state_dict()["param_groups"]
    groups = [{**then, **now} for then, now in zip(saved["param_groups"], own_groups, strict=True)]
    optimizer.load_state_dict({**saved, "param_groups": groups})


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
