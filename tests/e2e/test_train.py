"""The training command, as people type it."""

import json
from pathlib import Path

import pytest
import yaml

from tests.conftest import Run, command, run_launch, run_ranks
from vip import checkpoint

pytestmark = pytest.mark.e2e


def test_a_run_leaves_metrics_config_and_checkpoints(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    assert steps[-1] == 2 * (1437 // 64)
    training = [line for line in lines if "train/loss" in line]
    assert {"train/lr", "train/images_per_s", "train/data_wait", "train/grad_norm", "epoch"} <= training[0].keys()
    assert training[-1]["train/loss"] < training[0]["train/loss"]
    validations = [line for line in lines if "val/top1" in line]
    assert [line["epoch"] for line in validations] == [1.0, 2.0]
    assert {"val/loss", "val/top5", "val_ema/top1", "val/best_top1"} <= validations[0].keys()
    assert yaml.safe_load((trained / "config.yaml").read_text())["model"]["name"] == "vip_tiny"
    names = sorted(path.name for path in (trained / "checkpoints").iterdir())
    assert names == ["best.safetensors", "step_0000000022.safetensors", "step_0000000044.safetensors"]
    left = {path.name for path in trained.iterdir()} - {"code.diff"}  # which a clean checkout does not have
    assert left == {".lock", "checkpoints", "config.yaml", "metrics.jsonl", "report.html", "views.jsonl"}
    assert [path.name for path in trained.parent.iterdir()] == ["short"], "Hydra must leave nothing behind"


def test_only_rank_0_speaks_and_says_what_comes_next(trained: Path) -> None:
    said = (trained.parents[1] / "stdout.txt").read_text()
    assert said.count("64 images a step = 2 processes x 1 pass x 32; 44 steps, 22 an epoch") == 1
    assert "next: python eval.py checkpoint=runs/short" in said


def test_quiet_tells_the_end_alone(run: Run, tmp_path: Path, digits: Path) -> None:
    said = run(
        "train.py",
        "--quiet",
        "experiment=digits",
        f"data.root={digits}",
        "max_steps=3",
        "log_every=1",
        "data.workers=0",
    )
    lines = said.stdout.splitlines()
    assert lines[0].startswith("╭")
    assert [line.split(":")[0] for line in lines if line[0] not in "╭│╰"] == ["report", "done", "next"]
    assert "step 3 of 3" in said.stdout
    assert said.stderr == ""
    assert len((tmp_path / "runs/digits/metrics.jsonl").read_text().splitlines()) == 4


def test_the_report_of_a_run_comes_with_its_end(trained: Path) -> None:
    page = (trained / "report.html").read_text()
    top1 = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()][-1]["val_ema/top1"]
    assert f"{top1:.2f}" in page
    assert "report: runs/short/report.html" in (trained.parents[1] / "stdout.txt").read_text()


def test_gradients_exchanged_in_fp16_train_as_well(tmp_path: Path, digits: Path) -> None:
    arguments = ("experiment=digits", f"data.root={digits}", "max_steps=6", "log_every=1")
    ends = []
    for name, compressed in (("plain", "false"), ("half", "true")):
        done = run_ranks("train.py", (*arguments, f"compress_gradients={compressed}", f"name={name}"), 2, tmp_path)
        assert done.returncode == 0, done.stdout
        lines = [json.loads(line) for line in (tmp_path / f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        ends.append([(line["train/loss"], line["train/grad_norm"]) for line in lines if "train/loss" in line])
    (losses, norms), (half_losses, half_norms) = (zip(*end, strict=True) for end in ends)
    assert losses[0] == half_losses[0], "the first loss is before any exchange"
    assert all(norm != half for norm, half in zip(norms, half_norms, strict=True))
    assert half_norms == pytest.approx(norms, rel=0.001)
    assert half_losses == pytest.approx(losses, rel=0.001)


def test_a_finished_run_is_not_trained_again(run: Run, tmp_path: Path, digits: Path) -> None:
    arguments = ("experiment=digits", f"data.root={digits}", "max_steps=2", "data.workers=0")
    run("train.py", *arguments)
    before = (tmp_path / "runs/digits/metrics.jsonl").read_text()
    assert "is complete: step 2," in run("train.py", *arguments).stdout
    assert (tmp_path / "runs/digits/metrics.jsonl").read_text() == before
    refused = run("train.py", *arguments, "resume=never", status=2)
    assert refused.stderr.count("\n") == 1
    assert "resume=never: runs/digits already holds a run (step 2)" in refused.stderr
    other = run("train.py", *arguments, "max_steps=3", "seed=1", status=2)
    assert "seed 42, here 1" in other.stderr


def test_resume_from_the_checkpoint_of_another_folder(run: Run, tmp_path: Path, digits: Path, trained: Path) -> None:
    half = tmp_path / "half"
    half.mkdir()
    (half / "step_0000000022.safetensors").write_bytes(
        (trained / "checkpoints/step_0000000022.safetensors").read_bytes()
    )
    arguments = ("experiment=digits", f"data.root={digits}", "epochs=3", "schedule.warmup_epochs=1", "ema_decay=0.9",
                 "data.workers=0", "max_steps=45", f"resume={half}")  # fmt: skip
    said = run("train.py", *arguments, "name=branch").stdout
    assert "goes on from step 22" in said
    assert "world_size was 2, now 1" in said
    branch = checkpoint.read(tmp_path / "runs/branch/checkpoints/step_0000000044.safetensors")
    lines = [json.loads(line) for line in (tmp_path / "runs/branch/metrics.jsonl").read_text().splitlines()]
    own_best = max(line["val_ema/top1"] for line in lines if "val_ema/top1" in line and line["step"] <= 44)
    assert branch.state["progress"]["best_top1"] == own_best, "a branch starts its own record"
    assert "goes on from step 45" in run("train.py", *arguments, "name=branch", "max_steps=46").stdout


def test_settings_come_from_the_configuration_and_moments_from_the_checkpoint(
    run: Run, tmp_path: Path, digits: Path
) -> None:
    arguments = ("experiment=digits", f"data.root={digits}", "data.workers=0", "optimizer=lamb")
    run("train.py", *arguments, "max_steps=1")
    run("train.py", *arguments, "max_steps=2", "optimizer.weight_decay=0.125")
    groups = checkpoint.read(tmp_path / "runs/digits/checkpoints/step_0000000002.safetensors").state["optimizer"][
        "param_groups"
    ]
    assert sorted(group["weight_decay"] for group in groups) == [0, 0.125]
    assert {float(group["step"]) for group in groups} == {2.0}
    refused = run("train.py", *arguments, "max_steps=3", "optimizer=sgd", status=2)
    assert "optimizer lamb, here sgd" in refused.stderr


def test_a_sweep_gives_each_job_its_own_run_folder(run: Run, tmp_path: Path, digits: Path) -> None:
    run("train.py", "-m", "experiment=digits", f"data.root={digits}", "max_steps=1", "data.workers=0", "seed=1,2")
    names = {path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()}
    assert names == {"digits-seed=1", "digits-seed=2"}
    seeds = [yaml.safe_load((tmp_path / "runs" / name / "config.yaml").read_text())["seed"] for name in sorted(names)]
    assert seeds == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "channels_last"), [(("model.name=convnext_atto", "model.img_size=32"), "true"),
                                     (("model.name=mixer_s32_224", "model.img_size=32"), "false")]
)  # fmt: skip
def test_timm_networks_train_through_the_same_trainer(
    run: Run, tmp_path: Path, digits: Path, arguments: tuple[str, ...], channels_last: str
) -> None:
    run("train.py", "experiment=digits", "model=timm", *arguments, f"data.root={digits}", "max_steps=3", "log_every=1",
        "data.workers=0", "model.drop_path.rate=0.1", f"channels_last={channels_last}", "precision=bf16")  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "runs/digits/metrics.jsonl").read_text().splitlines()]
    assert all(line["train/loss"] > 0 for line in lines if "train/loss" in line)
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3]


def test_under_torchrun_rank_0_alone_names_a_wrong_key(tmp_path: Path) -> None:
    refused = run_launch(command("train.py", "epoch=3", processes=2), tmp_path)
    assert refused.returncode == 1, "torchrun's own status"
    assert refused.stderr.count("error: epoch=3") == 1
    assert "\ntrain.py: error: epoch=3: no such key; nearest: epochs\n" in f"\n{refused.stderr}"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(run: Run, tmp_path: Path, digits: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    refused = run("train.py", "experiment=digits", f"data.root={digits}", "data.workers=0", "runs_dir=file", status=2)
    assert "file/digits" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_missing_data_is_one_line_before_anything_starts(run: Run, tmp_path: Path) -> None:
    for arguments in ((), ("data.root=nowhere",)):
        refused = run("train.py", "model=vip_m7", *arguments, status=2)
        assert refused.stderr.count("\n") == 1
        assert "experiment=digits" in refused.stderr
        assert "scripts/prepare_imagenet.py" in refused.stderr
    assert "nowhere" in refused.stderr
    assert list(tmp_path.iterdir()) == []
