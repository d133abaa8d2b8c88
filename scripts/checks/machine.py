"""The machine of one rank: versions, GPU and driver, shared memory, memory, open files."""

import os
import platform
import re
import resource
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torchvision

from scripts.checks.row import Row, Setup
from vip.checkpoint import size_in_words

DRIVER = Path("/proc/driver/nvidia/version")
CGROUPS = Path("/sys/fs/cgroup")
MIN_SHARED_BYTES = 1_000_000_000  # NCCL's channels between the GPUs of one machine
MIN_BYTES_A_PROCESS = 2_000_000_000  # torch with its libraries alone takes about one
MIN_OPEN_FILES = 4096


def software(setup: Setup) -> Iterator[Row]:
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}"
    yield Row("ok", versions, must_agree=True)


def gpu(setup: Setup) -> Iterator[Row]:
    if not torch.cuda.is_available():
        yield _without_gpu()
        return
    count, capability = torch.cuda.device_count(), torch.cuda.get_device_capability(setup.world.device)
    properties = torch.cuda.get_device_properties(setup.world.device)
    driver = re.search(r"\d+\.\d+[.\d]*", DRIVER.read_text()) if DRIVER.exists() else None
    found = (
        f"{count} x {properties.name} (sm_{capability[0]}{capability[1]}, {size_in_words(properties.total_memory)}), "
        f"driver {driver[0] if driver else 'unknown'}, torch for CUDA {torch.version.cuda}"
    )
    kernels = torch.cuda.get_arch_list()
    if torch.version.cuda and not has_kernels(capability, kernels):
        yield Row("error", f"{found}: it has kernels for {', '.join(kernels)} alone", "install a torch for this GPU")
    elif count > setup.num_processes_here and "LOCAL_WORLD_SIZE" in os.environ:
        used = setup.num_processes_here
        yield Row("warning", f"{found}: {used} used", f"torchrun --nproc-per-node={count} uses all of them")
    else:
        yield Row("ok", found)


def has_kernels(capability: tuple[int, int], kernels: Sequence[str]) -> bool:
    """Whether a GPU of compute capability (major, minor) can run code for `kernels`, as torch.cuda.get_arch_list() names it.

    sm_80 runs on 8.0 and 8.6, sm_90a on 9.0 alone, sm_100f on all 10.x; compute_80 is compiled on arrival for 8.0 and later.
    """
    for kernel in kernels:
        parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", kernel)
        if parts is None:
            continue
        built = (int(parts[2]), int(parts[3]))
        if built == capability or (built < capability and not parts[4] and parts[1] == "compute"):
            return True
        if parts[1] == "sm" and parts[4] != "a" and built[0] == capability[0] and built[1] <= capability[1]:
            return True
    return False


def shared_memory(setup: Setup) -> Iterator[Row]:
    place = Path("/dev/shm")
    free = shutil.disk_usage(place).free if place.exists() else 0
    found = f"{size_in_words(free)} free in {place}"
    if setup.world.device.type != "cuda" or setup.num_processes_here == 1:
        yield Row("ok", f"{found}; not needed, the loader has memory of its own")
    elif free < MIN_SHARED_BYTES:
        yield Row("warning", f"{found}: NCCL may need more between the GPUs", "docker run --shm-size=1g, or --ipc=host")
    else:
        yield Row("ok", f"{found}, for NCCL")


def memory(setup: Setup) -> Iterator[Row]:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = min([machine, *_memory_limits()])
    found = size_in_words(limit)
    if limit < machine:
        found += f", the limit of the container or job; the machine has {size_in_words(machine)}"
    if limit < MIN_BYTES_A_PROCESS * setup.num_processes_here:
        yield Row(
            "warning",
            f"{found}: less than {size_in_words(MIN_BYTES_A_PROCESS)} a process with its loader workers",
            "ask the scheduler for more, or lower data.workers",
        )
    else:
        yield Row("ok", found)


def open_files(setup: Setup) -> Iterator[Row]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < MIN_OPEN_FILES:
        allowed = hard == unlimited or hard >= MIN_OPEN_FILES
        remedy = f"ulimit -n {MIN_OPEN_FILES} in the shell or job script that starts the run"
        yield Row(
            "warning",
            f"{soft} at most: workers, sockets and checkpoints of a large run may need more",
            remedy if allowed else f"{remedy}, once the administrator has raised the hard limit of {hard}",
        )
    else:
        yield Row("ok", "unlimited" if soft == unlimited else f"{soft:,} at most")


def _without_gpu() -> Row:
    """Why torch sees none: a machine without one is a warning, one that has a driver and does not use it an error."""
    reason = f"torch {torch.__version__} is built without CUDA"
    if torch.version.cuda or torch.version.hip:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition(". ")[0].partition("\n")[0]
    if DRIVER.exists() and "CUDA_VISIBLE_DEVICES" not in os.environ:
        return Row(
            "error", f"there is a driver, but {reason}", "update the driver, or install the torch for its CUDA version"
        )
    return Row(
        "warning",
        f"none ({reason}): the run would train on the CPU, which will do for experiment=digits",
        "start it on a machine with GPUs, and let CUDA_VISIBLE_DEVICES show them",
    )


def _memory_limits() -> Iterator[int]:
    """Bytes that the control groups of this process allow it, from its own group up to the root."""
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.exists() else ():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, name = CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(root) and (folder / name).is_file():
                limit = (folder / name).read_text().strip()
                if limit.isdigit():
                    yield int(limit)
