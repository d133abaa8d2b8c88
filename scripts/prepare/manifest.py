"""The manifest of a prepared tree, `manifest.json`, and the audit of the tree by it.

One JSON document: what the tree is, and under `files` what every image was when it was prepared (scripts/prepare/images.py), in
the order of their paths. There are 1.3 million, so each stands on a line of its own: a line can be read, searched for and
compared with another manifest's without all of them in memory as objects. It holds nothing that differs between two preparations
of the same images.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from data.folder import IMAGE_SUFFIXES
from scripts.prepare import pool
from scripts.prepare.images import SPLITS, write_whole
from scripts.prepare.report import Report

NAME = "manifest.json"
FORMAT = "imagenet-manifest-2"
END = "\n]}\n"
NUM_NAMED = 10
NUM_LISTED = 100  # paths of each oddity that the head lists: more than ImageNet has of the rare ones
CHUNK = 200  # files that a process checks at a time


@dataclass(frozen=True)
class Manifest:
    """The header, and by path the size in bytes and the checksum of each image."""

    header: dict[str, Any]
    images: dict[str, tuple[int, str]]

    @property
    def undecodable(self) -> dict[str, Any]:
        """`count` of the images that cannot be decoded, and the `first` ones; nothing if all can."""
        return dict(self.header["odd"].get("undecodable", {}))


def make(lines: Iterable[str], classes: tuple[str, ...]) -> str:
    """The text of a manifest from the lines on its images, in any order."""
    odd: dict[str, list[str]] = {}
    images, num_bytes = Counter[str](), Counter[str]()
    in_order = sorted(lines, key=path_of)
    for line in in_order:
        entry = json.loads(line)
        split = entry["path"].partition("/")[0]
        images[split] += 1
        num_bytes[split] += entry["bytes"]
        for kind in entry.get("odd", ()):
            odd.setdefault(kind, []).append(entry["path"])
    body = ",\n".join(in_order)
    header = {
        "format": FORMAT,
        "images": dict(images),
        "bytes": dict(num_bytes),
        "odd": {kind: {"count": len(paths), "first": paths[:NUM_LISTED]} for kind, paths in sorted(odd.items())},
        "classes": classes,
        "xxh3_128": xxhash.xxh3_128_hexdigest(body.encode("ascii")),  # of the lines on the files
        "files": [],
    }
    return f"{json.dumps(header).removesuffix(']}')}\n{body}{END}"


def path_of(line: str) -> str:
    """The path of the image that a line is on."""
    return str(json.loads(line)["path"])


def save(folder: Path, text: str) -> None:
    """Whole or absent."""
    write_whole(folder / NAME, text)


def read(folder: Path) -> Manifest:
    """Raises ValueError where it is not there or not as it was written."""
    path = folder / NAME
    try:
        head, _, rest = path.read_bytes().partition(b"\n")
        header = json.loads(head + b"]}")
        body, end = rest[: -len(END)], rest[-len(END) :]
        is_whole = end == END.encode() and header["xxh3_128"] == xxhash.xxh3_128_hexdigest(body)
        if header["format"] != FORMAT or not is_whole:
            raise ValueError(f"format {header['format']!r}, or lines that are not those that it was written with")
        entries = (json.loads(line.removesuffix(b",")) for line in body.splitlines())
        return Manifest(header, {entry["path"]: (entry["bytes"], entry["xxh3_128"]) for entry in entries})
    except FileNotFoundError:
        raise ValueError(
            f"{path} not found: prepare_imagenet.py writes it, also for a tree that exists, by --tree {folder}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore it from a copy, or prepare the tree again") from error


def list_images(folder: Path) -> list[str]:
    """Paths below `folder` of all that training takes for images of its splits, sorted.

    Like `data.sources`: links are followed, hidden files and other suffixes passed over.
    """
    splits = [folder / split for split in SPLITS if (folder / split).is_dir()]
    classes = [path for split in splits for path in split.iterdir() if not path.name.startswith(".")]
    # Threads, because on network file systems this is all waiting.
    with ThreadPoolExecutor(max_workers=16) as threads:
        return sorted(path for paths in threads.map(partial(_list_class, folder), classes) for path in paths)


def _list_class(folder: Path, class_folder: Path) -> list[str]:
    found, visited = [], set()
    for path, folders, files in os.walk(class_folder, followlinks=True):
        status = Path(path).stat()
        if (identity := (status.st_dev, status.st_ino)) in visited:  # a link that leads back
            folders.clear()
            continue
        visited.add(identity)
        folders[:] = [inner for inner in folders if not inner.startswith(".")]
        kept = (Path(path, file) for file in files if not file.startswith("."))
        found += [
            str(file.relative_to(folder))
            for file in kept
            if os.fsencode(file.name).lower().endswith(IMAGE_SUFFIXES) and file.is_file()
        ]
    return found


def audit(folder: Path, num_workers: int, report: Report) -> dict[str, list[str]]:
    """What differs from the manifest: sorted paths of files `missing`, `added` and `changed`. Reads every file.

    Raises ValueError for a manifest that is missing or damaged. A file that cannot be read has changed, with the reason.
    """
    recorded = read(folder).images
    there = set(list_images(folder))
    differing = {"missing": sorted(recorded.keys() - there), "added": sorted(there - recorded.keys())}
    both = sorted(recorded.keys() & there)
    chunks = [[(path, *recorded[path]) for path in both[at : at + CHUNK]] for at in range(0, len(both), CHUNK)]
    with report.progress("verifying", len(both), "images") as bar:
        found = pool.share(partial(_changed, folder), chunks, num_workers, bar.update)
        return differing | {"changed": sorted(path for paths in found for path in paths)}


def _changed(folder: Path, chunk: list[tuple[str, int, str]]) -> list[str]:
    changed = []
    for path, num_bytes, checksum in chunk:
        try:
            content = (folder / path).read_bytes()
            if len(content) != num_bytes or xxhash.xxh3_128_hexdigest(content) != checksum:
                changed.append(path)
        except OSError as error:
            changed.append(f"{path} ({error.strerror or error})")
        pool.advance()
    return changed
