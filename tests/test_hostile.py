"""Hostile files, settings and names are refused in one line and run nothing; the same ones, taken naively, do run."""

import io
import os
import sys
import tarfile
from pathlib import Path

import hydra
import pytest
import torch
import yaml

from scripts.faults import hostile, hostile_files
from scripts.faults.hostile import ATTEMPTS, attack, attempt
from tests.conftest import Run
from vip import config


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, on formats of old
@pytest.mark.parametrize("name", ATTEMPTS)
def test_what_is_hostile_is_refused_in_one_line_and_runs_nothing(name: str, tmp_path: Path) -> None:
    result = attempt(name, tmp_path)
    assert result.harmless, result


def test_the_list_is_long_and_its_own_judge_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(ATTEMPTS) >= 30
    taken = {
        "taken": lambda work, canary: None,
        "ran": lambda work, canary: (canary.touch(), int("x")),
        "traceback": lambda work, canary: [][0],
        "two_lines": lambda work, canary: _raise("a\nb"),
        "refused": lambda work, canary: _raise("no"),
    }
    monkeypatch.setattr(hostile, "ATTEMPTS", taken)
    assert {result.name: result.harmless for result in attack(tmp_path)} == {name: name == "refused" for name in taken}


def _raise(text: str) -> None:
    raise ValueError(text)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [name for name in hostile_files.PICKLES if name != "torchscript"])
def test_the_pickles_are_live(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "script", raising=False)
    path = hostile_files.PICKLES[name](tmp_path, tmp_path / "canary")
    try:
        unnamed = io.BytesIO(path.read_bytes())  # newer versions heed the name's suffix
        torch.load(unnamed if path.suffix == ".safetensors" else path, weights_only=False)
    except Exception as error:  # after the call, which is all that matters
        print(error)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "name", [name for name in hostile_files.MEMBERS if name not in ("hardlink_from", "line_break")]
)
def test_the_tars_are_live(name: str, tmp_path: Path) -> None:
    if name == "device" and os.geteuid():
        pytest.skip("only root makes devices")
    (tmp_path / "work" / "out").mkdir(parents=True)
    path = hostile_files.tar(tmp_path / "work" / "x.tar", hostile_files.MEMBERS[name], tmp_path / "canary")
    with tarfile.open(path) as file:
        file.extractall(tmp_path / "work" / "out", filter="fully_trusted")
    assert os.path.lexists(tmp_path / "canary")


def test_the_yaml_tags_are_live(tmp_path: Path) -> None:
    yaml.unsafe_load(hostile.YAML_TAG.replace("CANARY", str(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def test_hydra_alone_would_call_what_a_callback_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = ["+hydra.callbacks.evil._target_=os.mkdir", f"+hydra.callbacks.evil.path={tmp_path / 'canary'}"]
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "seed=1", f"runs_dir={tmp_path}", *callback])
    hydra.main(config_path=str(config.CONF_DIR), config_name="train", version_base="1.3")(lambda composed: None)()
    assert (tmp_path / "canary").exists()


def test_the_command_line_refuses_a_callback_before_anything_is_written(run: Run, tmp_path: Path) -> None:
    refused = run(
        "train.py", "-m", "seed=1,2", "+hydra.callbacks.x._target_=os.mkdir", "+hydra.callbacks.x.path=y", status=2
    )
    assert refused.stderr.startswith("train.py: error: hydra.callbacks.x._target_=os.mkdir: ")
    assert refused.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_cannot_have_a_launcher_run_shell_commands() -> None:
    pytest.importorskip("submitit")
    overrides = ["hydra/launcher=submitit_slurm", "hydra.launcher.setup=[touch CANARY]"]
    with pytest.raises(config.ConfigError, match=r"hydra.launcher.setup=.*touch CANARY.*: must stay null"):
        config.compose("train", overrides)
    config.compose("train", overrides[:1])
