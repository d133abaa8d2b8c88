"""Run folders made up for tests of what reads them: plausible figures in the files that a run writes."""

import base64
import io
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw

BLOCKS = [f"network.{stage}.{block}" for stage, depth in ((0, 4), (2, 14)) for block in range(depth)]


def make_run(
    folder: Path,
    *,
    model: str = "vip_tiny",
    data: str = "digits",
    classes: Sequence[str] = tuple("0123456789"),
    epochs: int = 40,
    done: int | None = None,
    steps_per_epoch: int = 11,
    batch_size: int = 128,
    log_every: int = 5,
    resumes: Sequence[int] = (),
    ema: bool = False,
    best: float = 99.7,
    lr: float = 2e-3,
    seed: int = 0,
) -> Path:
    """Write config.yaml, metrics.jsonl and views.jsonl of a run that has `done` of its `epochs`; resumes are steps."""
    folder.mkdir(parents=True)
    config = {
        "name": folder.name,
        "seed": seed,
        "epochs": epochs,
        "max_steps": None,
        "batch_size": batch_size,
        "log_every": log_every,
        "ema_decay": 0.999 if ema else None,
        "model": {"name": model, "drop_path": {"rate": 0.1, "over_depth": "linear"}},
        "data": {"kind": data, "root": "datasets/" + data, "workers": 8},
        "augment": {"scale": [0.08, 1.0], "mixup": 0.8, "cutmix": 1.0},
        "optimizer": {"name": "adamw", "lr": lr, "weight_decay": 0.05},
        "schedule": {"kind": "cosine", "warmup_epochs": 20},
        "precision": {"name": "fp16"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    draw = random.Random(seed)
    done = epochs if done is None else done
    metrics, views = [], [start(0, classes, steps_per_epoch, epochs), samples(classes, draw)]
    for step in range(log_every, done * steps_per_epoch + 1, log_every):
        metrics.append(training(step, steps_per_epoch, epochs, batch_size, lr, draw))
    for epoch in range(1, done + 1):
        step = epoch * steps_per_epoch
        metrics.append(figures(epoch, step, epochs, batch_size, best, ema, draw))
        views.append(validation(epoch, step, classes, best, ema, draw))
    views += [start(step, classes, steps_per_epoch, epochs) for step in resumes]
    for name, lines in (("metrics", metrics), ("views", views)):
        lines.sort(key=lambda line: line["step"])
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def make_vip_s7(folder: Path, **changes: Any) -> Path:
    """The published recipe's run on 1000 classes, seen 310 epochs long."""
    values: dict[str, Any] = {
        "model": "vip_s7",
        "data": "imagenet",
        "classes": [f"n{place:08d} class {place}" for place in range(1000)],
        "epochs": 310,
        "steps_per_epoch": 625,
        "batch_size": 2048,
        "log_every": 50,
        "best": 81.4,
    }
    return make_run(folder, **values | changes)


def start(step: int, classes: Sequence[str], steps_per_epoch: int, epochs: int) -> dict[str, Any]:
    return {
        "step": step,
        "view": "start",
        "time": f"2026-11-{22 + (step > 0)}T19:20:00+00:00",
        "world_size": 2,
        "total_steps": epochs * steps_per_epoch,
        "steps_per_epoch": steps_per_epoch,
        "classes": list(classes),
        "num_parameters": 500_000,
        "departures": ["epochs: 300 -> 40", "augment.scale: [0.08, 1.0] -> [0.6, 1.0]"],
        "environment": {
            "command": "train.py experiment=digits",
            "host": "node7",
            "device": "CPU (2 cores)",
            "python": "3.11.2",
            "torch": "2.10.0+cu128",
            "commit": "8f1579e0c1d2",
            "changed": "3 files",
        },
    }


def training(
    step: int, steps_per_epoch: int, epochs: int, batch: int, lr: float, draw: random.Random
) -> dict[str, Any]:
    epoch = step / steps_per_epoch
    t = epoch / epochs
    noise = draw.gauss(0, 0.03)
    return {
        "step": step,
        "epoch": epoch,
        "images": step * batch,
        "train/loss": 2.0 + 2.3 * math.exp(-6 * t) - 0.6 * t + noise,
        "train/lr": lr * min(1, (epoch + 0.01) / (epochs / 15)) * (1 + math.cos(math.pi * t)) / 2,
        "train/grad_norm": 0.6 + 2 * math.exp(-9 * t) + abs(draw.gauss(0, 0.15)),
        "train/drop_path": 0.1,
        "train/images_per_s": 7200 * (1 + draw.gauss(0, 0.015)),
        "train/data_wait": abs(draw.gauss(0.012, 0.008)),
        "train/mfu": 0.38 + draw.gauss(0, 0.004),
        "train/loss_scale": 65536.0 * 2 ** min(4, int(8 * t)),
        "train/skipped_steps": 0,
        "train/bad_images": 0,
    }


def figures(
    epoch: int, step: int, epochs: int, batch: int, best: float, ema: bool, draw: random.Random
) -> dict[str, Any]:
    t = epoch / epochs
    top1 = best * (1 - math.exp(-7 * t)) / (1 - math.exp(-7)) + draw.gauss(0, 0.4) * (1 - t)
    record = {
        "step": step,
        "epoch": float(epoch),
        "images": step * batch,
        "gate/height": 0.3,
        "gate/width": 0.32,
        "gate/channel": 0.38,
    }
    for prefix, worse in (("val", 0.8 * (1 - t) if ema else 0), *([("val_ema", 0)] if ema else [])):
        record |= {
            f"{prefix}/loss": 4.5 * math.exp(-4 * t) + 0.8,
            f"{prefix}/top1": top1 - worse,
            f"{prefix}/top5": min(top1 * 1.17, 100.0) - worse,
        }
    return record | {"val/best_top1": top1}


def validation(
    epoch: int, step: int, classes: Sequence[str], best: float, ema: bool, draw: random.Random
) -> dict[str, Any]:
    num = 36 if len(classes) < 100 else 50
    counts = [
        [num, min(num, max(0, round(draw.betavariate(10, 10 * (100 - best) / best + 0.01) * num)))] for _ in classes
    ]
    pairs = [draw.sample(list(classes), 2) for _ in range(30)] if len(classes) > 1 else []
    confusions = [[label, predicted, times] for (label, predicted), times in zip(pairs, range(30, 0, -1), strict=False)]
    bins = [[(place + 1) ** 3, (place + 0.5) / 15, max(0.0, (place + 0.2) / 15)] for place in range(15)]
    gates = []
    for place, block in enumerate(BLOCKS):
        drift = min(epoch / 60, 1) * math.sin(place / 3)
        weights = [math.exp(0.5 * drift), math.exp(-0.4 * drift), math.exp(0.1 + 0.02 * place)]
        gates.append([block, *(round(weight / sum(weights), 4) for weight in weights)])
    errors = []
    for place, (label, predicted) in enumerate(pairs[:12]):
        share = 0.99 - 0.02 * place
        picture = photo(place, draw, str(label)) if place != 3 else None
        errors.append(
            {
                "image": f"{label}/{place:04d}.png",
                "picture": picture,
                "label": label,
                "top": [[predicted, share], [label, (1 - share) * 0.8], [classes[0], (1 - share) * 0.1]],
            }
        )
    return {
        "step": step,
        "view": "validation",
        "weights": "ema" if ema else "raw",
        "num_images": num * len(classes),
        "per_class": counts,
        "confusions": confusions,
        "calibration": bins,
        "calibration_error": 0.021,
        "errors": errors,
        "gates": gates,
    }


def samples(classes: Sequence[str], draw: random.Random) -> dict[str, Any]:
    images = []
    for place in range(16):
        names = draw.sample(list(classes), min(2, len(classes)))
        images.append(
            {
                "picture": photo(place, draw, names[0]),
                "labels": [[name, share] for name, share in zip(names, (0.63, 0.37), strict=False)],
            }
        )
    return {"step": 0, "view": "samples", "images": images}


def photo(number: int, draw: random.Random, text: str = "", size: int = 96) -> str:
    """A small picture as a data URL."""
    image = Image.new("RGB", (size, size), tuple(draw.randrange(30, 120) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    for _ in range(4):
        corners = [draw.randrange(size) for _ in range(4)]
        pen.line(corners, fill=tuple(draw.randrange(100, 255) for _ in range(3)), width=6)
    pen.text((size // 3, size // 4), text[-2:], fill="white", font_size=size // 2)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
