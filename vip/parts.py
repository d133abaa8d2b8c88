"""The parts of a run, each built once from plain values: the same weights on every rank, whatever the world size."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data import decoders
from data.augment import EvalTransform, TrainTransform
from data.finish import BatchFinisher, Normalize
from data.loader import eval_loader, train_loader
from data.order import BatchPlan, EpochOrder
from data.randomness import stream_key
from data.sources import Source
from vip import checkpoint
from vip.bad_images import BadImages
from vip.config import ConfigError, RunConfig
from vip.distributed import World
from vip.engine import Parts
from vip.evaluate import Evaluation, evaluate
from vip.models.build import build_model, compile_model, input_spec
from vip.models.weights import keep_own_head, load_weights, unwrap_state_dict
from vip.optim import build_optimizer
from vip.plan import Plan
from vip.precision import Precision
from vip.views import Views


def build(
    run: RunConfig,
    plan: Plan,
    world: World,
    train_set: Source,
    val_set: Source,
    weights: str | None,
    warn: Callable[[str], object],
) -> Parts:
    """Every part of a run from its configuration; `weights` is where those to begin with are, None for new ones."""
    num_classes = len(train_set.class_names)
    precision = Precision(run.precision, world.device)
    if world.is_main and (drawback := precision.drawback()):
        warn(f"warning: {drawback}")
    torch.manual_seed(run.seed)
    model = build_model(run.model, num_classes)
    if weights is not None:
        _begin_with(model, Path(weights))
    spec = input_spec(run.model, model)
    model.to(world.device)
    if run.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if run.compile:
        compile_model(model)
    normalize = Normalize(spec.mean, spec.std, world.device, run.channels_last)
    decoder = decoders.choose(run.data.decoder)
    block = run.data.block if run.data.shuffle == "blocks" else 0
    loading: dict[str, Any] = {"decoder": decoder, "workers": run.data.workers, "pin": world.device.type == "cuda"}

    def evaluate_network(network: nn.Module) -> Evaluation:
        transform = EvalTransform(spec.size, spec.crop_pct, spec.interpolation)
        share: dict[str, Any] = {"batch_size": plan.micro_batch, "rank": world.rank, "world": world.size}
        batches = eval_loader(val_set, transform, **share, **loading)
        return evaluate(network, batches, len(val_set), normalize, precision, world)

    return Parts(
        model=model,
        optimizer=build_optimizer(run.optimizer, model, world.device),
        precision=precision,
        batches=lambda step, rollbacks: train_loader(
            train_set,
            TrainTransform(run.augment, spec.size, spec.mean),
            EpochOrder(len(train_set), order_seed(run.seed, rollbacks), run.augment.repeats, block),
            BatchPlan(plan.batch_size, world.size, world.rank, plan.accumulation),
            start_step=step,
            total_steps=plan.total_steps,
            **loading,
        ),
        finish=BatchFinisher(run.augment, num_classes, normalize, run.seed, world.rank).finish,
        evaluate=evaluate_network,
        bad_images=BadImages(run.folder, train_set, run.data.max_bad, warn),
        views=Views(val_set, normalize),
        fingerprint=checkpoint.fingerprint(run.model.name, num_classes, model)
        | _circumstances(run, plan)
        | {"decoder": decoder.name, "block": block},
        image_size=spec.size,
    )


def _circumstances(run: RunConfig, plan: Plan) -> dict[str, Any]:
    """What else decides the bits of a run, beside its network."""
    return {key: getattr(run, key) for key in ("batch_size", "seed", "compile", "compress_gradients")} | {
        "optimizer": run.optimizer.name,
        "world_size": plan.world_size,
        "micro_batch": plan.micro_batch,
        "precision": run.precision.name,
    }


def order_seed(seed: int, rollbacks: int) -> int:
    """The seed of order and augmentation: after a rollback another one, still a function of what the checkpoint says."""
    return stream_key("rollback", seed, rollbacks) if rollbacks else seed


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """The weights in a run folder, a checkpoint of ours (averaged ones first) or a published file."""
    path = checkpoint.find(path)
    if checkpoint.is_ours(path):
        state = checkpoint.read(path).state
        return state["ema"] or state["model"]
    return unwrap_state_dict(checkpoint.read_weights(path))


def _begin_with(model: nn.Module, path: Path) -> None:
    try:
        load_weights(model, keep_own_head(model, read_weights(path)))
    except ValueError as error:
        raise ConfigError(f"weights={path}: {error}") from error
