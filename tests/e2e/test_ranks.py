"""Two ranks of a real torchrun: rank 0 alone speaks, and what goes wrong on the other one says where it comes from."""

import re
import sys
from pathlib import Path

import pytest

from tests.conftest import run_launch

pytestmark = pytest.mark.e2e

SCRIPT = '''
"""A program with the entry point of train.py, of which every rank has much to say and rank 1 a bug."""

import logging
import threading
import time
import warnings

import torch

from vip.config import RunConfig, run
from vip.distributed import connect


def task(config: RunConfig) -> None:
    with connect() as world:
        warnings.warn(f"a warning of rank {world.rank}")
        logging.getLogger("library").warning("a library's warning of rank %d", world.rank)
        logging.getLogger("torch._dynamo").warning("a compiler's warning of rank %d", world.rank)
        logging.getLogger("library").error("a library's error of rank %d", world.rank)
        logging.getLogger("data.workers").warning("a fault survived by rank %d", world.rank)
        thread = threading.Thread(target=lambda: torch.zeros(world.rank).sum().item() / world.rank / 0, name="speaker")
        thread.start()
        thread.join()
        world.sum(torch.ones(1))
        if world.rank == 1:
            raise RuntimeError("a bug of rank 1")
        time.sleep(60)  # until torchrun ends it


run("train", RunConfig, task)
'''


def test_rank_0_alone_speaks_and_faults_of_others_say_whose_they_are(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = run_launch([*launch, "experiment=digits"], tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    for words in ("a warning", "a library's warning", "a compiler's warning", "a library's error", "a fault survived"):
        heard = {rank: re.findall(rf"^(.*){words} (?:of|by) rank {rank}$", said, re.MULTILINE) for rank in (0, 1)}
        assert len(heard[0]) == 1, said
        assert heard[1] == (["[rank 1] "] if words in ("a library's error", "a fault survived") else []), said
    for rank, error in ((0, "ZeroDivisionError: float division by zero"), (1, "RuntimeError: a bug of rank 1")):
        trace = re.findall(rf"^\[rank {rank}\] (.*)$", said, re.MULTILINE)
        assert "Traceback (most recent call last):" in trace
        assert error in trace
    assert sum("Traceback" in line and not line.startswith("[rank") for line in said.splitlines()) <= 1, (
        "torchrun's own"
    )
    assert "[rank1]" not in said, "torch's own prefix, beside ours"
