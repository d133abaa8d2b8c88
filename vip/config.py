"""The schema of conf/: Hydra composes, pydantic types and checks, and a wrong key or value ends in one line.

Every key is a field of a frozen dataclass that stands beside the code it configures; this file assembles them, words the
errors, and is, with the entry points, the only place that knows Hydra. A single run uses Hydra's compose API, which has no
side effects; `-m` and Hydra's own flags go through `hydra.main`.
"""

import dataclasses
import difflib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from data.config import AugmentConfig, DataConfig
from vip.models.build import ModelConfig
from vip.optim import OptimizerConfig
from vip.precision import PrecisionConfig
from vip.schedule import ScheduleConfig

CONF_DIR = Path(__file__).resolve().parents[1] / "conf"
Text = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int | float) else value)]
Schema = TypeVar("Schema")


class ConfigError(ValueError):
    """A key or value that cannot be; the text is one line that names it and what would do."""


@dataclass(frozen=True)
class TrackingConfig:
    kind: Annotated[
        Literal["local", "wandb"], Field(description="local: metrics.jsonl and the console; wandb: W&B as well")
    ]
    mode: Annotated[Literal["online", "offline"], Field(description="wandb: send now, or keep for `wandb sync`")] = (
        "online"
    )
    project: Annotated[Text, Field(description="wandb: the project's name")] = "vision-permutator"


