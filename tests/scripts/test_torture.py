"""Small versions of the figures of scripts/torture.py: the same faults, caused for real, a few times each."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scripts.faults import damage, disk, images, resume, storm
from scripts.faults.launch import ROOT, UnavailableError
from scripts.torture import FIGURES
from tests.conftest import Run

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("torture")]


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_every_step_boundary_and_resumed_every_checkpoint_has_the_same_bits(
    tmp_path: Path, processes: int
) -> None:
    numbers = resume.sweep(5, tmp_path, worlds=(processes,))
    assert numbers == {"wanted": 4, "boundaries": 4, "differing": 0}


def test_a_storm_of_kills_ends_where_an_undisturbed_run_does(tmp_path: Path) -> None:
    numbers = storm.storm(6, tmp_path, steps=16)
    assert FIGURES["storm"].holds({**numbers, "count": 6}), numbers


def test_a_signal_stops_a_run_without_a_lost_step(tmp_path: Path) -> None:
    numbers = storm.signals(4, tmp_path)
    assert FIGURES["signals"].holds({**numbers, "count": 4}), numbers
    assert numbers["max_s"] < 30, "torchrun kills what takes longer"


def test_a_damaged_checkpoint_is_never_taken_and_the_one_before_is(tmp_path: Path) -> None:
    numbers = damage.damage(60, tmp_path)
    assert FIGURES["damage"].holds({**numbers, "count": 60}), numbers
    assert all(numbers[kind.__name__] == 12 for kind in damage.DAMAGES)


def test_a_disk_that_fills_up_during_a_save_costs_that_save_alone(tmp_path: Path) -> None:
    try:
        numbers = disk.full(5, tmp_path)
    except UnavailableError as error:
        pytest.skip(str(error))
    assert FIGURES["full"].holds({**numbers, "count": 5}), numbers


def test_how_long_a_save_keeps_training_waiting_is_measured_and_judged(tmp_path: Path) -> None:
    """How fast this machine is, is no test; that training does not wait for the disk is one of tests/test_checkpoint.py."""
    numbers = dict(disk.save(3, tmp_path, network="vip_s7"))
    assert numbers["megabytes"] > 300
    assert FIGURES["save"].holds({**numbers, "max_s": 0.3})
    assert not FIGURES["save"].holds({**numbers, "max_s": 0.31})


def test_damaged_images_are_decoded_or_refused() -> None:
    found = images.fuzz_decoder(500, seed=1)
    assert found.decoded + found.bad == 500
    assert min(found.decoded, found.bad) > 50, "both kinds were met"


def test_the_comparison_sees_one_bit_and_the_sign_of_zero() -> None:
    changes: list[Callable[[torch.Tensor], object]] = [
        lambda weight: weight.view(torch.int32)[3, 3].bitwise_xor_(1),
        lambda weight: weight[0, 0].neg_(),
        lambda weight: weight[1, 1].fill_(torch.nan),
    ]
    one, other = damage.training_state(1), damage.training_state(1)
    for state in (one, other):
        state["ema"]["head.weight"][0, 0] = 0.0
    assert resume.differing_leaves(one, other) == []
    for change in changes:
        change(other["ema"]["head.weight"])
        assert resume.differing_leaves(one, other) == ["/ema/head.weight"]
        change(one["ema"]["head.weight"])
        assert resume.differing_leaves(one, other) == []


SLEEPER = """
import sys, time
from pathlib import Path
from scripts.faults import launch
if __name__ == "__main__":
    launch.PRELOADED = []
    run = launch.Launch((), Path(sys.argv[1]), processes=2, script=Path(sys.argv[2]))
    print(*run.pids, flush=True)
    time.sleep(100)
"""


def test_launched_processes_die_with_the_script_that_launched_them(tmp_path: Path) -> None:
    (tmp_path / "sleep.py").write_text("import time\ntime.sleep(100)\n")
    (tmp_path / "launch.py").write_text(SLEEPER)
    command = [sys.executable, str(tmp_path / "launch.py"), str(tmp_path), str(tmp_path / "sleep.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as script:
        assert script.stdout is not None
        pids = [int(pid) for pid in script.stdout.readline().split()]
        time.sleep(1)
        alive = [Path(f"/proc/{pid}").exists() for pid in pids]
        script.send_signal(signal.SIGKILL)
    assert alive == [True, True]
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_command_prints_a_table_or_json_and_says_in_one_line_what_it_cannot(run: Run, tmp_path: Path) -> None:
    done = run("scripts/torture.py", "damage", "--count", "10", "--json", "--folder", str(tmp_path / "out"))
    row = json.loads(done.stdout)
    assert (row["figure"], row["passed"], row["reached"]["damaged"]) == ("damage", True, 10)
    assert "1,000 damaged checkpoints" in run("scripts/torture.py", "damage", "--count", "5").stdout
    for arguments, words in (
        (("damage", "--folder", str(tmp_path / "out")), "out/damage: is there already"),
        (("flood",), "flood: no such figure; there are sweep, storm"),
        (("damage", "--count", "0"), "--count 0: must be at least 1"),
    ):
        refused = run("scripts/torture.py", *arguments, status=2)
        assert words in refused.stderr
        assert refused.stderr.count("\n") == 1
