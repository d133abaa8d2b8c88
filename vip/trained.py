"""Trained networks, opened from a checkpoint of this program or from a published file, for eval.py and scripts/predict.py."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import timm
from torch import Tensor, nn

from data.config import DataConfig
from vip import checkpoint, config
from vip.config import CheckpointData, ConfigError, EvalConfig
from vip.models.build import ModelConfig, build_model
from vip.models.weights import load_weights, unwrap_state_dict


@dataclass(frozen=True)
class Trained:
    """Weights, and what is known of them.

    `data` is where the images of an evaluation are, None for a published file that came without; `origin` a word on where
    the weights come from; `class_names` are in the order of the logits, None where the file does not say.
    """

    path: Path
    model: ModelConfig
    data: DataConfig | None
    weights: dict[str, Tensor]
    origin: str
    class_names: tuple[str, ...] | None

    @property
    def num_classes(self) -> int:
        """As many as the classifier has, by the name that timm's table of networks gives it; 1000 where it has none."""
        found = timm.models.get_pretrained_cfg(self.model.name, allow_unregistered=True)
        heads = found.classifier if found is not None else None
        weight = self.weights.get(f"{heads if isinstance(heads, str) else next(iter(heads or ()), None)}.weight")
        return 1000 if weight is None else len(weight)

    def build(self, num_classes: int) -> nn.Module:
        """The network with these weights, on the CPU. Raises ConfigError where they do not fit."""
        model = build_model(self.model, num_classes)
        try:
            load_weights(model, self.weights)
        except ValueError as error:
            wanted = self.model.name if self.data is None else f"{self.model.name} on {self.data.kind}"
            raise ConfigError(f"checkpoint={self.path} does not fit {wanted}: {error}") from error
        return model


def open_trained(run: EvalConfig) -> Trained:
    """What `run.checkpoint` means. Raises ConfigError, or CheckpointError where nothing whole is there."""
    path = checkpoint.find(Path(run.checkpoint))
    if not checkpoint.is_ours(path):
        return _open_published(run, path)
    state = checkpoint.read(path).state
    if run.ema and state["ema"] is None:
        raise ConfigError(f"ema=true: {path} has no averaged weights (train with ema_decay=0.9999)")
    data = run.data
    if isinstance(data, CheckpointData):
        moved = {key: value for key, value in dataclasses.asdict(data).items() if key != "kind" and value is not None}
        data = config.parse(DataConfig, state["config"]["data"] | moved)
    return Trained(
        path,
        run.model or config.parse(ModelConfig, state["config"]["model"]),
        data,
        state["ema" if run.ema else "model"],
        f"{'ema' if run.ema else 'raw'}, step {state['step']}",
        tuple(state["class_names"]) if state.get("class_names") else None,
    )


def _open_published(run: EvalConfig, path: Path) -> Trained:
    if run.model is None:
        raise ConfigError(
            f"checkpoint={path}: not one of this program, so it does not say what it holds; add model=vip_s7 (or another), "
            "and data=imagenet data.root=... to evaluate it"
        )
    weights = unwrap_state_dict(checkpoint.read_weights(path), use_ema=run.ema)
    data = None if isinstance(run.data, CheckpointData) else run.data
    return Trained(path, run.model, data, weights, "published file", None)
