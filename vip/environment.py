"""What a run runs on: machine, libraries and the state of the code, as facts that can be shown to others."""

import os
import platform
import shlex
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from vip.redact import REDACTED, SECRETS, redact

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")
MAX_DIFF = 1_000_000  # bytes


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({os.cpu_count()} cores)"


def describe(device: torch.device) -> dict[str, str]:
    """Facts by name, secrets in the command replaced; `commit` and `changed` only where the code is under git."""
    facts = {
        "command": shlex.join([Path(sys.argv[0]).name, *redact(sys.argv[1:])]),
        "host": socket.gethostname(),
        "device": device_name(device),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    facts |= {name: found for name in PACKAGES if (found := _version(name))}
    if torch.version.cuda and device.type == "cuda":
        facts |= {"CUDA": torch.version.cuda, "cuDNN": str(torch.backends.cudnn.version())}
    # Twelve digits: forty would look like one of W&B's keys, and be redacted.
    if commit := _git("rev-parse", "--short=12", "HEAD").strip():
        changed = _git("status", "--porcelain", "--untracked-files=no").splitlines()
        facts |= {
            "commit": commit,
            "changed": f"{len(changed)} file{'s' * (len(changed) > 1)}" if changed else "nothing",
        }
    return facts


def write_diff(path: Path) -> None:
    """What differs from the commit, into `path`; no file where nothing does, or where the code is not under git."""
    diff = _git("diff", "HEAD")
    if not diff:
        path.unlink(missing_ok=True)
        return
    path.write_text(SECRETS.sub(REDACTED, diff[:MAX_DIFF]), encoding="utf-8")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):  # no git, or a file system that hangs: nothing a run should end for
        return ""
    return done.stdout if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
