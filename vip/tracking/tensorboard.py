"""TensorBoard's event files in the run folder, under the names that W&B has; a start writes the whole run anew.

    tensorboard --logdir runs          all runs of the folder, by their names

So a run that was cut off and goes on, or rolls back, is one clean run for every reader. Events are on the disk as soon as they
are told: metrics.jsonl and views.jsonl are the truth, and these files are never behind them.
"""

import io
import logging
import os
import textwrap
import time
from pathlib import Path
from typing import Any

from PIL import Image

from vip.tracking import pictures
from vip.tracking.base import Record, View
from vip.tracking.truth import is_view, last_validation, read_truth

FOLDER = "tensorboard"
log = logging.getLogger(__name__)


class TensorBoardTracker:
    """Writes to `tensorboard/` in `folder`, a run's own, beginning with what that holds up to `resume_step`.

    A disk that is full or fails costs these files, with one warning, and not the run. Raises ValueError where the package is
    missing.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            raise ValueError(
                "tracking=tensorboard needs a package that is missing; `pip install tensorboard`, or tracking=local"
            ) from None
        self.event, self.summary, self.tensor, self.writer = event_pb2, summary_pb2, tensor_pb2, RecordWriter
        self.folder = folder
        self.file: io.FileIO | None = None
        self.rewind(resume_step)

    def log(self, step: int, record: Record) -> None:
        value = self.summary.Summary.Value
        self._write(step, [value(tag=key, simple_value=number) for key, number in record.items()])

    def show(self, step: int, view: View) -> None:
        if view["view"] == "start" and (config := self.folder / "config.yaml").exists():
            self._write(step, [self._text("config", textwrap.indent(config.read_text(), "    "))])  # as it is
        elif view["view"] == "samples":
            shown = [(image["picture"], pictures.shares(image["labels"])) for image in view["images"]]
            self._write(step, [self._image("train/samples", pictures.grid(shown))])
        elif view["view"] == "validation":
            self._write(step, self._validation(step, view))

    def rewind(self, step: int) -> None:
        self.close("interrupted")
        self.gates: pictures.GateHistory = []
        self.failed = False
        try:
            self._begin(step)
        except OSError as error:
            self._give_up(error)

    def close(self, status: str) -> None:
        if self.file is not None:
            self.file.close()

    def _begin(self, last_step: int) -> None:
        folder = self.folder / FOLDER
        folder.mkdir(exist_ok=True)
        superseded = list(folder.glob("*.tfevents.*"))
        # A name that sorts behind those before it, which is how readers order them.
        self.file = (folder / f"events.out.tfevents.{time.time():.6f}").open("wb", buffering=0)
        start = self.event.SessionLog(status=self.event.SessionLog.START)
        self._append(self.file, self.event.Event(file_version="brain.Event:2"))
        self._append(self.file, self.event.Event(session_log=start, step=0))  # whoever has read the others forgets them
        truth = read_truth(self.folder, last_step)
        self.drawn_from = last_validation(truth)
        for step, told in truth:
            self.show(step, told) if is_view(told) else self.log(step, told)
        for path in superseded if not self.failed else ():
            if path.stat().st_size:  # whoever reads it now would not go on to the new one if it were gone
                os.truncate(path, 0)
            else:
                path.unlink()

    def _write(self, step: int, values: list[Any]) -> None:
        if self.failed or self.file is None:
            return
        end = self.file.tell()
        try:
            self._append(self.file, self.event.Event(step=step, summary=self.summary.Summary(value=values)))
        except OSError as error:
            self.file.truncate(end)  # half an event would end the file for readers
            self._give_up(error)

    def _append(self, file: io.FileIO, event: Any) -> None:
        event.wall_time = time.time()
        stream = io.BytesIO()
        self.writer(stream).write(event.SerializeToString())
        if file.write(stream.getbuffer()) < stream.tell():
            raise OSError("no space left on device")

    def _give_up(self, error: OSError) -> None:
        self.failed = True
        log.warning(
            "tensorboard: given up (%s); training goes on, metrics.jsonl has what is missing; "
            "`python scripts/replay_tracking.py --to tensorboard %s` writes the files anew",
            error.strerror or error, self.folder,
        )  # fmt: skip

    def _validation(self, step: int, view: View) -> list[Any]:
        prefix = "val_ema" if view["weights"] == "ema" else "val"
        errors = [
            (error["picture"] or "", f"{error['label']}, not {pictures.shares(error['top'][:1])}")
            for error in view["errors"]
        ]
        confusions = "".join(f"| {label} | {predicted} | {num} |\n" for label, predicted, num in view["confusions"])
        values = [
            self.summary.Summary.Value(tag=f"{prefix}/calibration_error", simple_value=view["calibration_error"]),
            self._image(f"{prefix}/errors", pictures.grid(errors)),
            self._text(f"{prefix}/confusions", f"| label | predicted | images |\n|---|---|---|\n{confusions}"),
        ]
        if view["gates"]:
            self.gates.append((step, view["gates"]))
        if view["gates"] and step >= self.drawn_from:
            values.append(self._image("gate/blocks", pictures.gate_map(self.gates), "PNG"))
        return values

    def _image(self, tag: str, image: Image.Image, kind: str = "JPEG") -> Any:
        encoded = self.summary.Summary.Image(
            height=image.height, width=image.width, colorspace=3, encoded_image_string=pictures.encode(image, kind)
        )
        return self.summary.Summary.Value(tag=tag, image=encoded)

    def _text(self, tag: str, markdown: str) -> Any:
        plugin = self.summary.SummaryMetadata.PluginData(plugin_name="text")
        tensor = self.tensor.TensorProto(dtype="DT_STRING", string_val=[markdown.encode()])
        metadata = self.summary.SummaryMetadata(plugin_data=plugin)
        return self.summary.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
