"""scripts/doctor.py on set-ups that are sound and on some that are broken for real."""

import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from scripts.checks import planned
from scripts.checks.folder import run_folder
from scripts.checks.machine import has_kernels
from scripts.checks.row import Finding, Row, Setup, carry_out, merge, worst
from scripts.checks.wandb_server import wandb
from scripts.faults.blackhole import black_hole, refusing_url
from scripts.faults.disk import fill, small_disk
from scripts.faults.launch import Launch, UnavailableError
from tests.conftest import ROOT, Run
from vip.config import RunConfig, compose, parse
from vip.distributed import World

pytestmark = pytest.mark.e2e

SCRIPT = "scripts/doctor.py"
QUICK = "batch_size=8"
WITH_LIMIT = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
runpy.run_path({script!r}, run_name="__main__")
"""

WITHOUT_NATIVE = """
import dataclasses, json, sys
sys.path.insert(0, {path!r})
import torch
from scripts.checks import planned
from scripts.checks.row import Setup, carry_out
from vip.config import RunConfig, compose, parse
from vip.distributed import World
rows = []
for name in ("auto", "torch", "native"):
    run = parse(RunConfig, compose("train", ["experiment=digits", "data.decoder=" + name]))
    rows += carry_out([planned.decoder], Setup(run, World(0, 1, torch.device("cpu"))))
