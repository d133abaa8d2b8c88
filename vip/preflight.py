"""What is made sure of before the first step, rather than found out after a night: one run in a folder, and room in it."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from vip.checkpoint import size_in_words
from vip.config import ConfigError


@contextlib.contextmanager
def locked(folder: Path, warn: Callable[[str], object]) -> Iterator[None]:
    """Hold the run folder, made if need be, for this process alone.

    The lock is the kernel's (POSIX, which NFS knows too): it ends with the process, however that ends, and forked loader
    workers do not inherit it. Raises ConfigError where another run holds it or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}); choose another runs_dir=...") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ConfigError(
                f"{folder}: in use by another run ({_holder(file.name)}); wait for its end, or choose another name=..."
            ) from None
        except OSError as error:
            warn(
                f"warning: {folder}: its file system has no locks ({error.strerror}); see to it that no other run uses it"
            )
        try:
            file.truncate(0)
            started = time.strftime("%Y-%m-%d %H:%M:%S %z")
            file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise ConfigError(
                f"{folder}: cannot be written ({error.strerror}); free some space or choose another runs_dir=..."
            ) from error
        yield


def check_space(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, has_ema: bool) -> None:
    """Raises ConfigError where two checkpoints will not fit: a new one is complete before an old one goes."""
    size = checkpoint_size(model, optimizer, has_ema)
    there = len(list(folder.glob("checkpoints/step_*.safetensors")))
    needed, free = size * max(1, 2 - there), shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"{folder}: {size_in_words(free)} are free, {size_in_words(needed)} are needed (a checkpoint takes "
            f"{size_in_words(size)}); free some space or choose another runs_dir=..."
        )


def checkpoint_size(model: nn.Module, optimizer: torch.optim.Optimizer, has_ema: bool) -> int:
    """Bytes of a checkpoint, about: weights, the optimizer's moments and the averages."""
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    moments = 2 if "betas" in optimizer.defaults else 1
    return weights * (1 + moments + has_ema)


def _holder(lock: str) -> str:
    """Who wrote the lock file: host, pid and start."""
    try:
        facts = json.loads(Path(lock).read_text())
        return f"host {facts['host']}, pid {facts['pid']}, since {facts['started']}"
    except (OSError, ValueError, KeyError):
        return "which has just begun"
