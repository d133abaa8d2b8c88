"""What a run tells, as the rows and media of one W&B run.

    train/...  val/...  val_ema/...  gate/...    metrics.jsonl under its own names, against images seen (or `epoch`)
    train/samples                                augmented images with their mixed labels
    val/errors, val/confusions, val/classes      tables of a validation (val_ema/ where averaged weights decide)
    val/calibration_error                        expected calibration error of the same
    gate/blocks                                  the gates of all blocks over training, as a picture
    config: environment, departures, ...         what is known of the machine and the code; code.diff among the files

A row is sent when all of its step is known. So W&B never has half a step, and which steps it has says everything.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from vip.tracking import pictures
from vip.tracking.base import View
from vip.tracking.truth import Told, is_view

FACTS = ("environment", "departures", "world_size", "num_parameters", "total_steps", "steps_per_epoch")
MAX_CLASSES = 100  # with more of them there is no table of classes: 1,000 rows an epoch help nobody
AXES = {"train/*": "images", "val/*": "images", "val_ema/*": "images", "gate/*": "images"}


class Rows:
    """Writes to `run`, which has all up to `last_step` (-1: nothing) already.

    `folder` is the run's own; from step `drawn_from` on there are pictures of what happened over training.
    """

    def __init__(self, run: wandb.Run, last_step: int, folder: Path, drawn_from: int = 0) -> None:
        self.run = run
        self.last_step = last_step
        self.folder = folder
        self.drawn_from = drawn_from
        self.row: list[Told] = []
        self.classes: list[str] = []
        self.gates: pictures.GateHistory = []
        for name, axis in AXES.items():
            run.define_metric(name, step_metric=axis)

    def take(self, step: int, told: Mapping[str, Any]) -> None:
        """A record or a view of `step`; of a later one than those before, or the same."""
        if self.row and self.row[0][0] != step:
            self.flush()
        if told.get("view") == "start":
            self._show_start(told)
        elif told.get("view") == "validation" and told["gates"]:
            self.gates.append((step, told["gates"]))
        if step > self.last_step:
            self.row.append((step, told))
        if "val/best_top1" in told:
            self.run.summary["best_top1"] = told["val/best_top1"]

    def flush(self) -> None:
        """Send the row that is under way: nothing more will be told of its step."""
        with tempfile.TemporaryDirectory() as files:  # W&B copies from there what it is given as a path
            values: dict[str, Any] = {}
            for step, told in self.row:
                values |= self._media(step, told, Path(files)) if is_view(told) else told
            if values:
                self.run.log(values, step=self.row[0][0], commit=True)  # or its service would wait, too
        self.row = []

    def send_model(self, name: str) -> None:
        """The best checkpoint, if there is one, as a model artifact."""
        path = self.folder / "checkpoints" / "best.safetensors"
        if not path.exists():
            return
        artifact = wandb.Artifact(name, type="model", metadata={"best_top1": self.run.summary.get("best_top1")})
        artifact.add_file(str(path), policy="immutable")  # read where it lies: a copy would be as large
        self.run.log_artifact(artifact, aliases=["best"])

    def _show_start(self, view: View) -> None:
        self.classes = view.get("classes", [])
        self.run.config.update({key: view[key] for key in FACTS if key in view}, allow_val_change=True)
        if (diff := self.folder / "code.diff").exists():
            self.run.save(diff, base_path=self.folder, policy="now")

    def _media(self, step: int, view: View, files: Path) -> dict[str, Any]:
        if view["view"] == "samples":
            images = [
                self._image(shown["picture"], files, pictures.shares(shown["labels"])) for shown in view["images"]
            ]
            return {"train/samples": images}
        if view["view"] != "validation":
            return {}
        prefix = "val_ema" if view["weights"] == "ema" else "val"
        media: dict[str, Any] = {
            f"{prefix}/errors": wandb.Table(
                columns=["image", "name", "label", "predicted", "confidence", "top 5"],
                data=[
                    [
                        self._image(error["picture"], files), error["image"], error["label"], *error["top"][0],
                        pictures.shares(error["top"]),
                    ]
                    for error in view["errors"]
                ],
            ),
            f"{prefix}/confusions": wandb.Table(columns=["label", "predicted", "images"], data=view["confusions"]),
            f"{prefix}/calibration_error": view["calibration_error"],
        }  # fmt: skip
        if len(self.classes) == len(view["per_class"]) <= MAX_CLASSES:
            rows = [
                [name, num, correct, 100 * correct / max(num, 1)]
                for name, (num, correct) in zip(self.classes, view["per_class"], strict=True)
            ]
            media[f"{prefix}/classes"] = wandb.Table(columns=["class", "images", "correct", "top1"], data=rows)
        if view["gates"] and step >= self.drawn_from:
            media["gate/blocks"] = wandb.Image(pictures.gate_map(self.gates))
        return media

    def _image(self, picture: str | None, files: Path, caption: str | None = None) -> wandb.Image | None:
        """The JPEG as it is: an array would be coded anew, as a PNG of several times the size."""
        if not picture:
            return None
        path = files / f"{len(list(files.iterdir()))}.jpg"
        path.write_bytes(pictures.decode(picture))
        return wandb.Image(str(path), caption=caption)