@dataclass(frozen=True)
class RunConfig:
    """One training run, complete."""

    name: Annotated[Text, Field(description="the run's name: its folder is <runs_dir>/<name>")]
    runs_dir: Annotated[Text, Field(description="where run folders are kept")]
    seed: Annotated[int, Field(ge=0, description="weights, order, augmentation and dropout all follow from it")]
    epochs: Annotated[int, Field(ge=1, description="epochs of the schedule; its cooldown epochs are added")]
    max_steps: Annotated[
        int | None, Field(ge=1, description="stop after this many steps (the schedule stays); null: all")
    ]
    batch_size: Annotated[int, Field(ge=1, description="images in one optimizer step, over all processes")]
    micro_batch: Annotated[
        int | None,
        Field(ge=1, description="images a process takes in one pass, the rest by accumulation; null: all at once"),
    ]
    resume: Annotated[
        Text,
        Field(description="auto: go on from the run's newest checkpoint; never: start anew; or a checkpoint's path"),
    ]
    eval_every: Annotated[
        int, Field(ge=1, description="epochs between validations (the end of the run always has one)")
    ]
    save_every: Annotated[
        int | None, Field(ge=1, description="steps between checkpoints; null: one after each validation")
    ]
    keep: Annotated[int, Field(ge=2, description="newest checkpoints to keep, beside the best one")]
    log_every: Annotated[int, Field(ge=1, description="steps between metrics; only then the host waits for the device")]
    ema_decay: Annotated[
        float | None,
        Field(
            gt=0,
            lt=1,
            description="average the weights with this decay a step, from the third step on; null: no average (published)",
        ),
    ]
    compile: Annotated[bool, Field(description="torch.compile the network's blocks")]
    channels_last: Annotated[bool, Field(description="channels-last memory format (convolutional networks)")]
    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    precision: PrecisionConfig
    tracking: TrackingConfig

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.,=+-]+", self.name) or self.name.startswith("."):
            raise ValueError(f"name={self.name}: becomes a folder's name; letters, digits and . , = + - _ only")
        if self.schedule.warmup_epochs >= self.epochs:
            raise ValueError(
                f"schedule.warmup_epochs={self.schedule.warmup_epochs:g}: must be less than epochs={self.epochs}; "
                f"schedule.warmup_epochs={self.epochs // 10} would do"
            )
        if self.augment.repeats > 1 and self.batch_size < self.augment.repeats:
            raise ValueError(
                f"augment.repeats={self.augment.repeats}: more than the {self.batch_size} images of a batch"
            )

    @property
    def folder(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def total_epochs(self) -> int:
        return self.epochs + self.schedule.cooldown_epochs


@dataclass(frozen=True)
class CheckpointData:
    """The data a checkpoint was trained on, perhaps moved."""

    kind: Literal["checkpoint"]
    root: Annotated[Text | None, Field(description="where they are now; null: where they were")] = None
    workers: Annotated[int | None, Field(ge=0, description="loader processes of each rank; null: as in training")] = (
        None
    )


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation."""

    checkpoint: Annotated[
        Text, Field(description="a run folder (its best checkpoint), a checkpoint, or a published file")
    ]
    out: Annotated[
        Text | None, Field(description="folder for eval.json and predictions.csv; null: the checkpoint's run folder")
    ]
    ema: Annotated[bool, Field(description="evaluate the averaged weights of the checkpoint")]
    batch_size: Annotated[int, Field(ge=1, description="images each process loads at a time; never changes the result")]
    model: Annotated[
        ModelConfig | None, Field(description="the network of a published file; null: the checkpoint's own")
    ]
    data: Annotated[DataConfig | CheckpointData, Field(discriminator="kind", description="which validation images")]
    precision: PrecisionConfig


def compose(config_name: str, overrides: list[str]) -> dict[str, Any]:
    """The composed YAML as plain values. Raises ConfigError with the nearest key or choice."""
    try:
        with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            composed = hydra.compose(config_name, overrides)
            return OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(config_name, overrides, error)) from error


def defaults(config_name: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a configuration without overrides; what must be given is shown as ???."""
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        values = OmegaConf.to_container(hydra.compose(config_name), resolve=True)
    yield from _flatten(values)


def parse(schema: type[Schema], values: dict[str, Any]) -> Schema:
    """Typed, checked and frozen. Raises ConfigError naming the key, the value and what is allowed."""
    known = sorted(key for key, *_ in walk(schema))
    for key, value in _flatten(values):
        if not any(key == k or key.startswith(f"{k}.") or (value is None and k.startswith(f"{key}.")) for k in known):
            raise ConfigError(f"{key}={value}: no such key{_near(key, known)}")
    try:
        return TypeAdapter(schema).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise ConfigError(_first_problem(schema, error)) from None


def walk(schema: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, type, description) of every leaf of a schema, in order; a key of several alternatives comes once."""
    hints = get_type_hints(schema, include_extras=True)
    for field in dataclasses.fields(schema):
        kind, *notes = (
            get_args(hints[field.name]) if get_origin(hints[field.name]) is Annotated else (hints[field.name],)
        )
        nested = [choice for choice in (kind, *get_args(kind)) if dataclasses.is_dataclass(choice)]
        seen = set()
        for inner in nested:
            for key, name, text in walk(inner, f"{prefix}{field.name}."):
                if key not in seen:
                    yield key, name, text
                seen.add(key)
        if not nested:
            text = next((note.description for note in notes if getattr(note, "description", None)), "")
            yield f"{prefix}{field.name}", _type_name(kind), text


def run(config_name: str, schema: type[Schema], task: Callable[[Schema], None]) -> None:
    """Entry point: compose, check, `task(config)`. A user's error is one line on stderr and exit status 2."""
    arguments = sys.argv[1:]
    if any(a in ("-h", "--help") for a in arguments):
        from vip.help import print_help  # needs this module

        print_help(config_name, schema)
        return
    if any(a.startswith("-") for a in arguments):
        _run_with_hydra(config_name, schema, task)
        return
    with one_line_errors():
        task(parse(schema, compose(config_name, arguments)))


class one_line_errors:  # noqa: N801 - a context manager, used like a function
    """What a user can cause (ValueError, OSError) becomes one line and exit status 2.

    Anything else is a bug and keeps its traceback; HYDRA_FULL_ERROR=1 shows one for the user's errors as well.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(130) from None
        if not isinstance(error, ValueError | OSError):
            return
        rank = os.environ.get("RANK", "0")
        if rank != "0" and isinstance(error, ConfigError):
            time.sleep(30)  # rank 0 says the same; leaving before it would have torchrun end it unheard
        else:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                traceback.print_exception(error)
            where = "" if rank == "0" else f"[rank {rank}] "
            said = f"{where}{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}"
            print(said, file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def departures(config: RunConfig) -> list[str]:
    """Where `config` differs from the published recipe of its network: `key: published -> here`; empty off ImageNet."""
    recipe = f"{config.model.name}_imagenet"
    if config.data.kind != "imagenet" or not (CONF_DIR / "experiment" / f"{recipe}.yaml").exists():
        return []
    published = dict(_flatten(dataclasses.asdict(parse(RunConfig, compose("train", [f"experiment={recipe}"])))))
    free: tuple[str, ...] = ("name", "runs_dir", "seed", "resume", "micro_batch", "keep", "data.", "tracking.")
    free += ("eval_every", "save_every", "log_every")
    return [
        f"{key}: {as_yaml(published.get(key))} -> {as_yaml(value)}"
        for key, value in _flatten(dataclasses.asdict(config))
        if published.get(key) != value and not key.startswith(free)
    ]


def as_yaml(value: Any) -> str:
    """One value as it would be typed."""
    return value if isinstance(value, str) else json.dumps(value)


def to_yaml(config: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(json.loads(json.dumps(dataclasses.asdict(config)))))


def _run_with_hydra(config_name: str, schema: type[Schema], task: Callable[[Schema], None]) -> None:
    def job(composed: DictConfig) -> None:
        with one_line_errors():
            values: dict[str, Any] = OmegaConf.to_container(composed, resolve=True)  # type: ignore[assignment]
            swept = [item for item in HydraConfig.get().overrides.task if item not in sys.argv]
            if swept and "name" in values:
                values["name"] = "-".join([str(values["name"]), *(re.sub(r"[^\w.,=+-]", "_", item) for item in swept)])
            task(parse(schema, values))

    if any(a in ("-m", "--multirun") for a in sys.argv):
        with one_line_errors():  # what Hydra itself says of a wrong key or value is many lines long
            parse(schema, compose(config_name, _first_job(sys.argv[1:])))
    hydra.main(config_path=str(CONF_DIR), config_name=config_name, version_base="1.3")(job)()


def _first_job(arguments: list[str]) -> list[str]:
    """The overrides of a sweep's first job; which choices a glob stands for is left to Hydra."""
    given = [a for a in arguments if "=" in a and not a.startswith("-")]
    try:
        parsed = OverridesParser.create().parse_overrides(given)
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    return [
        f"{o.get_key_element()}={next(o.sweep_string_iterator())}" if o.is_sweep_override() else str(o.input_line)
        for o in parsed
        if o.value_type is not ValueType.GLOB_CHOICE_SWEEP
    ]


def _one_line(config_name: str, overrides: list[str], error: Exception) -> str:
    """Hydra's messages, many lines long, as one that names the key and the nearest one."""
    text = str(error)
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={choice}: no such choice{_near(choice, error.options)}; there are {', '.join(sorted(error.options))}"
    unknown = re.search(r"Could not override '([^']+)'", text)
    if isinstance(error, ConfigCompositionException) and unknown:
        key = unknown[1]
        given = next((item for item in overrides if item.lstrip("+~").startswith(f"{key}=")), key)
        groups = sorted(path.name for path in CONF_DIR.iterdir() if path.is_dir())
        keys = [k for k, *_ in walk(RunConfig if config_name == "train" else EvalConfig)]
        return f"{given}: no such key{_near(key, [*keys, *groups])}"
    missing = re.search(r"Missing mandatory value: (\S+)", text)
    if missing:
        return f"{missing[1]}: must be given ({missing[1]}=...)"
    return " ".join(text.split())


def _near(word: str, known: list[str] | Any) -> str:
    """`; nearest: x`, by whole key, or else by the key's last part."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not near:
        tails = {key.rpartition(".")[2]: key for key in reversed(known)}
        near = [tails[t] for t in difflib.get_close_matches(word.rpartition(".")[2], list(tails), n=1, cutoff=0.6)]
    return f"; nearest: {near[0]}" if near else ""


def _first_problem(schema: Any, error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    key, known = "", [known for known, *_ in walk(schema)]
    for part in problem["loc"]:  # which names members of unions too
        longer = f"{key}.{part}" if key else str(part)
        if any(f"{k}.".startswith(f"{longer}.") for k in known):
            key = longer
    if problem["type"] == "value_error":  # raised by a check of ours, which names its key
        return f"{key}.{problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
    message = problem["msg"].removeprefix("Input ")
    return f"{key}: {message}" if problem["type"] == "missing" else f"{key}={as_yaml(problem['input'])}: {message}"


def _flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _type_name(kind: Any) -> str:
    """`int`, `a | b | c` for choices, `x or null` for what may be left out."""
    if get_origin(kind) is Annotated:
        return _type_name(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"[{', '.join(_type_name(part) for part in get_args(kind))}]"
    if get_origin(kind) in (UnionType, Union):
        return " or ".join(_type_name(part) for part in get_args(kind))
    return "null" if kind is NoneType else kind.__name__
