"""Writes what pip is to install beside a torch that stays: `needed.txt` and `pins.txt` in the folder that is named.

python scripts/docker/requirements.py FOLDER

An image's apex and torchvision are compiled against its torch, and all of them against its numpy. So these stay, and
what that torch wants in one version alone, whatever pyproject.toml would rather have; every other requirement is pinned
as in requirements.lock.
"""

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEPT = ("torch", "torchvision", "triton", "pytorch-triton", "numpy", "scipy", "scikit-learn")
PIN = re.compile(r"^([a-z0-9][a-z0-9._-]*)==([^\s;]+)((?: ;[^\\]*)?) \\$", re.MULTILINE)


def main(folder: Path) -> None:
    if installed("torch") is None:
        raise SystemExit(f"{sys.executable}: has no torch; begin with an image that does, or take `make setup`")
    exact = {name.lower() for need in requires("torch") or () for name in re.findall(r"^([\w.-]+) *\(?==", need)}
    kept = {name: found for name in {*KEPT, *exact} if (found := installed(name))}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [line for line in project["dependencies"] if re.split(r"[<>=!~ ]", line)[0] not in kept]
    pins = [f"{name}=={found}" for name, found in sorted(kept.items())]
    pins += [
        f"{name}=={found}{marker.rstrip()}"
        for name, found, marker in PIN.findall((ROOT / "requirements.lock").read_text(encoding="utf-8"))
        if name not in {*KEPT, *kept} and not name.startswith("nvidia-")
    ]
    (folder / "needed.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")
    (folder / "pins.txt").write_text("\n".join(pins) + "\n", encoding="utf-8")


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
