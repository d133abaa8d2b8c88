"""`benchmark.py model`: a network's forward pass and training step, timed, counted, and held against what the device can do.

All candidates of a number format take turns; every figure of time is a median. Speeds are by the wall's clock on a GPU,
by CPU time elsewhere, where other processes would otherwise be measured as well. There, each candidate has a process:
how fast memory is had from the system depends on what was asked of it before.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch._inductor.utils import fresh_cache

from scripts.bench import compiled, traffic
from scripts.bench.candidate import LITERAL, Candidate, Isolated, build, image_size
from scripts.bench.shares import shares
from scripts.bench.timing import interleaved
from vip.mfu import matrix_rate, step_flops
from vip.models.permutator import VisionPermutator
from vip.precision import DTYPES, Precision, PrecisionConfig

OURS = ("vip_s16", "vip_s14", "vip_s7", "vip_m7", "vip_l7")
PEERS = ("resmlp_24_224", "mixer_b16_224", "gmlp_s16_224", "convnext_tiny", "deit_small_patch16_224")
MODES = ("eager", "compiled")
COUNTED_BATCH = 32
VECTOR = 1 << 26  # elements of the copy that tells a device's bandwidth
Row = dict[str, object]
Say = Callable[[str], object]
Clock = Callable[[], float]


def measure(
    names: list[str], precisions: list[str] | None, modes: list[str], batch: int | None, rounds: int | None, say: Say
) -> dict[str, list[Row]]:
    """Tables by title; None takes what suits the device. Raises ValueError for what it does not have."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    names = names or [*OURS, f"{LITERAL}vip_s7", *PEERS]
    precisions = _precisions(precisions, device)
    batch, rounds = batch or (64 if on_gpu else 2), rounds or (7 if on_gpu else 3)
    for name in names:
        traffic.without_values(partial(build, name))
    clock = time.perf_counter if on_gpu else time.process_time
    limits = {precision: _limits(DTYPES[precision], device, rounds, clock) for precision in precisions}
    speeds = []
    for precision in precisions:
        with fresh_cache():  # what an earlier run has compiled would make compilation look fast
            torch._dynamo.reset()
            torch._dynamo.config.cache_size_limit = 256  # for all of them together
            ready, failed = _ready(names, precision, modes, batch, device, say)
            say(f"{precision}: {rounds} rounds")
            speeds += [*_speeds(ready, *limits[precision], rounds), *failed]
        for each in ready:
            if isinstance(each, Isolated):
                each.close()
    return {
        "the device's limits": [
            {"format": precision, "products GFLOP/s": round(rate / 1e9), "memory GB/s": round(bandwidth / 1e9, 1)}
            for precision, (rate, bandwidth) in limits.items()
        ],
        f"speed at batch {batch}": speeds,
        "share of an eager training step's time, %": list(_shares(names, precisions, batch, device, say)),
        "MB moved per image, a training step in fp16": list(_traffic(names, say)),
    }


def _precisions(wanted: list[str] | None, device: torch.device) -> list[str]:
    """Those wanted, or all that the device has; float32 products are TF32 then, where it has that, as in training."""
    found = []
    for name in wanted or DTYPES:
        try:
            Precision(PrecisionConfig(name), device)  # type: ignore[arg-type]
        except ValueError:
            if wanted:
                raise
        else:
            found.append(name)
    return found


def _limits(dtype: torch.dtype, device: torch.device, rounds: int, clock: Clock) -> tuple[float, float]:
    """Operations per second in products, and bytes per second of memory."""
    return matrix_rate(dtype, device, clock), memory_bandwidth(device, rounds, clock)


