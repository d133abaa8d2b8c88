"""Run a step again that was left out because its loss or gradients were not finite, and say where that begins.

    python scripts/replay_step.py runs/x/nan_step_120

Every rank's images of the step go through the network once more, one rank after the other in this process, with the weights,
learning rate, drop rate and random numbers of that step. The table names the images and the first layer that gives what is
not finite; below it stand the parameters whose gradients are not.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from data import decoders
from data.augment import TrainTransform
from data.finish import BatchFinisher, Normalize
from data.loader import TrainBatches
from data.sources import Source, open_source
from vip import checkpoint, config
from vip.config import ConfigError, RunConfig
from vip.distributed import World
from vip.engine import seed_step
from vip.models.build import build_model, input_spec
from vip.plan import make_plan
from vip.precision import Precision
from vip.ranks import one_line_errors
from vip.stochastic_depth import rate_at, set_drop_path_rate

SHOWN = 5  # names in a list


class Replay:
    """The network and the data of one dumped step."""

    def __init__(self, folder: Path) -> None:
        state = checkpoint.read(folder / "state.safetensors").state
        self.step: int = state["step"]
        self.run = config.parse(RunConfig, state["config"])
        self.world_size: int = state["fingerprint"]["world_size"]
        self.source: Source = open_source(self.run.data, "train")
        self.num_classes = len(self.source.class_names)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = Precision(self.run.precision, self.device)
        self.model = build_model(self.run.model, self.num_classes)
        self.model.load_state_dict(state["model"])
        self.model.to(self.device).train()
        self.spec = input_spec(self.run.model, self.model)
        self.normalize = Normalize(self.spec.mean, self.spec.std, self.device, self.run.channels_last)
        run = self.run
        assert run.micro_batch != "auto", "a checkpoint holds the number that was found"
        plan = make_plan(
            run.batch_size, run.micro_batch, self.world_size, len(self.source), run.total_epochs, run.max_steps
        )
        self.accumulation = plan.accumulation
        rate = rate_at(run.model.drop_path, self.step, plan.total_steps)
        set_drop_path_rate(self.model, rate, run.model.drop_path.over_depth)
        self.first_bad_layer: str | None = None
        for name, module in self.model.named_modules():
            if not list(module.children()):
                module.register_forward_hook(self._look(name))

    def _look(self, name: str) -> Any:
        def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if self.first_bad_layer is None and isinstance(output, Tensor) and not output.isfinite().all():
                self.first_bad_layer = name

        return look

    def passes(self, facts: dict[str, Any]) -> list[tuple[Tensor, list[str], str]]:
        """Forward and backward through one rank's images: per pass the mean loss, the images whose loss or input is not
        finite, and the first layer that gives what is not."""
        rank, done = facts["rank"], []
        seed_step(self.run.seed, self.step, World(rank, self.world_size, self.device))
        finisher = BatchFinisher(self.run.augment, self.num_classes, self.normalize, self.run.seed, rank)
        batches = TrainBatches(
            self.source,
            TrainTransform(self.run.augment, self.spec.size, self.spec.mean),
            self.run.seed,
            decoders.choose(self.run.data.decoder),
        )
        for micro, part in enumerate(facts["batches"]):
            batch = batches.again(np.array(part["indices"]), np.array(part["keys"]))
            images, targets = finisher.finish(batch, self.step, micro)
            self.first_bad_layer = None if images.isfinite().all() else "(the images)"
            with self.precision.autocast():
                logits = self.model(images)
            losses = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
            scale = facts["loss_scale"] / self.accumulation / self.world_size
            (losses.mean() * scale).backward()
            bad = [
                self.source.name(int(i)) for i, loss in zip(batch.indices, losses, strict=True) if not loss.isfinite()
            ]
            done.append((losses.mean().detach(), bad, self.first_bad_layer or ""))
        return done


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a step again that was left out as not finite.")
    parser.add_argument("folder", type=Path, help="runs/<name>/nan_step_<N>")
    folder: Path = parser.parse_args().folder
    files = sorted(folder.glob("batch_rank_*.json"), key=lambda path: int(path.stem.rpartition("_")[2]))
    if not files:
        raise ConfigError(
            f"{folder}: no dump of a step here (batch_rank_0.json is missing); give runs/<name>/nan_step_<N>"
        )
    replay = Replay(folder)
    console = Console(soft_wrap=True, highlight=False)
    table = Table("rank", "pass", "loss", "then", "images that are not finite", "first in", title=f"step {replay.step}")
    scale = 1.0
    for file in files:
        facts = json.loads(file.read_text())
        scale = facts["loss_scale"]
        for micro, (loss, bad, layer) in enumerate(replay.passes(facts)):
            names = (
                "all: " * (len(bad) == len(facts["batches"][micro]["indices"]))
                + ", ".join(bad[:SHOWN])
                + (f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else "")
            )
            table.add_row(
                str(facts["rank"]), str(micro), f"{loss:.4g}", facts["loss"], names or "none", layer or "none"
            )
    console.print(table)
    gradients = {name: p.grad / scale for name, p in replay.model.named_parameters() if p.grad is not None}
    norm = nn.utils.get_total_norm(list(gradients.values()))
    console.print(
        f"gradient norm {norm:.4g}, then {facts['grad_norm']}" + (f" (loss scale {scale:g})" if scale > 1 else "")
    )
    bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    if bad:
        console.print(
            f"not finite: the gradients of {len(bad)} of {len(gradients)} parameters, {', '.join(bad[:SHOWN])} ..."
        )
    else:
        console.print("every gradient is finite here: another device or precision; see the dump's config")


if __name__ == "__main__":
    with one_line_errors():
        main()
