"""Files, settings and names that someone else may hand to this program, each of which would like to run something.

Every attempt goes through the program's own way in (reading of weights and checkpoints, unpacking, the command line). Its
program would create a file, the canary, outside the folder that it is given. Files of pickles, tars and headers are made in
hostile_files.py.
"""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.faults import hostile_files as files
from scripts.prepare.archives import train_parts, val_parts
from scripts.prepare.images import Part
from scripts.prepare.work import do_part
from vip import checkpoint, config
from vip.config import EvalConfig, RunConfig
from vip.models.build import ModelConfig, build_model
from vip.models.weights import unwrap_state_dict
from vip.stochastic_depth import StochasticDepthConfig

Attempt = Callable[[Path, Path], object]
"""Puts a payload into a folder (its first argument) and lets the program have it; the second one is the canary's path."""


@dataclass(frozen=True)
class Result:
    """What came of one payload: the program's words, and whether it was refused in one line and no canary is there."""

    name: str
    refused_with: str
    harmless: bool


def attack(folder: Path) -> list[Result]:
    """Try every payload, each in a folder of its own under `folder`."""
    return [attempt(name, folder) for name in ATTEMPTS]


def attempt(name: str, folder: Path) -> Result:
    """Try one payload. An error that is not meant for users is no refusal, and is told as one that does harm."""
    work, canary = folder / f"{name}_work", folder / f"{name}_canary"
    work.mkdir(parents=True)
    try:
        ATTEMPTS[name](work, canary)
        return Result(name, "nothing: it was taken", False)
    except (ValueError, OSError) as error:
        said = str(error)
    except Exception as error:
        return Result(name, f"a traceback: {type(error).__name__}: {error}", False)
    return Result(name, said, not canary.exists() and bool(said) and "\n" not in said)


def _weights(make: Callable[[Path, Path], Path]) -> Attempt:
    """Offered as published weights, as `eval.py checkpoint=` and `weights=` read them."""

    def try_it(work: Path, canary: Path) -> None:
        path = make(work, canary)
        if checkpoint.is_ours(path):
            checkpoint.read(path)
        unwrap_state_dict(checkpoint.read_weights(path))

    return try_it


def _checkpoint(make: Callable[[Path], Path]) -> Attempt:
    """Offered as a checkpoint to go on from; only a CheckpointError will do."""

    def try_it(work: Path, canary: Path) -> None:
        path = make(work)
        try:
            checkpoint.read(path)
        except checkpoint.CheckpointError:
            raise
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__} instead of a CheckpointError: {error}") from error

    return try_it


def _train_archive(add: files.Members, nested: bool = False) -> Attempt:
    """Offered to prepare_imagenet.py as the training archive, or as the archive of a class inside it."""

    def try_it(work: Path, canary: Path) -> None:
        _prepare(train_parts(files.tar(work / "train.tar", add, canary, nested), {"n01440764": 1}), work)

    return try_it


def _val_archive(add: files.Members) -> Attempt:
    def try_it(work: Path, canary: Path) -> None:
        _prepare(val_parts(files.tar(work / "val.tar", add, canary), ["n01440764"] * 3), work)

    return try_it


def _prepare(parts: Sequence[Part], work: Path) -> None:
    (work / "out" / "parts").mkdir(parents=True)
    for part in parts:
        do_part(part, work / "out", writes=True)


def _command(*arguments: str, experiment: str = "", name: str = "train") -> Attempt:
    """A command line, where CANARY stands for the canary's path; `experiment` is the text of a configuration file to choose."""

    def try_it(work: Path, canary: Path) -> None:
        given = [item.replace("CANARY", str(canary)) for item in arguments]
        if experiment:
            (work / "experiment").mkdir()
            text = experiment.replace("CANARY", str(canary))
            (work / "experiment" / "evil.yaml").write_text(f"# @package _global_\n{text}")
            given += [f"hydra.searchpath=[file://{work}]", "experiment=evil"]
        _run([*given, f"runs_dir={work}"] if name == "train" else given, name)

    return try_it


def _run(arguments: Sequence[str], name: str) -> None:
    """The command line in this process, up to where training would begin. Raises ValueError with the words on stderr."""
    schema: type[Any] = RunConfig if name == "train" else EvalConfig
    before, sys.argv = sys.argv, [f"{name}.py", *arguments]
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
            config.run(name, schema, lambda run: None)
    except SystemExit:
        raise ValueError(said.getvalue().removesuffix("\n")) from None
    finally:
        sys.argv = before


def _network(model_name: str) -> Attempt:
    """A network's name from a configuration or a checkpoint; to look anything up in a network counts as the canary."""

    def try_it(work: Path, canary: Path) -> None:
        local = model_name.replace("WORK", str(files.hub_folder(work, canary)))
        with _watched_sockets(canary):
            build_model(ModelConfig(local, StochasticDepthConfig(**DROP_PATH)), 10)

    return try_it


def _saved_config(**model: Any) -> Attempt:
    """A checkpoint that is whole, and whose configuration eval.py takes the network from."""

    def try_it(work: Path, canary: Path) -> None:
        path = work / checkpoint.STEP_FILE.format(1)
        checkpoint.write(path, {"step": 1, "config": {"model": model}})
        saved = checkpoint.read(path).state["config"]["model"]
        with _watched_sockets(canary):
            build_model(config.parse(ModelConfig, saved), 10)

    return try_it


_watching: list[Path] = []


