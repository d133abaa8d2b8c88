"""The schema of conf/: Hydra composes, pydantic types and checks, and a wrong key or value ends in one line.

Every key is a field of a frozen dataclass that stands beside the code it configures; this file assembles them, words the
errors, and is, with the entry points, the only place that knows Hydra. A single run uses Hydra's compose API, which has no
side effects; `-m` and Hydra's own flags go through `hydra.main`.
"""

import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, TypeAdapter, ValidationError

from data.config import AugmentConfig, DataConfig
from vip.models.build import ModelConfig
from vip.optim import OptimizerConfig
from vip.precision import PrecisionConfig
from vip.ranks import one_line_errors, settle_ranks
from vip.redact import redact
from vip.schedule import ScheduleConfig
from vip.schema import as_yaml, first_problem, flatten, near, walk
from vip.tracking.base import Text, TrackingConfig

CONF_DIR = Path(__file__).resolve().parents[1] / "conf"
Schema = TypeVar("Schema")
HYDRA_FLAGS = ("-m", "--multirun", "-c", "--cfg", "-p", "--package", "--resolve", "--info", "--hydra-help", "--version")
# As people type them: `--quiet` is every tool's word, and a batch that is to fit is one of the devices, not of the recipe.
ALIASES = {"--quiet": "console=quiet", "batch_size=auto": "micro_batch=auto"}
# Where Hydra would call, import or set what a configuration names: (key, the only value that is let through).
HYDRA_HANDS: dict[str, Any] = {
    "callbacks": {},
    "job.env_set": {},
    "sweeper.params": None,
    "launcher.setup": None,
    "job_logging": {"version": 1, "root": None, "disable_existing_loggers": False},
    "hydra_logging": {"version": 1, "root": None, "disable_existing_loggers": False},
}


class ConfigError(ValueError):
    """A key or value that cannot be; the text is one line that names it and what would do."""


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
        Annotated[int, Field(ge=1)] | Literal["auto"] | None,
        Field(
            description="images a process takes in one pass, the rest by accumulation; null: all; auto: what memory allows"
        ),
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
    weights: Annotated[
        Text | None,
        Field(
            description="fine-tuning: begin with these weights (a run folder, a checkpoint, a published file); a classifier of "
            "other classes begins anew; null: from the seed"
        ),
    ]
    max_skipped: Annotated[
        int,
        Field(ge=1, description="steps in a row whose loss or gradients are not finite, each left out, before on_nan"),
    ]
    on_nan: Annotated[
        Literal["stop", "rollback"],
        Field(description="stop with the cause, or go back to the newest checkpoint and on with other images, 3 times"),
    ]
    ema_decay: Annotated[
        float | None,
        Field(
            gt=0,
            lt=1,
            description="average the weights with this decay a step, from the third step on; null: no average (published)",
        ),
    ]
    compile: Annotated[
        bool,
        Field(description="torch.compile the network's blocks; for Ampere and later, before Triton's kernels may fail"),
    ]
    compress_gradients: Annotated[
        bool, Field(description="ranks exchange gradients in fp16: half the traffic, for slow networks between nodes")
    ]
    channels_last: Annotated[bool, Field(description="channels-last memory format (convolutional networks)")]
    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    precision: PrecisionConfig
    tracking: TrackingConfig
    console: Annotated[
        Literal["auto", "plain", "quiet"],
        Field(
            description="auto: a progress bar on a terminal, lines in a log; plain: lines; quiet: warnings and the end"
        ),
    ] = "auto"
    profile: Annotated[bool, Field(description="record steps 10 to 20, and say where their time goes")] = False
    plan: Annotated[
        bool, Field(description="say what the run would take, in hours, memory and disk, and train nothing")
    ] = False
    plan_network: Annotated[
        float, Field(gt=0, description="what plan=true reckons with: the speed of a node's network, in Gbit/s")
    ] = 100.0

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
    workers: Annotated[
        int | None, Field(ge=0, description="loader threads or processes of each rank; null: as in training")
    ] = None
    cache: Annotated[Text | None, Field(description="folder for a copy of a pack; null: as in training")] = None


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
    """The composed YAML as plain values. Raises ConfigError with the nearest key or choice, and where code would be run."""
    try:
        with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            _check_search_path(overrides)
            composed = hydra.compose(config_name, overrides, return_hydra_config=True)
            _refuse_code(OmegaConf.to_container(composed))
            own = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
            return OmegaConf.to_container(own, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(config_name, overrides, error)) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{mark.name.strip()}, line {mark.line + 1}" if mark else "a configuration file"
        raise ConfigError(f"{where}: not plain YAML ({error.problem})") from error


