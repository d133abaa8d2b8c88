"""Checkpoint files that are no longer what was written, in every way that disks, copies and people have of doing it."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

from scripts.faults.launch import Numbers
from scripts.faults.resume import differing_leaves
from vip import checkpoint
from vip.checkpoint import STEP_FILE

PAGE = 4096
Damage = Callable[[bytes, bytes, random.Random], bytes]


def training_state(step: int, network: str = "vip_tiny", num_classes: int = 10) -> dict[str, Any]:
    """What a run saves: network, averages and AdamW's moments, random, after `step`."""
    torch.manual_seed(step)
    model = timm.create_model(network, num_classes=num_classes)
    average = {name: tensor + torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    whole = {"model": model.state_dict(), "ema": average, "optimizer": optimizer.state_dict(), "scaler": {}}
    return {"step": step, **whole, "progress": {"step": step, "best_top1": 12.5}}


def flip_bit(whole: bytes, other: bytes, draw: random.Random) -> bytes:
    position = draw.randrange(len(whole))
    return whole[:position] + bytes([whole[position] ^ 1 << draw.randrange(8)]) + whole[position + 1 :]


def truncate(whole: bytes, other: bytes, draw: random.Random) -> bytes:
    return whole[: draw.randrange(len(whole))]


def zero_page(whole: bytes, other: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(whole) // PAGE) * PAGE
    return whole[:start] + bytes(PAGE) + whole[start + PAGE :]


def swap(whole: bytes, other: bytes, draw: random.Random) -> bytes:
    """The whole checkpoint of another step, under this one's name."""
    return other


def garble_header(whole: bytes, other: bytes, draw: random.Random) -> bytes:
    garbage = draw.randbytes(draw.randint(1, PAGE))
    start = draw.choice([0, 8, draw.randrange(PAGE)])  # the header's length, its first byte, or somewhere in it
    return whole[:start] + garbage + whole[start + len(garbage) :]


DAMAGES: tuple[Damage, ...] = (flip_bit, truncate, zero_page, swap, garble_header)


def damage(count: int, folder: Path) -> Numbers:
    """Damage the newest of three checkpoints `count` times and ask for the newest one.

    Numbers: `damaged`, by kind too; `undetected`, where it was taken or not named; `no_fallback`, where something else than
    the whole one before it came back.
    """
    draw, counts = random.Random(0), Counter({"damaged": 0, "undetected": 0, "no_fallback": 0})
    for step in (1, 2, 3):
        checkpoint.write(folder / STEP_FILE.format(step), training_state(step))
    before = checkpoint.read(folder / STEP_FILE.format(2)).state
    newest = folder / STEP_FILE.format(3)
    whole, other = newest.read_bytes(), (folder / STEP_FILE.format(1)).read_bytes()
    for number in range(count):
        kind = DAMAGES[number % len(DAMAGES)]
        content = kind(whole, other, draw)
        if content == whole:  # a page of zeros before it was zeroed: nothing to detect
            continue
        newest.write_bytes(content)
        said: list[str] = []
        found = checkpoint.newest(folder, said.append)
        counts.update(["damaged", kind.__name__])
        detected = len(said) == 1 and newest.name in said[0] and "\n" not in said[0]
        counts["undetected"] += not detected
        counts["no_fallback"] += found is None or bool(differing_leaves(found.state, before))
        for left in folder.glob(f"{newest.name}*"):
            left.unlink()
    return dict(counts)
