"""Builds the native core (data/native) where there are a C compiler and libjpeg-turbo; the rest is in pyproject.toml.

Without them the installation succeeds and the loader decodes through torch. Homebrew's and conda's libjpeg-turbo lie
where compilers do not look by themselves.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("data/native")
PREFIXES = [Path(sys.base_prefix), Path("/opt/homebrew/opt/jpeg-turbo"), Path("/usr/local/opt/jpeg-turbo")]
FOUND = [str(prefix) for prefix in PREFIXES if (prefix / "include" / "jpeglib.h").exists() and prefix != Path("/usr")]

core = Extension(
    "data.native._core",
    sources=[
        str(NATIVE / f"{name}.c") for name in ("core", "jpeg", "resize", "files", "ops", "affine", "frame", "cut")
    ],
    depends=[str(NATIVE / f"{name}.h") for name in ("native", "jpeg", "resize", "ops", "frame")],
    include_dirs=[f"{prefix}/include" for prefix in FOUND],
    library_dirs=[f"{prefix}/lib" for prefix in FOUND],
    runtime_library_dirs=[f"{prefix}/lib" for prefix in FOUND],
    libraries=["jpeg", "m"],
    # Contracted multiplications and additions would round differently from one processor to another.
    extra_compile_args=["-std=c11", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"],
    optional="CIBUILDWHEEL" not in os.environ,  # a published wheel has it or is none
    py_limited_api=True,  # it knows nothing of Python: ctypes loads it
)

setup(ext_modules=[core], options={"bdist_wheel": {"py_limited_api": "cp311"}})
