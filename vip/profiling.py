"""Where the time of a step goes: a few steps under torch.profiler, a trace to look at, and a verdict in words.

Every rank measures, since what one rank sees as communication may be another one that waits for its images; rank 0 writes
its trace and speaks. Some steps are timed without the profiler first, so that what it adds is known and left out. Nothing
that is computed depends on it.
"""

import bisect
import contextlib
import gzip
import json
import math
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

TIMED = (
    4,
    8,
)  # steps of this start, counted from 1: timed without the profiler, once compilation and the like are over
WARM_UP = 9  # the profiler's own
RECORDED = (10, 20)
NUM_OPERATIONS = 10
STEP, WAIT = "train step", "wait for images"  # ranges in the trace
COMMUNICATION = ("nccl", "gloo:", "c10d::", "record_param_comms")
COMPILED = ("Torch-Compiled Region", "## Call CompiledFxGraph")
HOST_EVENTS = ("cpu_op", "user_annotation")  # categories of a trace
GPU_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")
ALSO = 0.1  # of a step: what else is worth a remedy
REMEDIES = {
    "data": "waits for images; more data.workers, data.decoder=native, or a pack (scripts/pack.py) on a local disk help",
    "compute": "computes; precision=bf16 or fp16, compile=true or a smaller network help",
    "communication": "waits for other ranks; more images a rank or a faster network (NCCL_DEBUG=INFO shows which one is used) help",
    "host": "waits for Python; compile=true, a larger micro_batch or CPU cores of its own help",
}

Item = TypeVar("Item")
Intervals = list[tuple[float, float]]  # in us


class Span(NamedTuple):
    """One event of a trace. `kind` is a key of REMEDIES, or "step", or "" for what is no work of its own."""

    name: str
    kind: str
    begin: float  # us
    end: float
    own_time: float = 0.0  # us, without what it called
    on_gpu: bool = False


class Shares(NamedTuple):
    """Parts of a step, which add up to 1; its length, and the part of it that the profiler had added, left out of all."""

    data: float
    compute: float
    communication: float
    host: float
    step_ms: float
    overhead: float


