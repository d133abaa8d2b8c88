"""The three archives of image-net.org as parts: one for each class of training, slices of the validation images.

Nothing but regular files with the names that ImageNet uses comes out of them, whatever an archive holds. Every part opens
its archive by itself and reads on from where its members begin, so that as many are read at once as there are processes.
"""

import contextlib
import hashlib
import io
import json
import re
import tarfile
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import scipy.io  # type: ignore[import-untyped]

from data.config import IMAGENET
from data.decode import MAX_BYTES
from scripts.prepare.images import Part, Source, fingerprint, write_whole
from scripts.prepare.report import Report

NAMES = {
    "train": "ILSVRC2012_img_train.tar",
    "val": "ILSVRC2012_img_val.tar",
    "devkit": "ILSVRC2012_devkit_t12.tar.gz",
}
MD5 = {
    "train": "1d675b47d978889d74fa0da5fadfb00e",
    "val": "29b22e2961454d5413ddabcf34fc5622",
    "devkit": "fa75699e90414af021442c21a62c3abf",
}
WNID = r"n\d{8}"
VAL_IMAGE = r"ILSVRC2012_val_(\d{8})\.JPEG"
SLICE = 500  # validation images in a part
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Devkit:
    """What the devkit knows: the classes, sorted; training images of each; the class of each validation image, by number."""

    classes: tuple[str, ...]
    num_train: dict[str, int]
    val_classes: tuple[str, ...]


def read_devkit(path: Path) -> Devkit:
    """Reads the archive without unpacking it. Raises ValueError where it is not the devkit."""
    try:
        with tarfile.open(path, "r:gz") as tar:
            meta, truth = (
                _content(tar, f"ILSVRC2012_devkit_t12/data/{name}")
                for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
            )
        synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        leaves = [synset for synset in synsets if int(synset["num_children"]) == 0]  # the others contain classes
        names = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in leaves}
        num_train = {str(synset["WNID"]): int(synset["num_train_images"]) for synset in leaves}
        val_classes = tuple(names[int(line)] for line in truth.split())
    except Exception as error:  # gzip, tarfile and scipy have a dozen kinds
        raise ValueError(
            f"{path} is not the devkit ({type(error).__name__}: {' '.join(str(error).split())[:200]}): download it again"
        ) from error
    check_classes(list(num_train), str(path))
    return Devkit(tuple(sorted(num_train)), num_train, val_classes)


def check_classes(classes: Sequence[str], where: str) -> None:
    """Raises ValueError unless they are names of classes, each once."""
    strange = [name for name in classes if not re.fullmatch(WNID, name, re.ASCII)]
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if strange or twice or not classes:
        what = f"{(strange + twice)[0]!r}" if classes else "nothing"
        raise ValueError(f"{where} has {what} in its list of classes: needed are names like n01440764, each once")


def open_archives(train: Path, val: Path, devkit: Path, verified: bool) -> Source:
    """The archives as a source; `verified` where their MD5 sums are the published ones."""
    kit = read_devkit(devkit)
    parts: list[Part] = [*train_parts(train, kit.num_train), *val_parts(val, kit.val_classes)]
    num_bytes = train.stat().st_size + val.stat().st_size
    return Source(parts, kit.classes, fingerprint([train, val, devkit]), expected(kit, verified), num_bytes)


def expected(kit: Devkit, verified: bool = False) -> dict[str, int]:
    """Number of images in each split, and in each class unless it is the published set, whose sums say it all."""
    totals = {"train": sum(kit.num_train.values()), "val": len(kit.val_classes)}
    if verified:
        return IMAGENET
    in_train = {f"train/{wnid}": count for wnid, count in kit.num_train.items()}
    return totals | in_train | {f"val/{wnid}": count for wnid, count in Counter(kit.val_classes).items()}


def check_md5(archives: dict[str, Path], notes: Path, report: Report) -> None:
    """Compares the archives, by kind, with the published sums; those that the file `notes` knows were compared earlier.

    Raises ValueError for the first that differs.
    """
    known = json.loads(notes.read_text("ascii")) if notes.exists() else {}
    now = fingerprint(list(archives.values()))
    archives = {kind: path for kind, path in archives.items() if known.get(path.name) != now[path.name]}
    if archives:
        _compare_md5(archives, report)
        write_whole(notes, json.dumps(known | now))


def _compare_md5(archives: dict[str, Path], report: Report) -> None:
    sizes = {kind: path.stat().st_size for kind, path in archives.items()}
    read = dict.fromkeys(archives, 0)
    stop = threading.Event()  # or Ctrl-C would wait for the end of the file

    def md5(kind: str) -> str:
        digest = hashlib.md5(usedforsecurity=False)
        with archives[kind].open("rb", buffering=0) as file:
            while not stop.is_set() and (block := file.read(READ_BYTES)):
                digest.update(block)  # lets the other threads run
                read[kind] += len(block)
        return digest.hexdigest()

    with report.progress("checking MD5 sums", sum(sizes.values()), "MB", 1e-6) as bar, ThreadPoolExecutor() as pool:
        sums = {kind: pool.submit(md5, kind) for kind in archives}
        try:
            while wait(sums.values(), 0.2).not_done:
                bar.update(sum(read.values()))
        finally:
            stop.set()
        bar.update(sum(read.values()))
    for kind, found in sums.items():
        if found.result() != MD5[kind]:
            raise ValueError(
                f"{archives[kind]} has the MD5 sum {found.result()} instead of {MD5[kind]}: it is damaged, download it again; "
                "or give --skip-md5 if somebody has packed it anew"
            )