print(json.dumps([dataclasses.asdict(row) for row in rows]))
"""


def diagnose(run: Run, *arguments: str, status: int, script: str = SCRIPT) -> dict[str, list[dict[str, Any]]]:
    """What `doctor.py --json` says, rows by check."""
    done = run(script, "experiment=digits", *arguments, "--json", status=status)
    assert "Traceback" not in done.stderr
    return by_check(json.loads(done.stdout))


def by_check(said: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in said["rows"]:
        rows.setdefault(row["check"], []).append(row)
    statuses = {row["status"] for row in said["rows"]}
    assert said["status"] == next((s for s in ("error", "warning") if s in statuses), "ok")
    return rows


def setup(*overrides: str) -> Setup:
    return Setup(
        parse(RunConfig, compose("train", ["experiment=digits", *overrides])), World(0, 1, torch.device("cpu"))
    )


def test_a_sound_setup_has_no_error_and_nothing_is_left_behind(run: Run, tmp_path: Path, digits: Path) -> None:
    rows = diagnose(run, f"data.root={digits}", "runs_dir=new/runs", status=0)
    assert list(tmp_path.iterdir()) == []
    assert {row["status"] for found in rows.values() for row in found} <= {"ok", "skipped", "warning"}
    for check, words in {
        "data": "10 classes, 1,437 training and 360 validation images",
        "batch": "64 images a step = 1 process x 1 pass x 64; 880 steps",
        "network": "vip_tiny, 0.5 M parameters, 32x32, 10 classes",
        "software": f"torch {torch.__version__}",
        "run folder": "23.2 MB needed for the newest 2, the best and one being written",
    }.items():
        assert rows[check][0]["status"] == "ok"
        assert words in rows[check][0]["value"]
    for check in ("loader", "training"):
        assert float(rows[check][0]["value"].split()[0].replace(",", "")) > 0
    if not torch.cuda.is_available():
        assert [row["status"] for row in rows["gpu"]] == ["warning"]
        assert "CPU" in rows["gpu"][0]["value"]


@pytest.mark.parametrize(
    ("override", "check", "value", "remedy"),
    [
        ("precision=fp16", "precision", "needs a CUDA device, this is cpu", "take precision=fp32 or bf16"),
        ("optimizer=apex_adam", "optimizer", "apex with its CUDA kernels is not installed", "optimizer=adamw"),
        ("micro_batch=48", "batch", "64 images a rank", "micro_batch can be 1, 2, 4, 8, 16, 32, 64"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is wanted")
def test_what_train_would_refuse_is_an_error_with_the_remedy(
    run: Run, digits: Path, override: str, check: str, value: str, remedy: str
) -> None:
    rows = diagnose(run, f"data.root={digits}", override, status=1)
    (row,) = rows[check]
    assert row["status"] == "error"
    assert value in row["value"]
    assert remedy in f"{row['value']}; {row['remedy']}"
    others = [row for name, found in rows.items() if name != check for row in found]
    assert "error" not in {row["status"] for row in others}, "one error, said once"


def test_data_that_are_missing_are_named_and_the_rest_is_still_checked(run: Run, tmp_path: Path) -> None:
    rows = diagnose(run, "data=folder", f"data.root={tmp_path / 'nowhere'}", status=1)
    assert rows["data"][0]["status"] == "error"
    assert "nowhere/train not found" in rows["data"][0]["value"]
    assert rows["loader"][0]["status"] == rows["training"][0]["status"] == "skipped"
    assert rows["batch"][0]["status"] == rows["run folder"][0]["status"] == "ok"


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("a", "empty"):
            (tmp_path / split / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / split / "a" / "1.png")
    (row,) = carry_out([planned.data], setup("data=folder", f"data.root={tmp_path}"))
    assert row.status == "error"
    assert "train/empty has no images" in row.value


def test_imagenet_with_another_number_of_images_is_a_warning_with_the_difference(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "one.png")
    for split in ("train", "val"):
        for number in range(1000):
            folder = tmp_path / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            os.link(tmp_path / "one.png", folder / "1.png")
    (row,) = carry_out([planned.data], setup("data=imagenet", f"data.root={tmp_path}"))
    assert row.status == "warning"
    assert "1,280,167 fewer than ImageNet's 1,281,167 training images" in row.value
    assert "49,000 fewer than ImageNet's 50,000 validation images" in row.value


def test_a_decoder_that_was_not_built_is_a_warning_and_one_that_was_asked_for_an_error(tmp_path: Path) -> None:
    for package in ("data", "scripts", "vip"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    code = WITHOUT_NATIVE.format(path=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    by_itself, chosen, asked_for = json.loads(done.stdout)
    assert (by_itself["status"], by_itself["value"][:41]) == ("warning", "torch's, in processes: the native library")
    assert by_itself["remedy"].endswith("then make setup")
    assert (chosen["status"], chosen["value"]) == ("ok", "torch (data.decoder=torch)")
    assert asked_for["status"] == "error"
    assert asked_for["value"].startswith("data.decoder=native: the native library was not built")
    assert asked_for["remedy"] == "or set data.decoder=auto"


def test_a_run_folder_that_is_full_or_read_only_is_an_error(run: Run, tmp_path: Path, digits: Path) -> None:
    checks = (planned.data, planned.batch, planned.network, planned.optimizer, run_folder)
    try:
        with small_disk(tmp_path / "runs", 8_000_000) as disk:
            (row,) = diagnose(run, f"data.root={digits}", QUICK, status=1)["run folder"]
            assert "8.0 MB free, 23.2 MB needed" in row["value"]
            assert "runs_dir=" in row["remedy"]
            fill(disk, 0)
            row = carry_out(checks, setup(f"data.root={digits}", f"runs_dir={disk}"))[-1]
            assert (row.check, row.status) == ("run folder", "error")
            assert "No space left on device" in row.value
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            row = carry_out(checks, setup(f"data.root={digits}", f"runs_dir={disk}"))[-1]
            assert (row.status, row.remedy) == ("error", "choose another runs_dir=...")
            assert "Read-only file system" in row.value
    except UnavailableError as error:
        pytest.skip(str(error))


def test_a_run_folder_in_use_is_an_error_and_stays_as_it_is(tmp_path: Path, digits: Path) -> None:
    held = ["experiment=digits", f"data.root={digits}", "data.workers=0", "epochs=99"]
    with Launch(held, tmp_path) as launch:
        assert launch.wait_until(lambda: "│" in launch.output or "epoch" in launch.output)
        before = (tmp_path / "runs/digits/.lock").read_text()
        (row,) = carry_out([run_folder], setup(f"runs_dir={tmp_path / 'runs'}"))
        assert launch.running
    assert row.status == "error"
    assert f"in use by another run (host {socket.gethostname()}, pid {launch.pids[0]}" in row.value
    assert (tmp_path / "runs/digits/.lock").read_text() == before


def test_few_open_files_are_a_warning_with_the_command(run: Run, tmp_path: Path, digits: Path) -> None:
    script = tmp_path / "limited.py"
    script.write_text(WITH_LIMIT.format(script=str(ROOT / SCRIPT)))
    (row,) = diagnose(run, f"data.root={digits}", QUICK, status=0, script=str(script))["open files"]
    assert (row["status"], row["value"].split()[0]) == ("warning", "256")
    assert "ulimit -n 4096" in row["remedy"]


@pytest.fixture
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that holds keys, which is not there yet."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "netrc"


def test_a_wandb_server_that_never_answers_costs_5_s_and_is_a_warning(
    run: Run, no_login: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with black_hole() as url:
        monkeypatch.setenv("WANDB_BASE_URL", url.replace("//", "//me:hidden@"))
        rows = diagnose(run, f"data.root={digits}", QUICK, "tracking=wandb", status=0)
    assert [row["status"] for row in rows["wandb"]] == ["warning", "warning"]
    assert "no answer within 5 s" in rows["wandb"][0]["value"]
    assert "no key" in rows["wandb"][1]["value"]
    assert "hidden" not in json.dumps(rows)


def test_wandb_is_fine_with_any_answer_and_a_key_and_says_who_refused(
    no_login: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned_run = setup("tracking=wandb")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        no_login.write_text(f"machine 127.0.0.1\n  login user\n  password {'0' * 40}\n")
        (row,) = carry_out([wandb], planned_run)
        server.shutdown()
    assert (row.status, row.value) == ("ok", f"127.0.0.1:{server.server_port} answers")
    monkeypatch.setenv("WANDB_BASE_URL", refusing_url())
    assert "Connection refused" in carry_out([wandb], planned_run)[0].value
    monkeypatch.setenv("WANDB_BASE_URL", f"file://{no_login}")
    assert carry_out([wandb], planned_run)[0].status == "error"
    assert carry_out([wandb], setup("tracking=wandb", "tracking.mode=offline"))[0].status == "skipped"


def test_two_ranks_measure_their_all_reduce_and_print_one_table(tmp_path: Path, digits: Path) -> None:
    with Launch(("experiment=digits", f"data.root={digits}"), tmp_path, processes=2, script=ROOT / SCRIPT) as launch:
        assert launch.wait() == [0, 0], launch.output
    said = launch.output
    assert said.count("vip_tiny on digits") == 1
    assert "64 images a step = 2 processes x 1 pass x 32" in said
    speed = re.search(r"1\.9 MB over 2 ranks in [\d.]+ ms: ([\d.e-]+) GB/s", said)
    assert speed is not None, said
    assert float(speed[1]) > 0
    assert re.search(r"clocks +│ ok +│ within 0\.\d+ s", said)
    assert re.search(r"shared folder +│ ok", said)
    rows = [line.split("│") for line in said.splitlines() if line.startswith("│ ") and line[2] != " "]
    where = {row[1].strip(): row[-2].strip() for row in rows}
    assert where.pop("run folder") == f"rank 0 ({socket.gethostname()})"
    assert set(where.values()) == {"all"}
    assert [path.name for path in tmp_path.iterdir()] == ["launch.txt"]


def test_an_error_of_two_ranks_is_one_row_and_the_status_of_both(tmp_path: Path, digits: Path) -> None:
    arguments = ("experiment=digits", f"data.root={digits}", "batch_size=63", "--json")
    with Launch(arguments, tmp_path, processes=2, script=ROOT / SCRIPT) as launch:
        assert launch.wait() == [1, 1], launch.output
    rows = by_check(json.loads(launch.output[launch.output.index("{\n") :]))
    (row,) = rows["batch"]
    assert (row["status"], row["ranks"]) == ("error", [0, 1])
    assert "does not divide over 2 processes" in row["value"]
    assert rows["all reduce"][0]["status"] == "ok"


def test_a_rank_that_dies_is_named_in_the_table_of_the_others(tmp_path: Path, digits: Path) -> None:
    arguments = ("experiment=digits", f"data.root={digits}", "data.decoder=torch")  # the native one has no processes
    with Launch(arguments, tmp_path, processes=2, script=ROOT / SCRIPT) as launch:
        children = Path(f"/proc/{launch.pids[1]}/task/{launch.pids[1]}/children")
        assert launch.wait_until(lambda: bool(children.read_text()))  # its loader's worker
        launch.kill(1)
        assert launch.wait() == [1, -signal.SIGKILL], launch.output
    assert f"rank 1 ({socket.gethostname()}, pid {launch.pids[1]}) has ended or hangs" in launch.output
    assert launch.output.count("vip_tiny on digits") == 1
    assert "Traceback" not in launch.output


def test_what_differs_between_ranks_names_them_and_figures_are_spanned() -> None:
    software = [Row("ok", f"torch {version}", must_agree=True, check="software") for version in ("1", "1", "2")]
    loader = [Row("ok", "{} images/s", figure=figure, check="loader") for figure in (400.0, 380.4, 512.0)]
    full = Row("error", "full {}", "free some space", check="run folder")
    rows = [[software[0], full, loader[0]], [software[1], loader[1]], [software[2], loader[2]]]
    findings = merge(rows, ["a", "a", "b"])
    differ = "must be the same on all hosts"
    assert findings == [
        Finding("software", "error", "torch 1", differ, [0, 1], ["a"]),
        Finding("software", "error", "torch 2", differ, [2], ["b"]),
        Finding("run folder", "error", "full {}", "free some space", [0], ["a"]),
        Finding("loader", "ok", "380 to 512 images/s", "", [0, 1, 2], ["a", "b"]),
    ]
    assert worst(findings) == "error"
    assert worst(findings[3:]) == worst([]) == "ok"


def test_a_check_that_fails_itself_is_an_error_row_and_the_next_one_runs() -> None:
    def broken(setup: Setup) -> Iterator[Row]:
        yield Row("ok", "the first half")
        raise ZeroDivisionError("division by zero\nmore")

    def sound(setup: Setup) -> Iterator[Row]:
        yield Row("ok", "fine")

    patient = setup()
    rows = carry_out([broken, sound], patient)
    assert [(row.check, row.status) for row in rows] == [("broken", "ok"), ("broken", "error"), ("sound", "ok")]
    assert rows[1].value == "ZeroDivisionError: division by zero"
    assert patient.failed == {"broken"}


@pytest.mark.parametrize(
    ("capability", "kernels", "runs"),
    [
        ((7, 0), ["sm_70", "sm_75"], True),
        ((7, 0), ["sm_75", "sm_80", "compute_120"], False),
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80", "sm_90a"], True),
        ((10, 3), ["sm_100", "sm_120"], True),
        ((12, 1), ["sm_100f", "sm_120"], True),
        ((12, 1), ["sm_90a", "sm_120a"], False),
        ((13, 0), ["sm_120", "compute_120"], True),
        ((13, 0), ["sm_120"], False),
    ],
)
def test_a_gpu_that_the_wheel_has_no_kernels_for_is_known(
    capability: tuple[int, int], kernels: list[str], runs: bool
) -> None:
    assert has_kernels(capability, kernels) == runs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_loader_is_held_against_the_network(run: Run, digits: Path) -> None:
    rows = diagnose(run, f"data.root={digits}", "precision=fp16", status=0)
    assert rows["gpu"][0]["status"] in ("ok", "warning")
    assert "images/s a GPU" in rows["training"][0]["value"]
    assert "times what the network takes" in rows["training"][1]["value"]
