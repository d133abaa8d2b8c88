"""Packs behind URLs: copied once per node, whole or not at all, however the network and the processes fare."""

import http.server
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from data import remote
from data.config import DataConfig
from data.pack import ABOUT, NAMES, About, PackSource, data_file, encode_about
from data.remote import local_copy
from data.sources import open_source, open_sources
from tests.data.made_pack import CLASSES, write_pack

ROOT = Path(__file__).parents[2]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; counts the bytes of what it sent, and may be slow, without ranges, or fail now and then."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.has_ranges = True
        self.piece_s = 0.0
        self.failures: Iterator[bool] = iter(())
        self.sent: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/packs"

    @property
    def data_sent(self) -> int:
        return sum(sent for path, sent in self.sent.items() if path.endswith(".bin"))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed are part of the tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.server.folder / self.path.removeprefix("/packs/")
        if not path.is_file():
            self.send_error(404)
            return
        if next(self.server.failures, False):
            self.send_error(503)
            return
        body = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and self.server.has_ranges:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {asked[1]}-{asked[2]}/{len(body)}")
            body = body[int(asked[1]) : int(asked[2]) + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for at in range(0, len(body) if self.command == "GET" else 0, 4096):
            self.wfile.write(body[at : at + 4096])
            self.server.sent[path.name] = self.server.sent.get(path.name, 0) + len(body[at : at + 4096])
            time.sleep(self.server.piece_s)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def packs(tmp_path: Path) -> Path:
    write_pack(tmp_path / "packs/train", 60)
    write_pack(tmp_path / "packs/val", 12, num_files=1)
    return tmp_path / "packs"


@pytest.fixture
def server(packs: Path) -> Iterator[Server]:
    with Server(packs) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "CHUNK", 5000)
    monkeypatch.setattr(remote, "POLL_S", 0.02)
    monkeypatch.setattr(remote, "RETRY_WAITS_S", (0.01, 0.01, 0.01))


@pytest.fixture(params=["memory", "file", "http", "http without ranges", "folder"])
def root(request: pytest.FixtureRequest, packs: Path, server: Server) -> Iterator[str]:
    if request.param == "memory":
        memory = fsspec.filesystem("memory")
        memory.put(str(packs), "/packs", recursive=True)
        yield "memory://packs"
        memory.rm("/packs", recursive=True)
        return
    server.has_ranges = request.param != "http without ranges"
    yield (
        server.url if request.param.startswith("http") else f"file://{packs}" if request.param == "file" else str(packs)
    )


def test_a_pack_is_copied_and_read_from_the_copy(root: str, packs: Path, tmp_path: Path) -> None:
    config = DataConfig(kind="folder", root=root, cache=str(tmp_path / "cache"))
    train, val = open_sources(config)
    original = PackSource(packs / "train")
    assert (len(train), len(val)) == (60, 12)
    assert [train.name(index) for index in range(60)] == [original.name(index) for index in range(60)]
    assert np.array_equal(train.load(41), original.load(41))
    copy = local_copy(root, "train", config.cache)
    assert content(copy) == content(packs / "train")
    assert copy.is_relative_to(tmp_path / "cache")
    assert sorted(path.name for path in copy.parent.iterdir()) == ["train", "train.lock"]


def test_a_copy_that_is_there_is_not_made_again(server: Server, tmp_path: Path) -> None:
    first = local_copy(server.url, "train", str(tmp_path / "cache"))
    server.sent.clear()
    assert local_copy(server.url, "train", str(tmp_path / "cache")) == first
    assert set(server.sent) == {ABOUT}


def test_validation_alone_copies_no_training_images(server: Server, tmp_path: Path) -> None:
    val = open_source(DataConfig(kind="imagenet", root=server.url, num_classes=2, cache=str(tmp_path / "cache")), "val")
    assert len(val) == 12
    assert not list((tmp_path / "cache").glob("*/train"))


def test_another_pack_at_the_same_place_is_another_copy(server: Server, packs: Path, tmp_path: Path) -> None:
    first = local_copy(server.url, "train", str(tmp_path / "cache"))
    shutil.rmtree(packs / "train")
    write_pack(packs / "train", 40)
    second = local_copy(server.url, "train", str(tmp_path / "cache"))
    assert first != second
    assert len(PackSource(second)) == 40
    assert len(PackSource(first)) == 60


def copying(url: str, cache: Path) -> "subprocess.Popen[str]":
    code = (
        "import sys; from data import remote; remote.CHUNK = 5000; remote.NUM_STREAMS = 2\n"
        "print(remote.local_copy(sys.argv[1], 'train', sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, url, str(cache)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_of_a_node_copy_once(server: Server, packs: Path, tmp_path: Path) -> None:
    server.piece_s = 0.01
    together = [copying(server.url, tmp_path / "cache") for _ in range(3)]
    said = [process.communicate(timeout=60) for process in together]
    assert len({out for out, _ in said}) == 1
    assert sorted(err.count("copying") for _, err in said) == [0, 0, 1], said
    assert server.data_sent == sum(path.stat().st_size for path in (packs / "train").glob("*.bin"))


@pytest.mark.parametrize("has_ranges", [True, False])
def test_killed_again_and_again_it_goes_on_where_it_was(
    server: Server, packs: Path, tmp_path: Path, has_ranges: bool
) -> None:
    server.has_ranges, server.piece_s = has_ranges, 0.01
    size = sum(path.stat().st_size for path in (packs / "train").glob("*.bin"))
    for kill in range(1, 3):
        with copying(server.url, tmp_path / "cache") as process:
            while server.data_sent < kill * size // 3 and process.poll() is None:
                time.sleep(0.002)
            process.kill()
            assert process.wait() == -signal.SIGKILL
        assert not list((tmp_path / "cache").glob("*/train"))
    server.piece_s = 0.0
    copy = local_copy(server.url, "train", str(tmp_path / "cache"))
    assert content(copy) == content(packs / "train")
    if has_ranges:
        assert server.data_sent < 1.5 * size


def damage(path: Path, at: int = 100) -> None:
    good = path.read_bytes()
    path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("change", [damage, cut_short, lengthen])
def test_a_file_that_is_not_what_pack_json_says_is_named(
    server: Server, packs: Path, tmp_path: Path, change: Callable[[Path], None], has_ranges: bool
) -> None:
    server.has_ranges = has_ranges
    change(packs / "train/data-00001.bin")
    if change is lengthen and has_ranges:  # what is more was not asked for
        assert len(PackSource(local_copy(server.url, "train", str(tmp_path / "cache")))) == 60
        return
    with pytest.raises(ValueError, match=r"train/data-00001.bin is not what its pack.json says") as refused:
        local_copy(server.url, "train", str(tmp_path / "cache"))
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "cache").glob("*/train"))


