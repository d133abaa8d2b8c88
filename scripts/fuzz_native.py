"""Feed the native core damaged JPEGs and senseless samples under the address and undefined-behaviour sanitizers.

python scripts/fuzz_native.py [--files N] [--seed N]

Builds the sources of data/native with scripts/fuzz_native.c (gcc or clang), in a temporary folder. Exit status 1 where
anything was found: the sanitizer's report, the seed and the number of the file, which stays where it says.
"""

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "data" / "native"
SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow"
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1", "UBSAN_OPTIONS": "print_stacktrace=1"}


def build(folder: Path) -> Path:
    """The instrumented program. Raises CalledProcessError where it cannot be compiled."""
    program = folder / "fuzz_native"
    sources = [ROOT / "scripts" / "fuzz_native.c", *sorted(NATIVE.glob("*.c"))]
    flags = ["-std=c11", "-O1", "-g", SANITIZERS, "-fno-sanitize-recover=all", "-DVIP_EXACT_MEMORY", f"-I{NATIVE}"]
    subprocess.run(["cc", *flags, *sources, "-ljpeg", "-lm", "-lpthread", "-o", program], check=True)
    return program


def write_seeds(folder: Path) -> list[Path]:
    """Small JPEGs of every plain kind, and some that are not for the core at all."""
    random = np.random.default_rng(0)
    paths = []
    for number in range(24):
        height, width = random.integers(1, 130, 2).tolist()
        corners = random.integers(0, 256, (4, 4, 3), np.uint8)
        smooth = np.asarray(Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC), np.int64)
        noisy = (smooth + random.integers(-30, 30, smooth.shape)).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(noisy).convert(("RGB", "RGB", "RGB", "RGB", "L", "CMYK")[number % 6])
        options = {"quality": 30 + 3 * number, "subsampling": number % 3, "progressive": number % 4 == 1}
        restart = {"restart_marker_blocks": 1 + number % 5} if number % 5 == 2 else {}
        metadata = {"exif": bytes(40), "icc_profile": bytes(90), "comment": b"seed"} if number % 7 == 3 else {}
        data = io.BytesIO()
        image.save(data, "JPEG", **options, **restart, **metadata)
        paths.append(folder / f"seed-{number:02}.jpg")
        paths[-1].write_bytes(data.getvalue())
    return paths


def fuzz(num_files: int, seed: int, folder: Path) -> subprocess.CompletedProcess[str]:
    """Its output is the number of files and how many of them were decoded; the status is not 0 where something was found."""
    command: list[str | Path] = [build(folder), str(seed), str(num_files), folder, *write_seeds(folder)]
    return subprocess.run(command, env=os.environ | OPTIONS, capture_output=True, text=True, check=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000, help="how many damaged files (default: 100,000)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (default: 0)")
    arguments = parser.parse_args()
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-native-"))
    done = fuzz(arguments.files, arguments.seed, folder)
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    count, decoded = map(int, done.stdout.split())
    print(f"{count:,} files, {decoded:,} of them decoded, nothing found in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
