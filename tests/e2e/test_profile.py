"""`profile=true` through the training command: the trace, the verdict on the console, and weights that do not know of it."""

import gzip
import json
import re
from pathlib import Path

import pytest
import torch

from tests.conftest import Run
from vip import checkpoint
from vip.models.products import ONEDNN_IS_FASTER
from vip.profiling import STEP, WAIT

pytestmark = pytest.mark.e2e


def test_profile_leaves_a_trace_and_a_verdict_and_changes_nothing(run: Run, tmp_path: Path, digits: Path) -> None:
    arguments = ("experiment=digits", f"data.root={digits}", "max_steps=22", "micro_batch=32", "data.workers=1")
    said = run("train.py", *arguments, "name=with", "profile=true").stdout
    assert "profile of steps 10 to 20: " in said
    assert re.search(r"^bound by (data|compute|host): \d+% of a step ", said, re.MULTILINE)
    table = said[said.index("operation ") :].splitlines()[1:11]
    product = "mkldnn_convolution" if ONEDNN_IS_FASTER else "mm"
    assert any(line.startswith(f"{product} ") for line in table)
    with gzip.open(tmp_path / "runs/with/trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = [event["name"] for event in events if event.get("name") in (STEP, WAIT)]
    assert names.count(STEP) == 11
    assert names.count(WAIT) == 22, "two micro-batches a step"

    assert "profile" not in run("train.py", *arguments, "name=without").stdout
    weights = [
        checkpoint.read(tmp_path / f"runs/{name}/checkpoints/step_0000000022.safetensors").state["model"]
        for name in ("with", "without")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not (tmp_path / "runs/without/trace.json.gz").exists()
