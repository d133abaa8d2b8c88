"""Checkpoints are whole or refused: round trips to the bit, every kind of damage, kills in mid-write, hostile files."""

import itertools
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vip import checkpoint
from vip.checkpoint import CheckpointError

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
text = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=6)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    torch.manual_seed(draw(st.integers(0, 99)))
    values = torch.randn(shape) * 3
    values[values > 4] = torch.nan
    return values.nan_to_num().to(draw(st.sampled_from(DTYPES))) if draw(st.booleans()) else values


keys = text | st.integers(0, 12)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | text | tensors()
branches = st.recursive(
    leaves, lambda tree: st.lists(tree, max_size=3) | st.dictionaries(keys, tree, max_size=3), max_leaves=8
)
trees = st.dictionaries(keys, branches, max_size=5)


def save(folder: Path, state: dict[str, Any], keep: int, is_best: bool) -> Path:
    """Through the writer, as a run saves; a failure to write is a failure here."""
    writer = checkpoint.Writer(folder, keep, pytest.fail)
    writer.save(state, is_best)
    assert writer.wait() == state["step"]
    return folder / checkpoint.STEP_FILE.format(state["step"])


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
        assert torch.equal(*bits)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other or (one != one and other != other)


@settings(deadline=None, max_examples=60)
@given(trees)
def test_any_tree_comes_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, tree: dict[Any, Any]) -> None:
    path = tmp_path_factory.mktemp("tree") / "x.safetensors"
    checkpoint.write(path, tree)
    assert_same(checkpoint.read(path).state, tree)


def test_names_that_look_alike_stay_apart(tmp_path: Path) -> None:
    one, two, three = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)
    tree: dict[Any, Any] = {"a/b": one, "a": {"b": two}, 1: three, "1": one, "/1": two, "__metadata__": three}
    checkpoint.write(tmp_path / "x.safetensors", tree)
    assert_same(checkpoint.read(tmp_path / "x.safetensors").state, tree)


