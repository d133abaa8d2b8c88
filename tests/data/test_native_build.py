"""How the native core is built: with a compiler, without one, without vector instructions, and under sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import native
from scripts.fuzz_native import fuzz
from tests.conftest import ROOT
from tests.data.test_native import batch

needs_compiler = pytest.mark.skipif(not native.available(), reason=native.reason())

DIGEST = """
import hashlib, sys
import numpy as np
from data import native
assert native.__file__.startswith(sys.argv[1]) and native.available(), native.reason()
loaded = np.load(sys.argv[2], allow_pickle=True)
out = np.zeros((len(loaded["jpegs"]), 64, 64, 3), np.uint8)
assert not native.load(list(loaded["jpegs"]), loaded["samples"], out).any()
print(hashlib.sha256(out.tobytes()).hexdigest())
"""


def copy_of_the_package(folder: Path) -> Path:
    """setup.py and data/ without the library."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "data", folder / "data", ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def python(folder: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)} | environment, capture_output=True, text=True
    )


@needs_compiler
def test_portable_code_gives_the_same_bytes(tmp_path: Path) -> None:
    jpegs, samples = batch(12)
    samples["num_ops"] = 0
    file = tmp_path / "batch.npz"
    np.savez(file, jpegs=np.array(jpegs, object), samples=samples)
    folder = copy_of_the_package(tmp_path / "portable")
    built = python(folder, "setup.py", "build_ext", "--inplace", CFLAGS="-DVIP_PLAIN")
    assert built.returncode == 0, built.stderr
    digests = [python(place, "-c", DIGEST, place, file) for place in (folder, ROOT)]
    assert [digest.stderr for digest in digests] == ["", ""]
    assert digests[0].stdout == digests[1].stdout


def test_an_installation_without_a_compiler_succeeds_and_says_what_is_missing(tmp_path: Path) -> None:
    folder = copy_of_the_package(tmp_path / "tree")
    asked = "from data import native; print(native.available(), native.reason())"
    built = python(folder, "setup.py", "build_ext", "--inplace", CC="/nowhere/cc")
    assert built.returncode == 0, built.stderr
    said = python(folder, "-c", asked).stdout.splitlines()
    assert len(said) == 1
    assert said[0].startswith("False the native library was not built")
    assert "libjpeg62-turbo-dev" in said[0]
    (folder / "data/native/_core.abi3.so").write_bytes(b"not a library")
    said = python(folder, "-c", asked).stdout.splitlines()
    assert len(said) == 1
    assert said[0].startswith("False _core.abi3.so cannot be loaded (")
    used = python(folder, "-c", "from data import native; native.sizes([b''])")
    assert used.returncode == 1
    assert used.stderr.splitlines()[-1].startswith("ValueError: _core.abi3.so cannot be loaded")


@needs_compiler
def test_damaged_files_never_reach_beyond_their_memory(tmp_path: Path) -> None:
    done = fuzz(2000, 0, tmp_path)
    assert done.returncode == 0, done.stderr
    count, decoded = map(int, done.stdout.split())
    assert count == 2000
    assert decoded > 300
