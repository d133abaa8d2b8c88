"""Evaluate a checkpoint: `python eval.py checkpoint=runs/x [key=value ...]`, or the same under torchrun.

Prints a table and writes eval.json and predictions.csv. The figures are exact: each image once, and equal to the last
digit for every number of processes and every batch size. `--help` lists every key.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from data import decoders
from data.augment import EvalTransform
from data.config import DataConfig
from data.finish import Normalize
from data.loader import eval_loader
from data.sources import open_source
from vip import checkpoint, config
from vip.config import CheckpointData, ConfigError, EvalConfig
from vip.distributed import connect
from vip.evaluate import evaluate
from vip.models.build import ModelConfig, build_model, input_spec
from vip.models.weights import load_weights, unwrap_state_dict
from vip.precision import Precision
from vip.report import report_evaluation


def evaluate_checkpoint(run: EvalConfig) -> None:
    path = checkpoint.find(Path(run.checkpoint))
    model_config, data_config, weights, origin = _open(run, path)
    images = open_source(data_config, "val")
    model = build_model(model_config, len(images.class_names))
    try:
        load_weights(model, weights)
    except ValueError as error:
        raise ConfigError(
            f"checkpoint={path} does not fit {model_config.name} on {data_config.kind}: {error}"
        ) from error
    with connect() as world:
        precision = Precision(run.precision, world.device)
        model.to(world.device)
        spec = input_spec(model_config, model)
        batches = eval_loader(
            images,
            EvalTransform(spec.size, spec.crop_pct, spec.interpolation),
            decoder=decoders.choose(data_config.decoder),
            batch_size=run.batch_size,
            rank=world.rank,
            world=world.size,
            workers=data_config.workers,
            pin=world.device.type == "cuda",
        )
        normalize = Normalize(spec.mean, spec.std, world.device)
        result = evaluate(model, batches, len(images), normalize, precision, world)
        if world.is_main:
            facts = {"checkpoint": str(path), "weights": origin, "model": model_config.name, "data": data_config.kind,
                     "precision": run.precision.name}  # fmt: skip
            report_evaluation(result, images, facts, Path(run.out) if run.out else _run_folder(path))


def _open(run: EvalConfig, path: Path) -> tuple[ModelConfig, DataConfig, dict[str, torch.Tensor], str]:
    """Network, data, weights and a word on where the weights come from, of our own checkpoint or a published file."""
    if not checkpoint.is_ours(path):
        if run.model is None or isinstance(run.data, CheckpointData):
            raise ConfigError(
                f"checkpoint={path}: not one of this program, so it does not say what it holds; add model=vip_s7 (or another) and "
                "data=imagenet data.root=..."
            )
        wrapped = checkpoint.read_weights(path)
        return run.model, run.data, unwrap_state_dict(wrapped, use_ema=run.ema), "published file"
    state = checkpoint.read(path).state
    if run.ema and state["ema"] is None:
        raise ConfigError(f"ema=true: {path} has no averaged weights (train with ema_decay=0.9999)")
    trained: dict[str, Any] = state["config"]
    model_config = run.model or config.parse(ModelConfig, trained["model"])
    data_config = run.data
    if isinstance(data_config, CheckpointData):
        moved = {
            key: value for key, value in dataclasses.asdict(data_config).items() if key != "kind" and value is not None
        }
        data_config = config.parse(DataConfig, trained["data"] | moved)
    return (
        model_config,
        data_config,
        state["ema" if run.ema else "model"],
        f"{'ema' if run.ema else 'raw'}, step {state['step']}",
    )


def _run_folder(path: Path) -> Path:
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


if __name__ == "__main__":
    config.run("eval", EvalConfig, evaluate_checkpoint)