def _ready(
    names: list[str], precision: str, modes: list[str], batch: int, device: torch.device, say: Say
) -> tuple[list[Candidate | Isolated], list[Row]]:
    """Candidates that have run once, and a row for each that could not, with the reason."""
    ready: list[Candidate | Isolated] = []
    failed: list[Row] = []
    for mode in modes:
        for name in names:
            say(f"{name} in {precision}, {mode}: first passes")
            try:
                candidate = (Candidate if device.type == "cuda" else Isolated)(name, mode, precision, batch, device)
                candidate.prepare()
            except (RuntimeError, MemoryError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                failed.append({"network": name, "format": precision, "mode": mode, "note": reason[:60]})
            else:
                ready.append(candidate)
    return ready, failed


def _speeds(ready: list[Candidate | Isolated], rate: float, bandwidth: float, rounds: int) -> Iterator[Row]:
    """A row for each; the roofline is the speed at which products, or the bytes of their operands, take all the time."""
    forward, train = (_medians(ready, work, rounds) for work in ("forward", "train"))
    for each in ready:
        key, flops = _key(each), _flops(each.name)
        roofline = min(rate / flops, bandwidth / _moved(each.name, each.precision)["products"])
        row: Row = {"network": each.name, "format": each.precision, "mode": each.mode}
        row |= {"forward images/s": _short(forward[key]), "train images/s": _short(train[key])}
        literal = f"{LITERAL}{each.name.removeprefix(LITERAL)}, {ready[0].mode}"
        if literal in train:
            row |= {"forward x literal": round(forward[key] / forward[literal], 2)}
            row |= {"train x literal": round(train[key] / train[literal], 2)}
        row |= {"train GFLOP": round(flops / 1e9, 1), "MFU %": round(100 * train[key] * flops / rate, 1)}
        row |= {"roofline %": round(100 * train[key] / roofline, 1)}
        row |= {f"{'peak' if each.device.type == 'cuda' else 'stored'} MiB": round(each.memory / 2**20)}
        yield row if each.compile_s is None else row | {"compile s": round(each.compile_s, 1)}


def _medians(ready: list[Candidate | Isolated], work: str, rounds: int) -> dict[str, float]:
    turns = [{_key(each): each.speed(work) for each in ready} for _ in range(1 + rounds)]
    return {key: statistics.median(turn[key] for turn in turns[1:]) for key in turns[0]}  # the first warms up


def _key(candidate: Candidate | Isolated) -> str:
    return f"{candidate.name}, {candidate.mode}"


def _short(speed: float) -> float:
    return round(speed, 1) if speed < 100 else round(speed)


def _shares(names: list[str], precisions: list[str], batch: int, device: torch.device, say: Say) -> Iterator[Row]:
    for precision in precisions:
        for name in names:
            say(f"{name} in {precision}: where the time goes")
            row: Row = {"network": name, "format": precision}
            try:
                found = shares(Candidate(name, "eager", precision, batch, device))
            except (RuntimeError, MemoryError):
                continue  # the table of speeds says why
            yield row | {category: round(value, 1) for category, value in found.items()}


def _traffic(names: list[str], say: Say) -> Iterator[Row]:
    for name in names:
        say(f"{name}: bytes")
        moved = _moved(name, "fp16")
        row: Row = {"network": name, "eager": round(moved.total() / 1e6)}
        row |= {category: round(value / 1e6) for category, value in moved.items()}
        model = traffic.without_values(partial(build, name))
        if isinstance(model, VisionPermutator) and compiled.can_count():
            blocks, rest = compiled.count(partial(build, name), COUNTED_BATCH, torch.float16, image_size(model))
            row |= {"compiled": round((blocks + rest) / 1e6)}
        yield row


@cache
def _flops(name: str) -> int:
    model = traffic.without_values(partial(build, name))
    return step_flops(model, image_size(model))


@cache
def _moved(name: str, precision: str) -> Counter[str]:
    """Bytes per image of an eager training step; those of the products are the least there is, all else being fused."""
    size = image_size(traffic.without_values(partial(build, name)))
    return traffic.count(partial(build, name), COUNTED_BATCH, DTYPES[precision], size)


def memory_bandwidth(device: torch.device, rounds: int, clock: Clock) -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.empty(VECTOR, device=device).fill_(1)
    target = torch.empty_like(source)

    def copy() -> int:
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 2 * source.nbytes

    return interleaved({"": copy}, rounds, clock)[""]