def test_what_was_damaged_in_an_interrupted_copy_is_copied_anew(server: Server, packs: Path, tmp_path: Path) -> None:
    (packs / "train/data-00002.bin").rename(packs / "data-00002.bin")
    with pytest.raises(OSError, match=r"cannot read .*train/data-00002.bin"):
        local_copy(server.url, "train", str(tmp_path / "cache"))
    (packs / "data-00002.bin").rename(packs / "train/data-00002.bin")
    (unfinished,) = (tmp_path / "cache").glob("*/train.unfinished")
    for name, ruin in ((data_file(0), damage), (data_file(1), lengthen), (NAMES, cut_short)):
        shutil.copy(packs / "train" / name, unfinished)
        ruin(unfinished / name)
    assert content(local_copy(server.url, "train", str(tmp_path / "cache"))) == content(packs / "train")


def test_a_server_that_fails_now_and_then_is_asked_again(server: Server, packs: Path, tmp_path: Path) -> None:
    server.failures = iter([False, False, *(number % 3 == 0 for number in range(9))])
    assert content(local_copy(server.url, "train", str(tmp_path / "cache"))) == content(packs / "train")


def test_a_server_that_goes_away_is_named(server: Server, tmp_path: Path) -> None:
    server.failures = iter([False, False, *[True] * 1000])
    with pytest.raises(OSError, match=r"cannot read http://127.*: check address, network and credentials") as failed:
        local_copy(server.url, "train", str(tmp_path / "cache"))
    assert "\n" not in str(failed.value)
    with pytest.raises(OSError, match=r"cannot read http://127.0.0.1:9/x/train/pack.json"):
        local_copy("http://me:secret@127.0.0.1:9/x", "train", str(tmp_path / "cache"))


def test_class_folders_behind_a_url_are_to_be_packed_first(server: Server, packs: Path, tmp_path: Path) -> None:
    (packs / "train" / ABOUT).unlink()
    for root in (server.url, str(packs)):
        with pytest.raises(
            ValueError, match=r"packs/train holds no pack .*pack the class folders first by scripts/pack.py"
        ):
            open_source(DataConfig(kind="folder", root=root, cache=str(tmp_path / "cache")), "train")


def test_a_url_that_no_library_knows_says_what_to_install() -> None:
    with pytest.raises(ValueError, match=r"data.root=gopher://x/train: no such kind of URL"):
        local_copy("gopher://x", "train", "cache")
    if importlib.util.find_spec("s3fs") is None:
        with pytest.raises(
            ValueError, match=r"needs s3fs, which is not installed: pip install s3fs \(the extra `s3`\)"
        ):
            local_copy("s3://bucket/x", "train", "cache")


@pytest.mark.parametrize("name", ["../escaped", "/etc/escaped", "a/b", ".hidden", ABOUT, "a b"])
def test_a_pack_cannot_name_files_elsewhere(packs: Path, tmp_path: Path, name: str) -> None:
    about = About("lossless", {}, CLASSES, {name: (10, "0" * 16)}, {"images": 60})
    (packs / "train" / ABOUT).write_text(encode_about(about))
    with pytest.raises(ValueError, match=r"lists .* which no pack has"):
        local_copy(str(packs), "train", str(tmp_path / "cache"))
    assert not (tmp_path / "cache/escaped").exists()


def test_a_pack_json_of_another_version_or_damaged_is_refused(packs: Path, tmp_path: Path) -> None:
    path = packs / "train" / ABOUT
    for text in (path.read_text().replace('"version": 1', '"version": 99'), json.dumps([]), "<html>"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"packs/train: .*pack.json is no pack's") as refused:
            local_copy(str(packs), "train", str(tmp_path / "cache"))
        assert "\n" not in str(refused.value)


def test_a_copy_that_does_not_fit_is_refused_before_it_begins(packs: Path, tmp_path: Path) -> None:
    about = About("lossless", {}, CLASSES, {data_file(0): (10**18, "0" * 16)}, {"images": 60})
    (packs / "train" / ABOUT).write_text(encode_about(about))
    with pytest.raises(ValueError, match=r"GB free, and the copy of .*train takes 1000000000.0 GB: make room"):
        local_copy(str(packs), "train", str(tmp_path / "cache"))


def test_a_cache_that_cannot_be_written_is_named(packs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data.cache=.*/file: cannot be written"):
        local_copy(str(packs), "train", str(tmp_path / "file"))
