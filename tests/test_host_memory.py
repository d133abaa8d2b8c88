"""Memory that is freed and asked for again."""

import os
import subprocess
import sys

import pytest

STEPS = """
import resource, sys, torch
from vip.host_memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(12 << 20) for _ in range(2)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(6)][-1])
"""
PAGES = 2 * (48 << 20) // 4096


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone has it")
@pytest.mark.parametrize(
    ("how", "variables", "is_kept"),
    [("kept", {}, True), ("not", {}, False), ("kept", {"MALLOC_TRIM_THRESHOLD_": "131072"}, False)],
)
def test_pages_are_faulted_in_once(how: str, variables: dict[str, str], is_kept: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True, env={**os.environ, **variables}
    )
    assert (int(done.stdout) < PAGES // 10) == is_kept