@dataclass(frozen=True)
class ClassArchive:
    """The training images of one class: a tar of `size` bytes inside the training archive, from `offset` on."""

    archive: Path
    offset: int
    size: int
    wnid: str
    num_images: int

    @property
    def key(self) -> str:
        return f"train-{self.wnid}"

    def images(self) -> Iterator[tuple[str, bytes]]:
        where = f"{self.archive.name}, {self.wnid}.tar"
        place = tarfile.TarInfo()
        place.offset_data, place.size = self.offset, self.size
        seen = set()
        with _one_line(where), tarfile.open(self.archive, "r:") as outer:
            inner = outer.extractfile(place)  # ends where the class ends, whatever the tar in it claims
            assert inner is not None  # a new TarInfo is a regular file
            for member, tar in _members(inner, where, rf"{self.wnid}_\d+\.JPEG"):
                if member.name in seen:
                    raise ValueError(
                        f"{where}: {member.name!r} is there twice: not the published archive, download it again"
                    )
                seen.add(member.name)
                content = tar.extractfile(member)
                assert content is not None  # it is a regular file
                yield f"train/{self.wnid}/{member.name}", content.read()


def train_parts(archive: Path, num_train: dict[str, int]) -> list[ClassArchive]:
    """One for each of the classes `num_train`, which are all there, and nothing else. Raises ValueError otherwise."""
    with archive.open("rb") as file, _one_line(archive.name):
        parts = [
            ClassArchive(archive, member.offset_data, member.size, wnid, num_train.get(wnid, 0))
            for member, _ in _members(file, archive.name, rf"{WNID}\.tar", None)
            for wnid in [member.name.removesuffix(".tar")]
        ]
    _check_names([part.wnid for part in parts], num_train, f"{archive.name} and the devkit do not agree on classes")
    return parts


@dataclass(frozen=True)
class ValSlice:
    """Some of the validation images: (path in the tree, offset in the archive, bytes) of each."""

    archive: Path
    number: int
    members: tuple[tuple[str, int, int], ...]

    @property
    def key(self) -> str:
        return f"val-{self.number:04d}"

    @property
    def num_images(self) -> int:
        return len(self.members)

    def images(self) -> Iterator[tuple[str, bytes]]:
        with self.archive.open("rb") as file:
            for path, offset, size in self.members:
                file.seek(offset)
                content = file.read(size)
                if len(content) != size:
                    raise ValueError(f"{self.archive} ends inside {path!r}: download it again")
                yield path, content


def val_parts(archive: Path, val_classes: Sequence[str]) -> list[ValSlice]:
    """The images by class, which follows from the number in their names. Raises ValueError for missing or other members."""
    members, numbers = [], []
    with archive.open("rb") as file, _one_line(archive.name):
        for member, _ in _members(file, archive.name, VAL_IMAGE):
            numbers.append(int(member.name[-13:-5]))
            if not 1 <= numbers[-1] <= len(val_classes):
                raise ValueError(
                    f"{archive.name}: {member.name!r} is not one of the {len(val_classes):,} images of the devkit's list"
                )
            path = f"val/{val_classes[numbers[-1] - 1]}/{member.name}"
            members.append((path, member.offset_data, member.size))
    wanted = range(1, len(val_classes) + 1)
    _check_names(numbers, wanted, f"{archive.name} and the devkit do not agree on images")
    slices = range(0, len(members), SLICE)
    return [ValSlice(archive, first // SLICE, tuple(members[first : first + SLICE])) for first in slices]


def _members(
    file: IO[bytes], where: str, pattern: str, max_bytes: int | None = MAX_BYTES
) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Every member of a tar; a name off the pattern, a link, a folder, a device or a file with holes is refused."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            regular = member.isreg() and not member.issparse() and (max_bytes is None or member.size <= max_bytes)
            if not regular or not re.fullmatch(pattern, member.name, re.ASCII):
                raise ValueError(
                    f"{where}: {member.name!r} is no file of ImageNet's: not the published archive, download it again"
                )
            yield member, tar


def _content(tar: tarfile.TarFile, name: str) -> bytes:
    member = tar.getmember(name)
    content = tar.extractfile(member) if member.isreg() and not member.issparse() else None
    if content is None or member.size > MAX_BYTES:
        raise ValueError(f"{name!r} is not a regular file")
    return content.read()


def _check_names(found: Sequence[object], wanted: Collection[object], problem: str) -> None:
    """Raises ValueError unless each of `wanted` is there once, and no other."""
    lists = {
        "lacks": sorted(set(wanted) - set(found), key=str),
        "adds": sorted(set(found) - set(wanted), key=str),
        "repeats": [name for name, count in Counter(found).items() if count > 1],
    }
    if any(lists.values()):
        said = [f"it {what} {len(names):,} ({names[0]} ...)" for what, names in lists.items() if names]
        raise ValueError(f"{problem}: {', '.join(said)}; download it again")


@contextlib.contextmanager
def _one_line(where: str) -> Iterator[None]:
    """Raises ValueError in place of what tarfile says of damage."""
    try:
        yield
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{where} is damaged ({' '.join(str(error).split())}): download it again") from error