def defaults(config_name: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a configuration without overrides; what must be given is shown as ???."""
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        values = OmegaConf.to_container(hydra.compose(config_name), resolve=True)
    yield from flatten(values)


def parse(schema: type[Schema], values: dict[str, Any]) -> Schema:
    """Typed, checked and frozen. Raises ConfigError naming the key, the value and what is allowed."""
    known = sorted(key for key, *_ in walk(schema))
    for key, value in flatten(values):
        if not any(key == k or key.startswith(f"{k}.") or (value is None and k.startswith(f"{key}.")) for k in known):
            raise ConfigError(f"{key}={value}: no such key{near(key, known)}")
    try:
        return TypeAdapter(schema).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise ConfigError(first_problem(schema, error)) from None


def run(config_name: str, schema: type[Schema], task: Callable[[Schema], None]) -> None:
    """Entry point: compose, check, `task(config)`. A user's error is one line on stderr and exit status 2."""
    if config_name == "train":
        sys.argv[1:] = [ALIASES.get(argument, argument) for argument in sys.argv[1:]]
    arguments = sys.argv[1:]
    settle_ranks()
    if any(a in ("-h", "--help") for a in arguments):
        from vip.help import print_help  # needs this module

        print_help(config_name, schema)
        return
    if any(a.startswith("-") for a in arguments):
        _run_with_hydra(config_name, schema, task)
        return
    with one_line_errors():
        task(parse(schema, compose(config_name, arguments)))


def departures(config: RunConfig) -> list[str]:
    """Where `config` differs from the published recipe of its network: `key: published -> here`; empty off ImageNet."""
    recipe = f"{config.model.name}_imagenet"
    if config.data.kind != "imagenet" or not (CONF_DIR / "experiment" / f"{recipe}.yaml").exists():
        return []
    published = dict(flatten(dataclasses.asdict(parse(RunConfig, compose("train", [f"experiment={recipe}"])))))
    free: tuple[str, ...] = ("name", "runs_dir", "seed", "resume", "micro_batch", "keep", "data.", "tracking.")
    free += ("eval_every", "save_every", "log_every", "plan")
    return [
        f"{key}: {as_yaml(published.get(key))} -> {as_yaml(value)}"
        for key, value in flatten(dataclasses.asdict(config))
        if published.get(key) != value and not key.startswith(free)
    ]


def redacted(config: Any) -> dict[str, Any]:
    """A configuration as a plain dict for files and trackers, what looks like a secret replaced."""
    return redact(json.loads(json.dumps(dataclasses.asdict(config))))


def to_yaml(config: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(redacted(config)))


def _run_with_hydra(config_name: str, schema: type[Schema], task: Callable[[Schema], None]) -> None:
    given = sys.argv[1:]  # in a job on another node it is something else

    def job(composed: DictConfig) -> None:
        with one_line_errors():
            values: dict[str, Any] = OmegaConf.to_container(composed, resolve=True)  # type: ignore[assignment]
            swept = [item for item in HydraConfig.get().overrides.task if item not in given]
            if swept and "name" in values:
                values["name"] = "-".join([str(values["name"]), *(re.sub(r"[^\w.,=+-]", "_", item) for item in swept)])
            task(parse(schema, values))

    with one_line_errors():  # what Hydra itself says of a wrong key or value is many lines long
        for flag in (a for a in sys.argv[1:] if a.startswith("-") and a.partition("=")[0] not in HYDRA_FLAGS):
            raise ConfigError(f"{flag}: no such option; there are --help, {', '.join(HYDRA_FLAGS)}, and key=value")
        for job_overrides in _jobs([a for a in sys.argv[1:] if "=" in a and not a.startswith("-")]):
            parse(schema, compose(config_name, job_overrides))
    hydra.main(config_path=str(CONF_DIR), config_name=config_name, version_base="1.3")(job)()


def _jobs(overrides: list[str]) -> list[list[str]]:
    """The overrides of every job of a sweep; of a single run the only one."""
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        try:
            values = []
            for o in OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(overrides):
                if o.is_sweep_override() and not o.is_discrete_sweep():
                    raise ConfigError(f"{o.input_line}: a sweep takes a list of values, as in seed=1,2,3")
                swept = (
                    [f"{o.get_key_element()}={v}" for v in o.sweep_string_iterator()] if o.is_sweep_override() else []
                )
                values.append(swept or [str(o.input_line)])
        except HydraException as error:
            raise ConfigError(" ".join(str(error).split())) from error
    return [list(job) for job in itertools.product(*values)]


def _check_search_path(overrides: list[str]) -> None:
    """Folders only: Hydra would import a `pkg://` while it composes."""
    for item in overrides:
        if "searchpath" in item and not re.fullmatch(
            r"hydra\.searchpath=\[?file://[\w./-]+(,file://[\w./-]+)*\]?", item
        ):
            raise ConfigError(f"{item}: takes folders alone, as in hydra.searchpath=[file:///path/to/conf]")


def _refuse_code(composed: Any) -> None:
    """Raises ConfigError where Hydra would run what a configuration names: a file from elsewhere must not bring programs."""
    plugins = {f"{kind.__module__}.{kind.__qualname__}" for kind in Plugins.instance().discover()}
    for key, value in _targets(composed):
        if value not in plugins:
            raise ConfigError(
                f"{key}={value}: a configuration may not name code to run; only Hydra's own and its installed plugins"
            )
    for key, allowed in HYDRA_HANDS.items():
        node = composed["hydra"]
        for part in key.split("."):
            node = node.get(part)
        if node != allowed:
            raise ConfigError(
                f"hydra.{key}={as_yaml(node)}: must stay {as_yaml(allowed)}; Hydra would call or set what it names"
            )


def _targets(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every `_target_`, in lists too."""
    for name, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        inner = f"{key}.{name}" if key else str(name)
        if name == "_target_":
            yield inner, value
        yield from _targets(value, inner)


def _one_line(config_name: str, overrides: list[str], error: Exception) -> str:
    """Hydra's messages, many lines long, as one that names the key and the nearest one."""
    text = str(error)
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        if (group, choice) == ("precision", "apex"):
            return (
                "precision=apex: apex has no amp any more, mixed precision is torch's own; take precision=fp16 or bf16"
            )
        return f"{group}={choice}: no such choice{near(choice, error.options)}; there are {', '.join(sorted(error.options))}"
    unknown = re.search(r"Could not override '([^']+)'", text)
    if isinstance(error, ConfigCompositionException) and unknown:
        key = unknown[1]
        given = next((item for item in overrides if item.lstrip("+~").startswith(f"{key}=")), key)
        groups = sorted(path.name for path in CONF_DIR.iterdir() if path.is_dir())
        keys = [k for k, *_ in walk(RunConfig if config_name == "train" else EvalConfig)]
        return f"{given}: no such key{near(key, [*keys, *groups])}"
    missing = re.search(r"Missing mandatory value: (\S+)", text)
    if missing:
        return f"{missing[1]}: must be given ({missing[1]}=...)"
    return " ".join(text.split())
