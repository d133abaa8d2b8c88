"""Packs from elsewhere, behind a URL or on a slow file system: copied to a disk of this node before a run, and checked.

    <cache>/<name>-<checksum of pack.json>/train, val        whole: they got these names last
    <cache>/<name>-<checksum of pack.json>/train.unfinished  what an interrupted copy goes on with

The first process of a node copies, the others wait for it. Every file must have the size and the checksum that pack.json
says. Another pack at the same place is another folder here; old ones are for their owner to remove.
"""

import contextlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from data import node
from data.pack import ABOUT, read_about

CHUNK = 8 << 20  # bytes asked for at a time
NUM_STREAMS = 8  # files copied at the same time: one stream does not fill a network
RETRY_WAITS_S = (1.0, 5.0, 20.0)  # before new attempts at a file
READ_S = 120.0  # without a byte; a chunk or a file as a whole may take longer
POLL_S = 0.5
LINE_S = 10.0
LIBRARIES = {  # name of the package and the project's extra, by kind of URL
    "s3": ("s3fs", "s3"),
    "s3a": ("s3fs", "s3"),
    "gs": ("gcsfs", "gcs"),
    "gcs": ("gcsfs", "gcs"),
    "http": ("aiohttp", "http"),
    "https": ("aiohttp", "http"),
}


class CopyError(ValueError):
    """What no new attempt would help: a file is not what it should be, or the disk takes no more."""