class Profile:
    """Records the 10th to the 20th step after `first_step`, fewer where the run ends before.

    `gather` brings a (1, N) tensor of each rank to all of them, as `World.gather` does. Not `enabled`, it costs nothing.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        device: torch.device,
        world_rank: int,
        gather: Callable[[Tensor], Tensor] = lambda rows: rows,
        enabled: bool = True,
    ) -> None:
        self.trace = folder / "trace.json.gz"
        self.first_step = first_step
        self.device = device
        self.rank = world_rank
        self.gather = gather
        self.enabled = enabled
        self.number = 0  # of the step
        self.timed: Intervals = []
        self.profiler: profile | None = None
        self.is_recording = False

    def step(self) -> contextlib.AbstractContextManager[None]:
        """Entered around each training step."""
        return self._step() if self.enabled else contextlib.nullcontext()

    def watch(self, batches: Iterator[Item]) -> Iterator[Item]:
        """The same batches, with a range in the trace where the step waits for them."""
        return self._watch(batches) if self.enabled else batches

    def report(self, run_ends: bool = False) -> str | None:
        """The table and the verdict, once: after the last recorded step, or where `run_ends` before it.

        All ranks ask at the same time; the others than rank 0 are told None.
        """
        is_due = run_ends or self.number >= RECORDED[1]
        if not self.enabled or not is_due:
            return None
        self.enabled = False
        self._stop()
        profiler, self.profiler = self.profiler, None
        said = f"profile: nothing recorded, this start ended before its step {RECORDED[0]}"
        if profiler is not None and self.number < RECORDED[0]:  # prepared, and no other could be before it has ended
            profiler.start_trace()
            profiler.stop_trace()
        elif profiler is not None:
            events, written = self._export(profiler)
            spans = spans_of(events)
            shares = measure(spans, self.timed)
            rows = self.gather(torch.tensor([shares], dtype=torch.float64, device=self.device)).tolist()
            if self.rank == 0:
                said = "\n".join([self._headline(shares, written), *operations(spans, shares), verdict(rows)])
        return said if self.rank == 0 else None

    @contextlib.contextmanager
    def _step(self) -> Iterator[None]:
        self.number += 1
        if self.number in (TIMED[0], RECORDED[0]):
            self._settle()
        if self.number == WARM_UP:
            self._prepare()
        elif self.number == RECORDED[0] and self.profiler is not None:
            self.profiler.start_trace()
            self.is_recording = True
        begun = time.perf_counter()
        try:
            with record_function(STEP) if self.is_recording else contextlib.nullcontext():
                yield
                if self.number in (TIMED[1], RECORDED[1]):
                    self._settle()
        finally:
            if TIMED[0] <= self.number <= TIMED[1]:
                self.timed.append((begun * 1e6, time.perf_counter() * 1e6))
            if self.number >= RECORDED[1]:
                self._stop()

    def _watch(self, batches: Iterator[Item]) -> Iterator[Item]:
        end: Any = object()
        while True:
            with record_function(WAIT) if self.is_recording else contextlib.nullcontext():
                batch = next(batches, end)
            if batch is end:
                return
            yield batch

    def _prepare(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it calls a machine without a GPU an error
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        self.profiler = profile(activities=activities)
        with warnings.catch_warnings(action="ignore"):  # that it will forget, which is as it should be
            self.profiler.prepare_trace()

    def _settle(self) -> None:
        """Let the device finish, so that what is timed or recorded begins and ends with whole steps."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _stop(self) -> None:
        if self.is_recording and self.profiler is not None:
            self._settle()
            self.profiler.stop_trace()
            self.is_recording = False

    def _export(self, profiler: profile) -> tuple[list[dict[str, Any]], str]:
        """The events, read back from the trace, and where the trace is. Full disks cost the trace, never the run."""
        events: list[dict[str, Any]] = []
        try:
            with tempfile.TemporaryDirectory() as folder:
                plain = Path(folder) / "trace.json"
                profiler.export_chrome_trace(str(plain))
                events = json.loads(plain.read_bytes())["traceEvents"]
                if self.rank == 0:
                    with plain.open("rb") as whole, gzip.open(self.trace, "wb", compresslevel=5) as packed:
                        shutil.copyfileobj(whole, packed)
        except (OSError, RuntimeError, ValueError) as error:
            return events, f"{self.trace} could not be written ({' '.join(str(error).split())})"
        return events, f"{self.trace} opens at ui.perfetto.dev"

    def _headline(self, shares: Shares, trace: str) -> str:
        last = self.first_step + min(self.number, RECORDED[1])
        return (
            f"profile of steps {self.first_step + RECORDED[0]} to {last}: {shares.step_ms:.1f} ms each, without the "
            f"{shares.overhead:.0%} that the profiler added; {trace}"
        )


def spans_of(events: Iterable[dict[str, Any]]) -> list[Span]:
    """What matters of a Chrome trace by torch.profiler: the thread that makes the steps, communication, and the GPU."""
    events = [event for event in events if event.get("cat") in (*HOST_EVENTS, *GPU_EVENTS)]
    operations = {event["args"].get("External id"): event["name"] for event in events if event["cat"] == "cpu_op"}
    own_thread = {event["tid"] for event in events if event["name"] == STEP and event["cat"] in HOST_EVENTS}
    found, open_spans = (
        [],
        list[tuple[float, int]](),
    )  # the ends of those around the next one, and their places in `found`
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        name, begin, end = event["name"], event["ts"], event["ts"] + event["dur"]
        kind = _kind(name, event["cat"])
        if event["cat"] in GPU_EVENTS:  # called what launched it, where that is known
            launched_by = operations.get(event["args"].get("External id"), name)
            found.append(Span(launched_by, kind, begin, end, end - begin, on_gpu=True))
        elif event["tid"] in own_thread:
            while open_spans and open_spans[-1][0] <= begin:
                open_spans.pop()
            if open_spans:
                caller = open_spans[-1][1]
                found[caller] = found[caller]._replace(own_time=found[caller].own_time - (end - begin))
            open_spans.append((end, len(found)))
            found.append(Span(name, kind, begin, end, end - begin))
        elif kind == "communication":
            found.append(Span(name, kind, begin, end, end - begin))
    return found


