"""`benchmark.py depth`: what stochastic depth saves when it skips the samples that it drops (`model.drop_path.mode=subset`)."""

import time
from collections.abc import Callable, Iterator

import timm
import torch
import torch.nn.functional as F

import vip  # noqa: F401 (registers the models)
from scripts.bench.timing import interleaved
from vip.host_memory import keep_freed_memory
from vip.precision import DTYPES

MODES = ("bernoulli", "subset")
RATES = (0.1, 0.2, 0.3)
NUM_CLASSES, SIZE = 1000, 224
Row = dict[str, object]


def savings(
    name: str = "vip_s7",
    precisions: tuple[str, ...] = ("fp32", "bf16"),
    rates: tuple[float, ...] = RATES,
    batch: int = 16,
    rounds: int = 7,
) -> Iterator[Row]:
    """A row for each number format and rate: a training step in both modes, their times relative to one without drops.

    Rates grow linearly over the depth as published, so half of a rate is dropped on average. On a CPU it is this process' time.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = time.perf_counter
    if device.type == "cpu":
        clock = time.process_time
        keep_freed_memory()  # as in training
    for precision in precisions:
        steps = {"none": _step(name, precision, 0.0, "bernoulli", batch, device)}
        for rate in rates:
            steps |= {f"{mode} {rate}": _step(name, precision, rate, mode, batch, device) for mode in MODES}
        speeds = interleaved(steps, rounds, clock)
        for rate in rates:
            masked, skipped = (speeds["none"] / speeds[f"{mode} {rate}"] for mode in MODES)
            yield {
                "network": name,
                "format": precision,
                "rate": rate,
                "bernoulli, time": round(masked, 3),
                "subset, time": round(skipped, 3),
                "saved %": round(100 * (1 - skipped / masked), 1),
            }


def _step(name: str, precision: str, rate: float, mode: str, batch: int, device: torch.device) -> Callable[[], int]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=NUM_CLASSES, drop_path_rate=rate, drop_path_mode=mode)
    model.to(device).train()
    images = torch.randn(batch, 3, SIZE, SIZE, device=device)
    labels = torch.randint(NUM_CLASSES, (batch,), device=device)

    def step() -> int:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return batch

    return step
