"""Checkpoints are whole or refused: round trips to the bit, every kind of damage, kills in mid-write, hostile files."""

import multiprocessing
import os
import random
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
        path = checkpoint.save(tmp_path, state, keep=2, is_best=False)
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
def test_the_newest_whole_one_is_used_and_the_damaged_named(small: Path, damage: Callable[[bytes], bytes]) -> None:
    said: list[str] = []
    assert checkpoint.newest(small.parent, said.append).step == 2  # type: ignore[union-attr]
    assert said == []
    small.write_bytes(damage(small.read_bytes()))
    found = checkpoint.newest(small.parent, said.append)
    assert found is not None
    assert found.step == 1
    assert len(said) == 1
    assert str(small) in said[0]
    assert "\n" not in said[0]


def test_nothing_to_find(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "nowhere", print) is None
    (tmp_path / "step_0000000001.safetensors").touch()
    assert checkpoint.newest(tmp_path, lambda _: None) is None


def test_keep_and_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        checkpoint.save(tmp_path, {"step": step, "w": torch.tensor(step)}, keep=3, is_best=step == 2)
    names = ["best.safetensors", *(f"step_{step:010d}.safetensors" for step in (4, 5, 6))]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    best = checkpoint.read(tmp_path / "best.safetensors")
    assert (best.step, best.state["w"].item()) == (2, 2)


def test_damaged_newer_files_do_not_cost_the_one_just_written(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, {"step": step}, keep=3, is_best=False)
    for step in (20, 30):
        os.truncate(tmp_path / f"step_{step:010d}.safetensors", 9)
    for step in (12, 14, 16):
        checkpoint.save(tmp_path, {"step": step}, keep=2, is_best=False)
        assert checkpoint.newest(tmp_path, lambda _: None).step == step  # type: ignore[union-attr]


def test_find(tmp_path: Path, small: Path) -> None:
    run = tmp_path / "run"
    checkpoint.save(run / "checkpoints", {"step": 1}, keep=2, is_best=True)
    newest = checkpoint.save(run / "checkpoints", {"step": 2}, keep=2, is_best=False)
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
    step = 0
    while True:
        step += 1
        checkpoint.write(path, {"step": step, "w": torch.full((1_000_000,), float(step))})


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
        assert found.state["w"].unique().tolist() == [found.step]
        left = [other for other in tmp_path.iterdir() if other != path]
        assert all(other.name.startswith(".") for other in left)
        cut_in_a_write += bool(left)
        checkpoint.save(tmp_path, {"step": 1, "w": torch.ones(1)}, keep=2, is_best=False)
        assert list(tmp_path.iterdir()) == [path], "the next save clears away what a kill has left"
    assert cut_in_a_write > 0, "no kill met a write; the test proved nothing"