def measure(spans: Sequence[Span], timed: Intervals) -> Shares:
    """Share out the recorded steps; `timed` holds steps without the profiler, in us.

    With a GPU: what it computes, then the communication that runs while it does not, then the waiting for images while it
    idles. Without: the waiting, then operations, then communication beside which there is none. The rest is the host's.
    Without steps all are NaN.
    """
    steps, has_gpu = _steps(spans), any(span.on_gpu for span in spans)
    if not steps:
        return Shares(*[math.nan] * len(Shares._fields))
    order = ("compute", "communication", "data") if has_gpu else ("data", "compute", "communication")
    rest = _whole(steps)
    total = _length(rest)
    parts = {}
    for kind in order:
        where = has_gpu and kind != "data"
        left = _without(rest, [(span.begin, span.end) for span in spans if span.kind == kind and span.on_gpu == where])
        parts[kind] = _length(rest) - _length(left)
        rest = left
    parts["host"] = _length(rest)
    added = 0.0
    if timed:
        added = total - _length(_whole(timed)) / len(timed) * len(steps)
        added = min(max(added, 0.0), parts["host"])  # the profiler's work is the host's
    parts["host"] -= added
    shares = {kind: part / (total - added) for kind, part in parts.items()}
    return Shares(**shares, step_ms=(total - added) / len(steps) / 1e3, overhead=added / (total - added))


def operations(spans: Sequence[Span], shares: Shares) -> list[str]:
    """A table, in lines, of the operations that took most time of their own inside the steps: the GPU's, where there is one."""
    steps, has_gpu = _steps(spans), any(span.on_gpu for span in spans)
    if not steps:
        return []
    within = _whole(steps)
    begins = [begin for begin, _ in within]
    times: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        i = bisect.bisect_right(begins, span.begin) - 1
        if (
            span.on_gpu == has_gpu
            and span.kind in ("compute", "communication")
            and i >= 0
            and span.begin <= within[i][1]
        ):
            name = span.name.removeprefix("autograd::engine::evaluate_function: ").removeprefix("aten::")
            times[name].append(span.own_time)
    lines = [f"{'operation':44} ms a step   share   times a step"]
    for name in sorted(times, key=lambda name: -sum(times[name]))[:NUM_OPERATIONS]:
        ms = sum(times[name]) / len(steps) / 1e3
        lines.append(f"{name[:44]:44} {ms:9.2f} {ms / shares.step_ms:6.0%}   {len(times[name]) / len(steps):12.1f}")
    return lines


def verdict(rows: Sequence[Sequence[float]]) -> str:
    """What bounds the steps, in words; `rows` are the ranks' Shares.

    The rank that waits least for the others is the one that all wait for, so its shares are the run's.
    """
    each = {rank: Shares(*row) for rank, row in enumerate(rows) if not math.isnan(row[0])}
    if not each:
        return "no verdict: the trace could not be read back"
    rank = min(each, key=lambda rank: each[rank].communication)
    parts = {kind: getattr(each[rank], kind) for kind in REMEDIES}
    first, *others = sorted(parts, key=lambda kind: -parts[kind])
    where = f" (on rank {rank}, for which the others wait)" if len(rows) > 1 else ""
    shown = ", ".join(f"{kind} {share:.0%}" for kind, share in parts.items())
    also = "".join(f"\nalso {kind}: {parts[kind]:.0%} {REMEDIES[kind]}" for kind in others if parts[kind] >= ALSO)
    return f"a step is {shown}{where}\nbound by {first}: {parts[first]:.0%} of a step {REMEDIES[first]}{also}"


def _kind(name: str, category: str) -> str:
    if name in (STEP, WAIT):
        return "step" if name == STEP else "data"
    if name.startswith(COMMUNICATION):
        return "communication"
    return "" if category == "user_annotation" and not name.startswith(COMPILED) else "compute"


def _steps(spans: Iterable[Span]) -> Intervals:
    return [(span.begin, span.end) for span in spans if span.kind == "step"]


def _merged(intervals: Iterable[tuple[float, float]], gap: float = 0.0) -> Intervals:
    """Sorted and disjoint; what is no further apart than `gap` becomes one."""
    merged: Intervals = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1] + gap:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def _whole(steps: Intervals) -> Intervals:
    """Steps with what lies between them, unless that is long: a validation, or a checkpoint."""
    return _merged(steps, statistics.median(end - begin for begin, end in steps))


def _without(intervals: Intervals, taken: Iterable[tuple[float, float]]) -> Intervals:
    """What is left of disjoint, sorted `intervals`."""
    left, holes, i = [], _merged(taken), 0
    for begin, end in intervals:
        while i < len(holes) and holes[i][1] <= begin:
            i += 1
        j = i
        while j < len(holes) and holes[j][0] < end:
            if holes[j][0] > begin:
                left.append((begin, holes[j][0]))
            begin = max(begin, holes[j][1])
            j += 1
        if begin < end:
            left.append((begin, end))
    return left


def _length(intervals: Intervals) -> float:
    return sum(end - begin for begin, end in intervals)