@contextlib.contextmanager
def _watched_sockets(canary: Path) -> Iterator[None]:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if _watching and event in ("socket.connect", "socket.getaddrinfo"):
            _watching[0].touch()

    if not getattr(_watched_sockets, "hooked", False):  # Python cannot take a hook away again
        sys.addaudithook(hook)
        _watched_sockets.hooked = True  # type: ignore[attr-defined]
    _watching.append(canary)
    try:
        yield
    finally:
        _watching.clear()


DROP_PATH: dict[str, Any] = {"rate": 0.0, "over_depth": "linear", "over_training": "constant", "switch_at": 0.5}
CALLBACK = "hydra:\n  callbacks:\n    evil: {_target_: os.mkdir, path: CANARY}\n"
HANDLERS = "{evil: {class: logging.FileHandler, filename: CANARY}}"
LOGGING = f"hydra:\n  job_logging:\n    root: {{handlers: [evil]}}\n    handlers: {HANDLERS}\n"
PARAMS = "hydra:\n  sweeper:\n    params: {'hydra.launcher._target_': 'os.mkdir,os.mkdir'}\n"
NESTED = "hydra:\n  launcher:\n    more: [{_target_: os.mkdir, path: CANARY}]\n"
YAML_TAG = "epochs: !!python/object/apply:os.system ['touch CANARY']\n"
YAML_NEW = "epochs: !!python/object/new:os.system ['touch CANARY']\n"
YAML_NAME = "epochs: !!python/name:os.system\n"
CORE = "hydra._internal.core_plugins.basic_launcher"

ATTEMPTS: dict[str, Attempt] = {
    **{f"pickle_{name}": _weights(make) for name, make in files.PICKLES.items()},
    **{f"checkpoint_{name}": _checkpoint(make) for name, make in files.HEADERS.items()},
    **{f"train_tar_{name}": _train_archive(add) for name, add in files.MEMBERS.items()},
    **{f"class_tar_{name}": _train_archive(add, nested=True) for name, add in files.MEMBERS.items()},
    **{f"val_tar_{name}": _val_archive(add) for name, add in files.MEMBERS.items()},
    "target_in_key": _command("+model._target_=os.system", "+model.command=touch CANARY"),
    "target_at_top": _command("+_target_=os.system", "+command=touch CANARY"),
    "target_in_eval": _command("checkpoint=x", "+data._target_=os.mkdir", "+data.path=CANARY", name="eval"),
    "target_in_experiment": _command(experiment="model: {_target_: os.mkdir, path: CANARY}\n"),
    "callback": _command("+hydra.callbacks.evil._target_=os.mkdir", "+hydra.callbacks.evil.path=CANARY"),
    "callback_in_sweep": _command("-m", "seed=1,2", "+hydra.callbacks.evil._target_=os.mkdir",
                                  "+hydra.callbacks.evil.path=CANARY"),
    "callback_in_experiment": _command(experiment=CALLBACK),
    "callback_in_swept_experiment": _command("-m", "seed=1,2", experiment=CALLBACK),
    "launcher": _command("-m", "seed=1,2", "hydra.launcher._target_=os.mkdir", "+hydra.launcher.path=CANARY"),
    "launcher_of_second_job": _command("-m", f"hydra.launcher._target_={CORE}.BasicLauncher,os.mkdir"),
    "launcher_behind_hydras_name": _command("-m", "seed=1,2", f"hydra.launcher._target_={CORE}.Path.mkdir"),
    "launcher_argument": _command("-m", "seed=1,2", experiment=NESTED),
    "sweeper": _command("-m", "seed=1,2", "hydra.sweeper._target_=os.mkdir", "+hydra.sweeper.path=CANARY"),
    "sweeper_params": _command("-m", "seed=1,2", experiment=PARAMS),
    "logging_handler": _command("-m", "seed=1,2", experiment=LOGGING),
    "logging_by_key": _command("-m", "seed=1,2", f"+hydra.job_logging.handlers={HANDLERS.replace(': ', ':')}"),
    "environment": _command("-m", "seed=1,2", "+hydra.job.env_set.LD_PRELOAD=CANARY"),
    "rerun_of_a_pickle": _command("--experimental-rerun", "CANARY.pickle"),
    "another_conf": _command("-m", "--config-dir=CANARY", "seed=1,2"),
    "another_conf_abbreviated": _command("-m", "--config-d=CANARY", "seed=1,2"),
    "package_in_search_path": _command("hydra.searchpath=[pkg://antigravity]", "experiment=evil"),
    "package_in_search_path_escaped": _command(r"hydra.searchpath=[pkg\://antigravity]", "experiment=evil"),
    "yaml_apply": _command(experiment=YAML_TAG),
    "yaml_apply_in_sweep": _command("-m", "seed=1,2", experiment=YAML_TAG),
    "yaml_new": _command(experiment=YAML_NEW),
    "yaml_name": _command(experiment=YAML_NAME),
    "resolver": _command("name=${eval:__import__('os').system('touch CANARY')}"),
    "network_on_a_hub": _network("hf-hub:timm/resnet10t.c3_in1k"),
    "network_on_a_hub_underscore": _network("hf_hub:timm/resnet10t.c3_in1k"),
    "network_in_a_folder": _network("local-dir:WORK"),
    "network_of_a_path": _network("../../WORK"),
    "checkpoint_from_a_hub": _saved_config(name="hf-hub:timm/resnet10t.c3_in1k", drop_path=DROP_PATH),
    "checkpoint_with_a_target": _saved_config(name="vip_tiny", drop_path=DROP_PATH, _target_="os.mkdir"),
    "checkpoint_with_a_list": _saved_config(name=["vip_tiny"], drop_path={"_target_": "os.mkdir"}),
}  # fmt: skip
