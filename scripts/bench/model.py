"""`benchmark.py model`: a network's forward pass and training step, timed, counted, and held against what the device can do.

All candidates of a number format take turns; every figure of time is a median. Speeds are of the wall's clock, on one
GPU or on this process' CPU threads.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import vip  # noqa: F401 (registers the models)
from scripts.bench.literal import make_literal
from scripts.bench.timing import interleaved
from scripts.bench.traffic import category, count
from vip.models.build import compile_model
from vip.precision import DTYPES

OURS = ("vip_s16", "vip_s14", "vip_s7", "vip_m7", "vip_l7")
PEERS = ("resmlp_24_224", "mixer_b16_224", "gmlp_s16_224", "convnext_tiny", "deit_small_patch16_224")
SIZE = 224
NUM_CLASSES = 1000
MATRIX = 4096  # rows and columns of the product that tells a device's rate
VECTOR = 1 << 26  # elements of the copy that tells its bandwidth
Row = dict[str, object]


class Candidate:
    """One network in one number format, eager or compiled; `literal/NAME` is NAME as its equations are written down."""

    def __init__(self, name: str, precision: str, is_compiled: bool, batch: int, device: torch.device) -> None:
        self.label = f"{name}{', compiled' if is_compiled else ''}"
        self.dtype, self.device = DTYPES[precision], device
        self.model = build(name).to(device).train()
        if is_compiled:
            compile_model(self.model)
        self.images = torch.randn(batch, 3, SIZE, SIZE, device=device)
        self.labels = torch.randint(NUM_CLASSES, (batch,), device=device)

    def forward(self) -> int:
        with torch.no_grad(), self._autocast():
            self.model(self.images)
        return self._done()

    def train(self) -> int:
        """Forward, backward; no optimizer, whose time depends on the parameters alone."""
        self.model.zero_grad(set_to_none=True)
        self._loss().backward()
        return self._done()

    def memory(self) -> int | None:
        """The peak of a training step in bytes, on a GPU; None elsewhere."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        self.train()
        return torch.cuda.max_memory_allocated(self.device)

    def shares(self) -> dict[str, float]:
        """Of a training step's time in operations, what each category takes, in percent."""
        on_gpu = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
        with profile(activities=activities) as profiled:
            self.train()
        times: Counter[str] = Counter()
        for event in profiled.key_averages():
            if event.key.startswith("aten::"):
                spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                times[category(event.key.removeprefix("aten::"))] += spent
        total = sum(times.values())
        return {name: 100 * spent / total for name, spent in times.items()}

    def _loss(self) -> Tensor:
        with self._autocast():
            logits = self.model(self.images)
        return F.cross_entropy(logits.float(), self.labels)

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _done(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return len(self.images)


def build(name: str) -> nn.Module:
    """A network of timm's by its name, or the literal form of one of ours as `literal/NAME`."""
    is_literal, name = name.startswith("literal/"), name.removeprefix("literal/")
    if not timm.is_model(name) or (is_literal and name not in OURS):
        raise ValueError(f"--networks {name}: no such network; take names of timm.list_models(), or literal/{OURS[2]}")
    model = timm.create_model(name, num_classes=NUM_CLASSES)
    return make_literal(model) if is_literal else model


def speeds(names: list[str], precision: str, modes: list[str], batch: int, rounds: int) -> Iterator[Row]:
    """A row for each network, eager and compiled, in `precision`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("--precisions fp16: needs a CUDA device; take fp32 or bf16")
    candidates = [Candidate(name, precision, mode == "compiled", batch, device) for mode in modes for name in names]
    forward = interleaved({each.label: each.forward for each in candidates}, rounds, time.perf_counter)
    train = interleaved({each.label: each.train for each in candidates}, rounds, time.perf_counter)
    rate, bandwidth = matrix_rate(DTYPES[precision], device, rounds), memory_bandwidth(device, rounds)
    for each, name in zip(candidates, names * len(modes), strict=True):
        flops, memory, speed = step_flops(name), each.memory(), train[each.label]
        yield {
            "network": each.label,
            "format": precision,
            "forward images/s": round(forward[each.label], 1),
            "train images/s": round(speed, 1),
            "train GFLOP": round(flops / 1e9, 1),
            "MFU %": round(100 * speed * flops / rate, 1),
            "memory limit %": round(100 * speed * step_bytes(name, precision) / bandwidth, 1),
            "peak MiB": None if memory is None else round(memory / 2**20),
        }


def shares(names: list[str], precision: str, batch: int) -> Iterator[Row]:
    """Where the time of an eager training step goes, in percent."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in names:
        candidate = Candidate(name, precision, False, batch, device)
        candidate.train()
        yield {"network": name, "format": precision} | {
            key: round(value, 1) for key, value in candidate.shares().items()
        }


def traffic(names: list[str], batch: int = 32) -> Iterator[Row]:
    """Megabytes that a training step in fp16 moves per image, eager, by category: counted, so equal on every machine."""
    for name in names:
        moved = count(lambda name=name: build(name), batch, torch.float16)  # type: ignore[misc]
        total = {"network": name, "MB an image": round(sum(moved.values()) / 1e6)}
        yield total | {key: round(value / 1e6) for key, value in moved.items()}


def step_flops(name: str) -> int:
    """Floating-point operations of a training step of one image, multiplication and addition apart."""
    with torch.device("meta"):
        model, images = build(name), torch.empty(1, 3, SIZE, SIZE)
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    return counter.get_total_flops()


def step_bytes(name: str, precision: str) -> int:
    """What a training step must move at least per image: the inputs and outputs of its products, all else being fused."""
    return count(lambda: build(name), 32, DTYPES[precision])["products"]


def matrix_rate(dtype: torch.dtype, device: torch.device, rounds: int) -> float:
    """Operations per second of a large product, which is the most that a network can have."""
    side = MATRIX if device.type == "cuda" else MATRIX // 4
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return _rate(lambda: one @ other, 2 * side**3, device, rounds)


def memory_bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.empty(VECTOR, device=device).fill_(1)
    target = torch.empty_like(source)
    return _rate(lambda: target.copy_(source), 2 * source.nbytes, device, rounds)


def _rate(work: Callable[[], object], amount: int, device: torch.device, rounds: int) -> float:
    def once() -> int:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return amount

    return interleaved({"": once}, rounds, time.perf_counter)[""]
