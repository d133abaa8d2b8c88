"""Evaluate a checkpoint: `python eval.py checkpoint=runs/x [key=value ...]`, or the same under torchrun.

Prints a table and writes eval.json and predictions.csv. The figures are exact: each image once, and equal to the last
digit for every number of processes and every batch size. `--help` lists every key.
"""

from pathlib import Path

from data import decoders
from data.augment import EvalTransform
from data.finish import Normalize
from data.loader import eval_loader
from data.sources import open_source
from vip import config
from vip.config import ConfigError, EvalConfig
from vip.distributed import connect
from vip.evaluate import evaluate
from vip.models.build import input_spec
from vip.precision import Precision
from vip.report import report_evaluation
from vip.trained import open_trained


def evaluate_checkpoint(run: EvalConfig) -> None:
    trained = open_trained(run)
    if trained.data is None:
        raise ConfigError(
            f"checkpoint={trained.path}: does not say what it was trained on; add data=imagenet data.root=..."
        )
    images = open_source(trained.data, "val")
    model = trained.build(len(images.class_names))
    with connect() as world:
        precision = Precision(run.precision, world.device)
        model.to(world.device)
        spec = input_spec(trained.model, model)
        batches = eval_loader(
            images,
            EvalTransform(spec.size, spec.crop_pct, spec.interpolation),
            decoder=decoders.choose(trained.data.decoder),
            batch_size=run.batch_size,
            rank=world.rank,
            world=world.size,
            workers=trained.data.workers,
            pin=world.device.type == "cuda",
        )
        normalize = Normalize(spec.mean, spec.std, world.device)
        result = evaluate(model, batches, len(images), normalize, precision, world)
        if world.is_main:
            facts = {"checkpoint": str(trained.path), "weights": trained.origin, "model": trained.model.name,
                     "data": trained.data.kind, "precision": run.precision.name}  # fmt: skip
            report_evaluation(result, images, facts, Path(run.out) if run.out else _run_folder(trained.path))


def _run_folder(path: Path) -> Path:
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


if __name__ == "__main__":
    config.run("eval", EvalConfig, evaluate_checkpoint)
