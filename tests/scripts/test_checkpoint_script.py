"""scripts/checkpoint.py on the checkpoints of a real run: what it says, what it refuses, and that eval.py takes its exports."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scripts.faults.launch import Launch
from tests.conftest import Run
from vip import checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("torture")]

SCRIPT = "scripts/checkpoint.py"


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """The folder of a run of 6 steps with averaged weights and checkpoints of steps 2, 4 and 6; tests only read it."""
    cwd = tmp_path_factory.mktemp("short")
    arguments = ("experiment=digits", f"data.root={digits}", "data.workers=0", "name=short", "max_steps=6", "ema_decay=0.5",
                 "save_every=2", "keep=9", "log_every=1")  # fmt: skip
    with Launch(arguments, cwd) as launch:
        assert launch.wait() == [0], launch.output
    return cwd / "runs/short"


@pytest.fixture
def folder(tmp_path: Path, short_run: Path) -> Path:
    """A copy of its checkpoints, to be damaged."""
    return Path(shutil.copytree(short_run / "checkpoints", tmp_path / "checkpoints"))


def step_file(folder: Path, step: int) -> Path:
    return folder / checkpoint.STEP_FILE.format(step)


def test_inspect_tells_what_the_newest_checkpoint_holds(run: Run, short_run: Path) -> None:
    newest = step_file(short_run / "checkpoints", 6)
    state = checkpoint.read(newest).state
    weights = state["model"]
    facts = json.loads(run(SCRIPT, "inspect", str(short_run), "--json").stdout)
    assert facts["file"] == str(newest)
    expected = {"step": 6, "model": "vip_tiny", "classes": 10, "precision": "fp32", "world_size": 1, "batch_size": 64}
    assert {key: facts[key] for key in expected} == expected
    assert facts["epoch"] == round(6 / (1437 // 64), 2)
    assert facts["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert facts["best_top1"] == state["progress"]["best_top1"] >= 0
    megabytes = round(sum(tensor.nbytes for tensor in weights.values()) / 1e6, 3)
    assert facts["tensors"]["model"] == facts["tensors"]["ema"] == {"count": len(weights), "megabytes": megabytes}
    assert facts["tensors"]["optimizer"]["count"] == 3 * len(weights), "two moments and a step counter each"
    for path in (short_run / "checkpoints", newest):
        assert json.loads(run(SCRIPT, "inspect", str(path), "--json").stdout) == facts
    said = run(SCRIPT, "inspect", str(step_file(short_run / "checkpoints", 2))).stdout
    for words in ("vip_tiny", "checksum", "ok", f"{len(weights)} tensors"):
        assert words in said


def test_verify_finds_the_damaged_ones_and_leaves_them_where_they_are(run: Run, folder: Path) -> None:
    said = run(SCRIPT, "verify", str(folder)).stdout
    assert "4 checkpoints, 0 damaged" in said
    content = bytearray(step_file(folder, 4).read_bytes())
    content[len(content) // 2] ^= 1
    step_file(folder, 4).write_bytes(content)
    shutil.copyfile(step_file(folder, 2), step_file(folder, 6))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    said = run(SCRIPT, "verify", str(folder), status=1).stdout
    assert "4 checkpoints, 2 damaged" in said
    states = {line.split("│")[1].strip(): line.split("│")[4].strip() for line in said.splitlines() if "│" in line}
    assert states[str(step_file(folder, 2))] == states[str(folder / "best.safetensors")] == "ok"
    assert "checksum differs" in states[str(step_file(folder, 4))]
    assert "holds step 2" in states[str(step_file(folder, 6))]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert "1 checkpoints, 0 damaged" in run(SCRIPT, "verify", str(step_file(folder, 2))).stdout


@pytest.mark.parametrize(("name", "ema"), [("weights.safetensors", False), ("weights.pth", True)])
def test_an_export_holds_the_weights_and_eval_reads_it(
    run: Run, tmp_path: Path, short_run: Path, digits: Path, name: str, ema: bool
) -> None:
    out = tmp_path / name
    run(SCRIPT, "export", str(short_run), str(out), *(["--ema"] if ema else []))
    weights = load_file(out) if out.suffix == ".safetensors" else torch.load(out, weights_only=True)
    saved = checkpoint.read(checkpoint.find(short_run)).state["ema" if ema else "model"]
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[key], saved[key]) for key in saved)
    figures = []
    own, exported = (f"checkpoint={short_run}", f"ema={ema}"), (f"checkpoint={out}", "model=vip_tiny", "data=digits")
    for number, arguments in enumerate((own, exported)):
        place = tmp_path / f"eval{number}"
        run("eval.py", *arguments, f"data.root={digits}", "data.workers=0", f"out={place}")
        figures.append(json.loads((place / "eval.json").read_text()))
    assert {figures[0][key] == figures[1][key] for key in ("images", "top1", "top5", "loss")} == {True}


def test_what_cannot_be_done_is_one_line_and_writes_nothing(run: Run, tmp_path: Path, folder: Path) -> None:
    there = tmp_path / "there.pth"
    there.write_text("precious")
    step_file(folder, 6).write_bytes(step_file(folder, 6).read_bytes()[:-1])
    (tmp_path / "bare").mkdir()
    bare = step_file(tmp_path / "bare", 1)
    checkpoint.write(bare, {"step": 1, "model": {"w": torch.ones(1)}, "ema": None, "fingerprint": {"model": "x"}})
    before = sorted(tmp_path.rglob("*"))
    for arguments, words in (
        (("inspect", str(folder)), f"{step_file(folder, 6)}: damaged"),
        (("inspect", str(tmp_path / "nowhere")), "no such file or folder"),
        (("verify", str(there), str(tmp_path / "nowhere")), "no such file or folder"),
        (("export", str(folder), str(there)), "there.pth: is there already"),
        (("export", str(folder), str(tmp_path / "x.onnx")), "x.onnx: neither .safetensors nor .pth"),
        (("export", str(bare), str(tmp_path / "x.pth"), "--ema"), "has no averaged weights"),
        (("export", str(bare), str(tmp_path / "nowhere/x.pth")), "nowhere"),
    ):
        refused = run(SCRIPT, *arguments, status=2)
        assert words in refused.stderr
        assert refused.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert there.read_text() == "precious"