def is_url(root: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", root, re.IGNORECASE) is not None


def local_copy(root: str, split: str, cache: str | None) -> Path:
    """The folder on this node that holds a copy of the packed `split` of `root`, a URL or a folder; made now if need be.

    Raises:
        ValueError: no pack is there, it does not fit on the disk, or files are not what its pack.json says.
        OSError: it cannot be reached, after a few attempts.
    """
    place = _place(cache)
    origin = _open(root if is_url(root) else str(Path(root).expanduser()), split)
    text = origin.about()
    name = re.sub(r"[^\w.-]+", "_", origin.shown.rstrip("/").split("/")[-2])
    folder = place / f"{name}-{xxhash.xxh3_64_hexdigest(text)}" / split
    if not folder.is_dir():
        with node.turn(folder.with_name(f"{split}.lock")) as held:
            if not held:
                raise ValueError(
                    f"data.cache={place}: cannot be written, or its file system has no locks; choose one on the node's own disk"
                )
            if not folder.is_dir():  # another process may have made it meanwhile
                _copy(origin, text, folder)
    return folder


@dataclass(frozen=True)
class Origin:
    """Where a packed split is copied from, as fsspec knows it."""

    files: Any  # fsspec's file system
    path: str  # of the split in it
    shown: str  # its URL, without passwords
    has_ranges: bool = True  # whether parts of a file can be asked for

    def about(self) -> bytes:
        """The content of pack.json."""
        try:
            return bytes(self.files.cat_file(f"{self.path}/{ABOUT}"))
        except FileNotFoundError:
            raise ValueError(
                f"{self.shown} holds no pack ({ABOUT} not found): only packs are copied; pack the class folders first by "
                "scripts/pack.py"
            ) from None
        except Exception as error:  # each library has its own kinds
            raise self.failed(ABOUT, error) from error

    def chunks(self, name: str, start: int, size: int) -> Iterator[bytes]:
        """The content of a file from `start` on, which is 0 for a server that sends files as a whole."""
        if self.has_ranges:
            for at in range(start, size, CHUNK):
                yield self.files.cat_file(f"{self.path}/{name}", start=at, end=min(at + CHUNK, size))
        else:
            with self.files.open(f"{self.path}/{name}", "rb", block_size=0) as file:
                yield from iter(lambda: file.read(CHUNK), b"")

    def failed(self, name: str, error: Exception) -> OSError:
        said = " ".join(str(error).split()) or type(error).__name__
        return OSError(f"cannot read {self.shown}/{name} ({said[:300]}): check address, network and credentials")


def _open(root: str, split: str) -> Origin:
    import fsspec  # takes a while; few runs need it

    source = f"{root.rstrip('/')}/{split}"
    shown = re.sub(r"(?<=://)[^/@]*@|[?#].*", "", source)
    options: dict[str, Any] = {}
    try:
        if source.lower().startswith("http"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=READ_S, sock_read=READ_S)  # else 5 min for a file
            options["client_kwargs"] = {"timeout": timeout}
        files, path = fsspec.core.url_to_fs(source, **options)
    except ImportError as error:
        package, extra = LIBRARIES.get(root.partition(":")[0].lower(), ("another package", ""))
        hint = f"pip install {package} (the extra `{extra}`)" if extra else str(error)
        raise ValueError(f"data.root={shown}: needs {package}, which is not installed: {hint}") from None
    except ValueError as error:
        raise ValueError(f"data.root={shown}: no such kind of URL ({error}); use s3://, gs:// or https://") from error
    try:
        has_ranges = len(files.cat_file(f"{path}/{ABOUT}", start=1, end=3)) == 2
    except Exception:  # asked for as a whole it will say why
        has_ranges = False
    return Origin(files, path, shown, has_ranges)


def _place(cache: str | None) -> Path:
    if cache is not None:
        return Path(cache).expanduser()
    if (caches := node.cache_folder()) is None:
        raise ValueError("data.cache is not set, and this user has no home: set it to a folder on the node's own disk")
    return caches / "packs"


def _copy(origin: Origin, text: bytes, folder: Path) -> None:
    """Makes `folder` whole, from what an earlier copy left."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    unfinished.mkdir(exist_ok=True)
    with _named(unfinished / ABOUT):
        (unfinished / ABOUT).write_bytes(text)
    try:
        wanted = read_about(unfinished).files
    except ValueError as error:
        raise ValueError(f"{origin.shown}: {error}") from error
    for name, (size, _) in wanted.items():
        if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII) or name == ABOUT or size < 0:
            raise ValueError(
                f"{origin.shown}/{ABOUT} lists {name!r} of {size} bytes, which no pack has: upload the pack again"
            )
    total = sum(size for size, _ in wanted.values())
    missing = total - sum(path.stat().st_size for path in unfinished.iterdir() if path.name in wanted)
    if (free := shutil.disk_usage(unfinished).free) < missing:
        raise ValueError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, and the copy of {origin.shown} takes {missing / 1e9:.1f} GB: make "
            "room, or set data.cache to a larger disk"
        )
    _Copying(origin, unfinished, total).run(wanted)
    with _named(folder):
        for path in (unfinished / ABOUT, unfinished):
            _sync(path)
        unfinished.rename(folder)
        _sync(folder.parent)


@dataclass
class _Copying:
    """A copy at work. What is done of each file, and what was done of it earlier, in bytes."""

    origin: Origin
    folder: Path
    total: int
    done: dict[str, int] = field(default_factory=dict)
    earlier: dict[str, int] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self, wanted: dict[str, tuple[int, str]]) -> None:
        """Raises OSError for a file that cannot be read, ValueError for one that is not what pack.json says."""
        began = last_line = time.monotonic()
        with ThreadPoolExecutor(NUM_STREAMS) as pool:
            files = [pool.submit(self._copy, name, *facts) for name, facts in wanted.items()]
            try:
                while wait(files, POLL_S, FIRST_EXCEPTION).not_done and not any(
                    file.done() and file.exception() for file in files
                ):
                    if (now := time.monotonic()) - last_line > LINE_S:
                        last_line = now
                        self._say(now - began)
            finally:
                self.stop.set()
        for file in files:
            file.result()
        self._say(time.monotonic() - began)

    def _say(self, seconds: float) -> None:
        done, earlier = (sum(list(counts.values())) for counts in (self.done, self.earlier))
        speed = (done - earlier) / seconds
        left = f", {(self.total - done) / speed / 60:,.0f} min left" if done < self.total and speed > 0 else ""
        print(
            f"copying {self.origin.shown} to {self.folder.parent}: {done / 1e9:.2f} of {self.total / 1e9:.2f} GB, "
            f"{speed / 1e6:,.0f} MB/s{left}",
            file=sys.stderr,
            flush=True,
        )

    def _copy(self, name: str, size: int, checksum: str) -> None:
        waits = iter(RETRY_WAITS_S)
        while not self.stop.is_set():
            try:
                if self._go_on(name, size, checksum):
                    return
            except CopyError:
                raise
            except Exception as error:  # each library has its own kinds
                lasts = isinstance(error, FileNotFoundError | PermissionError)
                if lasts or (seconds := next(waits, None)) is None:
                    raise self.origin.failed(name, error) from error
                self.stop.wait(seconds)

    def _go_on(self, name: str, size: int, checksum: str) -> bool:
        """Whether the file is whole now; one that was begun earlier and came out wrong is gone, for another attempt."""
        path = self.folder / name
        has_begun = path.exists() and (self.origin.has_ranges or path.stat().st_size == size)
        with _named(path):
            opened = path.open("r+b" if has_begun else "wb")
        with opened as file:
            digest = xxhash.xxh3_64()
            while has_begun and (chunk := file.read(CHUNK)):
                digest.update(chunk)
            begun = self.earlier[name] = self.done[name] = file.tell()
            for chunk in self.origin.chunks(name, begun, size):
                if self.stop.is_set():
                    return False
                digest.update(chunk)
                with _named(path):
                    file.write(chunk)
                    file.flush()
                self.done[name] += len(chunk)
            if self.done[name] == size and digest.hexdigest() == checksum:
                with _named(path):
                    os.fsync(file.fileno())
                return True
        path.unlink()
        if begun:
            return False
        raise CopyError(
            f"{self.origin.shown}/{name} is not what its {ABOUT} says (size or checksum differ): upload the pack again"
        )


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Raises CopyError for what the disk of the copy says."""
    try:
        yield
    except OSError as error:
        raise CopyError(
            f"cannot write {path} ({error.strerror or error}): see to the disk, or choose another data.cache; the copy then goes on"
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
