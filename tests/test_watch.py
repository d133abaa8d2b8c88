"""Ranks that hang or die, for real: processes of their own, stopped or killed; the others name them."""

import multiprocessing
import os
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest

from vip import distributed, watch
from vip.distributed import PeerError, connect

pytestmark = pytest.mark.xdist_group("watch")
TIMEOUT_S = 4.0  # in place of STEP_TIMEOUT's 100


def rank_alone(port: int, folder: Path) -> None:
    os.environ.update(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    distributed.START_TIMEOUT = timedelta(seconds=TIMEOUT_S)
    try:
        with connect():
            pass
    except PeerError as error:
        (folder / "said").write_text(str(error))
        os._exit(1)


def test_a_rank_that_never_comes_is_one_line(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=rank_alone, args=(free_port(), tmp_path))
    process.start()
    process.join(60)
    said = (tmp_path / "said").read_text()
    assert said.startswith("rank 0 found no way to the other 1 (")
    assert "\n" not in said
    assert "127.0.0.1:" in said


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def rank_of_three(rank: int, port: int, victim: int, number: signal.Signals, folder: Path) -> None:
    """Three steps, then `victim` gets the signal; what the others learn goes to `said_<rank>`."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="3", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    distributed.STEP_TIMEOUT = timedelta(seconds=TIMEOUT_S)
    watch.STACK_AFTER_S = TIMEOUT_S / 2
    began = time.monotonic()
    try:
        with connect() as world, watch.Watch(world, folder) as watcher:
            for step in range(6):
                watcher.step()
                if step == 3 and rank == victim:
                    os.kill(os.getpid(), number)
                began = time.monotonic()
                world.ask(False).result()
    except PeerError as error:
        (folder / f"said_{rank}").write_text(f"{time.monotonic() - began:.1f}\n{error}")
        os._exit(1)


def launch(victim: int, number: signal.Signals, folder: Path) -> dict[int, tuple[float, str]]:
    """Seconds of waiting and the message of each rank but the victim."""
    port, context = free_port(), multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank_of_three, args=(rank, port, victim, number, folder)) for rank in range(3)]
    for process in ranks:
        process.start()
    for rank, process in enumerate(ranks):
        if rank != victim:
            process.join(60)
    ranks[victim].kill()
    ranks[victim].join()
    said = {}
    for rank in set(range(3)) - {victim}:
        seconds, message = (folder / f"said_{rank}").read_text().split("\n")
        said[rank] = (float(seconds), message)
    return said


@pytest.mark.parametrize("victim", [1, 2])
def test_a_rank_that_hangs_is_named(tmp_path: Path, victim: int) -> None:
    said = launch(victim, signal.SIGSTOP, tmp_path)
    for seconds, message in said.values():
        assert message.startswith(f"rank {victim} ({socket.gethostname()}, pid ")
        assert "gave no sign of life in time" in message
        assert "goes on from the newest checkpoint" in message
        assert TIMEOUT_S <= seconds < TIMEOUT_S + 10
    for rank in said:
        assert (tmp_path / f"hang/flight_rank_{rank}.pkl").stat().st_size > 0
        assert "result" in (tmp_path / f"hang/stack_rank_{rank}.txt").read_text()


def test_a_rank_0_that_hangs_is_named(tmp_path: Path) -> None:
    """It keeps the store that the ranks meet in, where torchrun does not."""
    for _, message in launch(0, signal.SIGSTOP, tmp_path).values():
        assert message.startswith("rank 0")


def test_a_rank_that_dies_is_named_at_once(tmp_path: Path) -> None:
    for seconds, message in launch(1, signal.SIGKILL, tmp_path).values():
        assert message.startswith("rank 1 (")
        assert "has ended or hangs" in message
        assert seconds < 10
