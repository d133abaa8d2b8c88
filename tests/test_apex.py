"""NVIDIA apex without its kernels, as a build without compiling leaves it: found out before a run begins.

apex itself cannot be installed where there is no CUDA compiler. The packages below are what such a build puts on the path.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import ROOT, Run
from vip.models.build import ModelConfig, build_model
from vip.stochastic_depth import StochasticDepthConfig

WITH_PATH = """
import runpy, sys
sys.path.insert(0, {path!r})
runpy.run_path({script!r}, run_name="__main__")
"""
FUSED_NORM = """
import torch
class FusedLayerNorm(torch.nn.LayerNorm):
    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, memory_efficient=False):
        super().__init__(normalized_shape, eps, elementwise_affine)
"""


@pytest.fixture
def without_kernels(tmp_path: Path) -> Path:
    """A folder with the package apex, in Python alone."""
    folder = tmp_path / "site"
    for package in ("apex", "apex/optimizers", "apex/normalization"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").touch()
    (folder / "apex/optimizers/__init__.py").write_text("class FusedAdam: ...\nclass FusedLAMB: ...\n")
    (folder / "apex/normalization/__init__.py").write_text(FUSED_NORM)
    return folder


def beside(packages: Path, script: str) -> str:
    """A script that runs `script` with `packages` on its path."""
    path = packages.parent / Path(script).name
    path.write_text(WITH_PATH.format(path=str(packages), script=str(ROOT / script)))
    return str(path)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("override", "kernel", "instead"),
    [
        ("optimizer=apex_adam", "amp_C", "optimizer=adamw"),
        ("optimizer=apex_lamb", "amp_C", "optimizer=lamb"),
        ("model.fused_norm=true", "fused_layer_norm_cuda", "model.fused_norm=false"),
    ],
)
def test_a_run_is_refused_in_one_line_that_names_kernel_and_remedy(
    run: Run, without_kernels: Path, digits: Path, override: str, kernel: str, instead: str
) -> None:
    script = beside(without_kernels, "train.py")
    done = run(script, "experiment=digits", f"data.root={digits}", override, status=2)
    assert done.stderr.count("\n") == 1
    assert f"{override}: NVIDIA apex is here without this CUDA kernel (No module named '{kernel}')" in done.stderr
    assert f"or take {instead}\n" in done.stderr


@pytest.mark.e2e
def test_the_doctor_is_not_taken_in_by_the_package(run: Run, without_kernels: Path, digits: Path) -> None:
    script = beside(without_kernels, "scripts/doctor.py")
    done = run(
        script, "experiment=digits", f"data.root={digits}", "batch_size=8", "optimizer=apex_adam", "--json", status=1
    )
    (row,) = [row for row in json.loads(done.stdout)["rows"] if row["check"] == "optimizer"]
    assert row["status"] == "error"
    assert "without this CUDA kernel" in row["value"]


@pytest.mark.e2e
def test_who_asks_for_apex_amp_is_told_that_there_is_none(run: Run) -> None:
    done = run("train.py", "experiment=digits", "precision=apex", status=2)
    assert done.stderr.count("\n") == 1
    assert (
        "precision=apex: apex has no amp any more, mixed precision is torch's own; take precision=fp16 or"
        in done.stderr
    )


def test_fused_norms_keep_every_name_and_every_value(without_kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers are torch's by another name here: what is tested is where they go, not apex."""
    (without_kernels / "fused_layer_norm_cuda.py").touch()
    monkeypatch.syspath_prepend(without_kernels)
    depth = StochasticDepthConfig(rate=0.0)
    torch.manual_seed(0)
    plain = build_model(ModelConfig("vip_tiny", depth), 10).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    fused = build_model(ModelConfig("vip_tiny", depth, fused_norm=True), 10).eval()
    norms = {type(module).__name__ for module in fused.modules() if isinstance(module, nn.LayerNorm)}
    assert norms == {"FusedLayerNorm"}
    fused.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain(images), fused(images))
    with pytest.raises(ValueError, match=r"model.fused_norm=true: resnet18 has no LayerNorm"):
        build_model(ModelConfig("resnet18", depth, fused_norm=True), 10)
