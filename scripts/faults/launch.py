"""Real runs of the real scripts, many of them: forked from a server that has imported the libraries, so a start costs 1 s.

    with Launch(("experiment=digits", "name=x"), cwd, processes=2) as launch:
        launch.kill(0, signal.SIGTERM)
        statuses = launch.wait()

Ranks get the environment that torchrun would give them. All of them are killed at the end of the block, and die with the
process that launched them, however that ends.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

from data.parent import die_with_parent

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = ["timm", "torchvision", "hydra", "wandb", "sklearn.datasets", "vip.config", "data.loader"]
HANGS_S = 120.0  # what takes longer is taken to hang
HIDDEN = ("IMAGENET_DIR", "WANDB_API_KEY", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

Numbers = Mapping[str, float | str]
"""What a measurement found, by name."""


class UnavailableError(Exception):
    """This machine cannot cause the fault; the text says why."""


class Launch:
    """`script arguments...` as `processes` processes in `cwd`, started at once; more than one are the ranks of one run.

    What they print, all of it, goes to the file `launch.txt` in `cwd`. They see no GPU: the bits of many runs are compared.
    """

    def __init__(
        self, arguments: Sequence[str], cwd: Path, processes: int = 1, script: Path = ROOT / "train.py"
    ) -> None:
        cwd.mkdir(parents=True, exist_ok=True)
        self.arguments = tuple(arguments)
        self.log = cwd / "launch.txt"
        self.log.write_text("")
        shared = environment()
        if processes > 1:
            shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        server = _server()
        self.started = time.monotonic()
        self.ranks = []
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            settings = shared | own
            self.ranks.append(server.Process(target=_main, args=(script, self.arguments, cwd, settings, self.log)))
            self.ranks[-1].start()

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def pids(self) -> list[int]:
        """By rank."""
        return [rank.pid or 0 for rank in self.ranks]

    @property
    def running(self) -> bool:
        """Whether all of its processes still run."""
        return all(rank.is_alive() for rank in self.ranks)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, timeout: float = HANGS_S) -> list[int]:
        """Exit statuses by rank, -9 for one that was killed. Raises RuntimeError, and kills all, where one still runs."""
        deadline = time.monotonic() + timeout
        for rank in self.ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        if any(rank.is_alive() for rank in self.ranks):
            self.stop()
            raise RuntimeError(f"{' '.join(self.arguments)} still ran after {timeout:g} s:\n{self.output}")
        return [rank.exitcode if rank.exitcode is not None else 0 for rank in self.ranks]

    def kill(self, rank: int | None = None, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to one rank, or to all of them at once; those that have ended do not mind."""
        for process in self.ranks if rank is None else [self.ranks[rank]]:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):  # it has ended since
                    os.kill(process.pid or 0, number)

    def stop(self) -> list[int]:
        """Kill all that is left of it; exit statuses by rank."""
        self.kill()
        for rank in self.ranks:
            rank.join()
        return [rank.exitcode if rank.exitcode is not None else 0 for rank in self.ranks]

    def wait_until(self, condition: Callable[[], bool], period: float = 0.002) -> bool:
        """Wait for a condition; False where a process ends before it is met. Raises RuntimeError as `wait` does."""
        deadline = time.monotonic() + HANGS_S
        while not condition():
            if not self.running:
                return condition()
            if time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"{' '.join(self.arguments)} made no progress in {HANGS_S:g} s:\n{self.output}")
            time.sleep(period)
        return True


def environment() -> dict[str, str]:
    """This process's own, without what would change a run."""
    shown = {
        key: value for key, value in os.environ.items() if key not in HIDDEN and not key.startswith("TORCHELASTIC")
    }
    return shown | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200", "PYTHONFAULTHANDLER": "1"}


def _server() -> ForkServerContext:
    """One server for all launches of this process, once it has imported everything; it ends when this process does."""
    os.environ["OMP_NUM_THREADS"] = "1"  # it must be there before the server imports torch
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    first = context.Process(target=int)
    first.start()
    first.join()
    return context


def _main(script: Path, arguments: Sequence[str], cwd: Path, env: dict[str, str], log: Path) -> None:
    """The forked process: becomes `python script arguments...`."""
    die_with_parent()
    # The server ends when nobody holds this any more: the process that launched it alone is to decide.
    os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    sys.stdout, sys.stderr = (os.fdopen(standard, "w", buffering=1, closefd=False) for standard in (1, 2))
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
