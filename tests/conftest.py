"""Shared by all tests: the real command lines, and the digits tree that they run on."""

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; scripts/launch.sh sets it too
# Else inductor tries what the CPU's flags promise: a new Python that imports torch for each, in each process that compiles.
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"

from scripts.faults.launch import Launch

ROOT = Path(__file__).resolve().parents[1]
HANGS = 130  # seconds after which a launch of two or three processes hangs
Run = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest group first: begun last, it would keep one worker while the other has nothing left."""
    items.sort(key=lambda item: "tests/slurm" not in item.nodeid)


def command(script: str, *arguments: str, processes: int = 0) -> list[str]:
    """`python script` for 0 processes, else torchrun with that many."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, str(ROOT / script), *arguments]


def environment() -> dict[str, str]:
    hidden = {"IMAGENET_DIR", "WANDB_API_KEY", "RANK", "WORLD_SIZE", "LOCAL_RANK"}
    return {k: v for k, v in os.environ.items() if k not in hidden} | {"COLUMNS": "200", "PYTHONFAULTHANDLER": "1"}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a script of the project in an empty folder and returns what it printed; fails on another exit status.

    It is the same as `python script`, or as torchrun's ranks where there are `processes` (both streams are one then), but
    forked from a server process that has imported the libraries already: imports cost more than most of these runs.
    """

    def run(script: str, *arguments: str, processes: int = 0, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = (
            run_ranks(script, arguments, processes, tmp_path) if processes else _run_forked(script, arguments, tmp_path)
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done

    return run


def run_ranks(script: str, arguments: tuple[str, ...], processes: int, cwd: Path) -> subprocess.CompletedProcess[str]:
    with Launch(arguments, cwd, processes, ROOT / script) as launch:
        status = max(launch.wait(), key=abs)
    log = cwd / "launch.txt"
    said = log.read_text()
    log.unlink()
    return subprocess.CompletedProcess([script, *arguments], status, said, said)


def run_launch(launch: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; one that hangs is tried once more, and a warning shows the stacks of all its processes."""
    for attempt in (1, 2):
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            launched = subprocess.Popen(launch, cwd=cwd, env=environment(), stdout=stdout, stderr=stderr, text=True)
            try:
                launched.wait(HANGS)
            except subprocess.TimeoutExpired:
                for process in Path("/proc").glob("[0-9]*"):
                    with contextlib.suppress(OSError):
                        if (process / "cwd").readlink() == cwd:
                            os.kill(int(process.name), signal.SIGABRT)  # faulthandler shows where it stands
                launched.wait(20)
            stdout.seek(0)
            stderr.seek(0)
            done = subprocess.CompletedProcess(launch, launched.returncode, stdout.read(), stderr.read())
        if done.returncode != -signal.SIGABRT:
            break
        warnings.warn(f"attempt {attempt} of {' '.join(launch)} hung:\n{done.stdout}\n{done.stderr}", stacklevel=2)
    return done


def _run_forked(script: str, arguments: tuple[str, ...], cwd: Path) -> subprocess.CompletedProcess[str]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["timm", "torchvision", "hydra", "wandb", "sklearn.datasets", "vip.config", "data.loader"]
    )
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / "stdout", Path(folder) / "stderr"]
        process = context.Process(target=_main, args=(str(ROOT / script), arguments, cwd, environment(), outputs))
        process.start()
        process.join(280)
        assert process.exitcode is not None, f"{script} {' '.join(arguments)} still runs after 280 s"
        stdout, stderr = (path.read_text() for path in outputs)
        return subprocess.CompletedProcess([script, *arguments], process.exitcode, stdout, stderr)


def _main(script: str, arguments: tuple[str, ...], cwd: Path, env: dict[str, str], outputs: list[Path]) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for descriptor, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits tree, written once."""
    from data.digits import prepare_digits

    root = tmp_path_factory.mktemp("datasets") / "digits"
    prepare_digits(root)
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """The folder of a short run on the digits with averaged weights, on two processes; tests only read it."""
    cwd = tmp_path_factory.mktemp("trained")
    arguments = (
        "experiment=digits",
        f"data.root={digits}",
        "epochs=2",
        "schedule.warmup_epochs=1",
        "ema_decay=0.9",
        "name=short",
    )
    done = run_ranks("train.py", arguments, 2, cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    (cwd / "stdout.txt").write_text(done.stdout)
    return cwd / "runs" / "short"