def test_an_optimizer_goes_on_from_its_state_in_the_file(tmp_path: Path) -> None:
    def trained(steps: int, reload_at: int | None) -> torch.nn.Linear:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        for step in range(steps):
            if step == reload_at:
                checkpoint.write(tmp_path / "x.safetensors", {"optimizer": optimizer.state_dict()})
                optimizer = torch.optim.AdamW(layer.parameters(), lr=0.5)
                optimizer.load_state_dict(checkpoint.read(tmp_path / "x.safetensors").state["optimizer"])
            layer(torch.full((1, 3), 1.0 + step)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return layer

    assert torch.equal(trained(6, None).weight, trained(6, 3).weight)


def test_shared_and_strided_tensors_are_written_out(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tree = {"step": 1, "whole": base, "turned": base.T, "column": base[:, 1], "again": base}
    checkpoint.write(tmp_path / "x.safetensors", tree)
    assert_same(checkpoint.read(tmp_path / "x.safetensors").state, tree)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A whole checkpoint of step 2 beside a whole one of step 1."""
    for step in (1, 2):
        state = {"step": step, "model": {"w": torch.arange(3.0), "n": torch.tensor(step)}, "progress": {"best": 0.5}}
        path = save(tmp_path, state, keep=2, is_best=False)
    return path


def test_one_flipped_bit_anywhere_is_refused(small: Path) -> None:
    whole = small.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        small.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            checkpoint.read(small)


def test_a_file_cut_short_at_any_length_is_refused(small: Path) -> None:
    whole = small.read_bytes()
    for length in range(len(whole)):
        os.truncate(small, length)
        with pytest.raises(CheckpointError):
            checkpoint.read(small)
        small.write_bytes(whole)


def test_a_zeroed_page_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    checkpoint.write(path, {"step": 1, "w": torch.arange(1, 6000, dtype=torch.int32)})
    whole = path.read_bytes()
    for start in range(0, len(whole), 4096):
        page = whole[start : start + 4096]
        path.write_bytes(whole[:start] + bytes(len(page)) + whole[start + 4096 :])
        with pytest.raises(CheckpointError):
            checkpoint.read(path)


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:-1], lambda b: b[:100] + b"\0" + b[101:], lambda b: bytes(len(b))]
)
def test_the_newest_whole_one_is_used_and_the_damaged_put_aside(small: Path, damage: Callable[[bytes], bytes]) -> None:
    said: list[str] = []
    assert checkpoint.newest(small.parent, said.append).step == 2  # type: ignore[union-attr]
    assert said == []
    damaged = damage(small.read_bytes())
    small.write_bytes(damaged)
    found = checkpoint.newest(small.parent, said.append)
    assert found is not None
    assert found.step == 1
    assert len(said) == 1
    assert str(small) in said[0]
    assert "renamed to step_0000000002.safetensors.damaged" in said[0]
    assert "\n" not in said[0]
    assert not small.exists()
    assert small.with_name(f"{small.name}.damaged").read_bytes() == damaged
    assert checkpoint.newest(small.parent, pytest.fail).step == 1  # type: ignore[union-attr]


def test_a_whole_file_under_the_name_of_another_step_is_put_aside(small: Path) -> None:
    small.write_bytes(small.with_name(checkpoint.STEP_FILE.format(1)).read_bytes())
    said: list[str] = []
    assert checkpoint.newest(small.parent, said.append).step == 1  # type: ignore[union-attr]
    assert "holds step 1, which is not what its name says" in said[0]


def test_one_that_cannot_be_read_is_no_reason_to_go_back(small: Path) -> None:
    small.unlink()
    small.mkdir()  # rights would not stop root
    with pytest.raises(CheckpointError, match="Is a directory"):
        checkpoint.newest(small.parent, pytest.fail)


def test_nothing_to_find(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "nowhere", print) is None
    assert checkpoint.newest(tmp_path, print) is None


def test_where_nothing_whole_is_left_the_run_does_not_begin_anew_unasked(small: Path) -> None:
    for path in small.parent.iterdir():
        path.write_bytes(b"")
    for said in (2, 0):  # the second time nothing is left to be renamed
        warned: list[str] = []
        with pytest.raises(CheckpointError, match="no whole checkpoint is left; delete that folder to begin anew"):
            checkpoint.newest(small.parent, warned.append)
        assert len(warned) == said


def test_the_best_one_is_used_where_no_other_is_whole(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        path = save(tmp_path, {"step": step}, keep=2, is_best=step == 1)
    for path in tmp_path.glob("step_*"):
        path.write_bytes(b"")
    assert checkpoint.newest(tmp_path, lambda _: None).step == 1  # type: ignore[union-attr]


def test_keep_and_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, {"step": step, "w": torch.tensor(step)}, keep=3, is_best=step == 2)
    names = ["best.safetensors", *(f"step_{step:010d}.safetensors" for step in (4, 5, 6))]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    best = checkpoint.read(tmp_path / "best.safetensors")
    assert (best.step, best.state["w"].item()) == (2, 2)


def test_files_beyond_do_not_cost_the_one_just_written(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, {"step": step}, keep=3, is_best=False)
    for step in (12, 14, 16):
        path = save(tmp_path, {"step": step}, keep=2, is_best=False)
        assert checkpoint.read(path).step == step


def test_what_is_saved_is_the_state_of_that_moment(tmp_path: Path) -> None:
    weights = torch.zeros(5_000_000)
    writer = checkpoint.Writer(tmp_path, 99, pytest.fail)
    for step in range(1, 6):
        weights.fill_(step)
        writer.save({"step": step, "w": weights, "n": [step]}, is_best=False)
        weights.fill_(-1)  # while the thread writes
    assert writer.wait() == 5
    for step in range(1, 6):
        state = checkpoint.read(tmp_path / checkpoint.STEP_FILE.format(step)).state
        assert (state["w"].unique().tolist(), state["n"]) == ([step], [step])


def test_training_goes_on_before_a_save_has_ended(tmp_path: Path) -> None:
    folder, heard, said = tmp_path / "checkpoints", threading.Event(), []
    folder.touch()  # a file where the folder should be: the save fails, and ends when its warning has been taken
    writer = checkpoint.Writer(folder, 2, lambda line: said.append((heard.wait(60), line)))
    writer.save({"step": 1, "w": torch.ones(9)}, is_best=False)
    assert writer.busy
    heard.set()
    assert writer.wait() == 0
    assert not writer.busy
    assert [was_heard for was_heard, _ in said] == [True]


def test_a_save_that_fails_is_said_and_the_next_one_tries_again(tmp_path: Path) -> None:
    folder, said = tmp_path / "checkpoints", []
    writer = checkpoint.Writer(folder, 2, said.append)
    writer.save({"step": 1}, is_best=False)
    assert writer.wait() == 1
    folder.rename(tmp_path / "aside")
    folder.touch()  # a file where the folder was
    writer.save({"step": 2}, is_best=True)
    assert writer.wait() == 1
    assert len(said) == 1
    assert "checkpoint of step 2 not written (File exists" in said[0]
    folder.unlink()
    (tmp_path / "aside").rename(folder)
    writer.save({"step": 3}, is_best=False)
    assert writer.wait() == 3
    assert [checkpoint.read(path).step for path in sorted(folder.iterdir())] == [1, 3]


def test_forked_processes_do_not_carry_the_snapshot(tmp_path: Path) -> None:
    writer = checkpoint.Writer(tmp_path, 2, pytest.fail)
    writer.save({"step": 1, "w": torch.ones(1_000_000)}, is_best=False)
    writer.wait()
    regions = Path("/proc/self/smaps").read_text().split("VmFlags:")
    start = f"{writer.memory.buffer.data_ptr():x}-"
    flags = next(after.splitlines()[0] for before, after in itertools.pairwise(regions) if f"\n{start}" in before)
    assert "dc" in flags.split(), "do not copy on fork"


def test_find(tmp_path: Path, small: Path) -> None:
    run = tmp_path / "run"
    save(run / "checkpoints", {"step": 1}, keep=2, is_best=True)
    newest = save(run / "checkpoints", {"step": 2}, keep=2, is_best=False)
    best = run / "checkpoints" / "best.safetensors"
    assert checkpoint.find(run) == checkpoint.find(run / "checkpoints") == checkpoint.find(best) == best
    best.unlink()
    assert checkpoint.find(run) == newest
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty: no checkpoint in this folder"):
        checkpoint.find(tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"nowhere: no such file or folder"):
        checkpoint.find(tmp_path / "nowhere")


def test_ours_and_foreign_files(tmp_path: Path, small: Path) -> None:
    foreign = tmp_path / "weights.safetensors"
    save_file({"w": torch.ones(2)}, foreign)
    assert checkpoint.is_ours(small)
    assert not checkpoint.is_ours(foreign)
    assert checkpoint.read_weights(foreign)["w"].tolist() == [1, 1]
    with pytest.raises(CheckpointError, match="not a checkpoint of this program"):
        checkpoint.read(foreign)
    for path in (tmp_path / "none.pth", tmp_path / "none.safetensors"):
        with pytest.raises(CheckpointError, match="no such file"):
            checkpoint.read_weights(path)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    hostile, proof = tmp_path / "weights.pth", tmp_path / "proof"
    torch.save(
        {"state_dict": {"w": torch.ones(2)}, "x": Payload(proof)}, hostile, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(CheckpointError, match="holds more than tensors") as refused:
        checkpoint.read_weights(hostile)
    assert "\n" not in str(refused.value)
    assert not proof.exists()
    torch.load(hostile, weights_only=False)
    assert proof.exists(), "the payload would have worked"


def _write_forever(path: Path) -> None:
    count = 0
    while True:
        count += 1
        checkpoint.write(path, {"step": 1, "count": count, "w": torch.full((1_000_000,), float(count))})


def test_killed_in_mid_write_the_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "step_0000000001.safetensors"
    draw, cut_in_a_write = random.Random(0), 0
    for _ in range(12):
        writer = multiprocessing.get_context("fork").Process(target=_write_forever, args=(path,))
        writer.start()
        deadline = time.monotonic() + 30
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.06))
        writer.kill()
        writer.join()
        found = checkpoint.read(path)
        assert found.state["w"].unique().tolist() == [found.state["count"]]
        left = [other for other in tmp_path.iterdir() if other != path]
        assert all(other.name.startswith(".") for other in left)
        cut_in_a_write += bool(left)
        save(tmp_path, {"step": 1, "count": 1, "w": torch.ones(1)}, keep=2, is_best=False)
        assert list(tmp_path.iterdir()) == [path], "the next save clears away what a kill has left"
    assert cut_in_a_write > 0, "no kill met a write; the test proved nothing"
