"""The profile: real runs of a small network that wait, compute or dawdle, and GPUs as made-up events."""

import gzip
import itertools
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vip.profiling import RECORDED, STEP, WAIT, Profile, Shares, Span, measure, operations, spans_of, verdict

CPU = torch.device("cpu")


def batches(pause: float, width: int) -> Iterator[Tensor]:
    for number in itertools.count():
        if pause:  # even a sleep of nothing lets others run
            time.sleep(pause)
        yield torch.full((16, width), 1 / (number + 1))


def train(
    profile: Profile,
    num_steps: int,
    loading: float = 0.0,
    dawdling: float = 0.0,
    width: int = 32,
    micro_batches: int = 1,
) -> tuple[list[str], Tensor]:
    """What the profile reported after each step and at the end, and the weights in the end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.1), nn.GELU(), nn.Linear(width, width))
    optimizer = torch.optim.AdamW(model.parameters())
    source, said = profile.watch(batches(loading, width)), []
    for step in range(num_steps):
        with profile.step():
            for _ in range(micro_batches):
                model(next(source)).square().mean().backward()
            if dawdling:
                time.sleep(dawdling)
            optimizer.step()
            optimizer.zero_grad()
        said.append(profile.report(run_ends=step == num_steps - 1))
    return [text for text in said if text], nn.utils.parameters_to_vector(model.parameters()).detach()


def share(text: str, kind: str) -> int:
    found = re.search(rf"a step is .*{kind} (\d+)%", text)
    assert found
    return int(found[1])


def ranges(trace: Path) -> list[str]:
    with gzip.open(trace, "rt") as file:
        return [event["name"] for event in json.load(file)["traceEvents"] if event.get("name") in (STEP, WAIT)]


def test_a_slow_loader_is_bound_by_data_and_the_trace_shows_it(tmp_path: Path) -> None:
    (said,), _ = train(Profile(tmp_path, 0, CPU, 0), 25, loading=0.02, micro_batches=2)
    assert said.startswith("profile of steps 10 to 20: ")
    assert f"{tmp_path}/trace.json.gz opens at ui.perfetto.dev" in said
    assert share(said, "data") > 50
    assert "\nbound by data: " in said
    assert "data.workers" in said
    names = ranges(tmp_path / "trace.json.gz")
    assert names.count(STEP) == 11
    assert names.count(WAIT) == 22
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json.gz"]


def test_a_network_that_computes_is_bound_by_compute_and_its_operations_are_named(tmp_path: Path) -> None:
    (said,), _ = train(Profile(tmp_path, 0, CPU, 0), 25, width=1536)
    assert "\nbound by compute: " in said
    lines = said.splitlines()
    (head,) = (i for i, line in enumerate(lines) if line.startswith("operation "))
    rows = [re.fullmatch(r"(\S.*?) +([\d.]+) +(\d+)% +([\d.]+)", line) for line in lines[head + 1 : head + 11]]
    found = {row[1]: float(row[2]) for row in rows if row}
    assert len(found) == 10
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert {"mm", "addmm"} <= set(found)
    milliseconds = re.search(r": ([\d.]+) ms each", said)
    assert milliseconds
    assert sum(found.values()) < 1.3 * float(milliseconds[1])


def test_a_step_that_dawdles_is_bound_by_the_host(tmp_path: Path) -> None:
    (said,), _ = train(Profile(tmp_path, 0, CPU, 0), 25, dawdling=0.03)
    assert "\nbound by host: " in said
    assert share(said, "host") > 50


def test_the_weights_are_the_same_bits_with_and_without(tmp_path: Path) -> None:
    _, with_it = train(Profile(tmp_path, 0, CPU, 0), 22)
    said, without = train(Profile(tmp_path, 0, CPU, 0, enabled=False), 22)
    assert torch.equal(with_it, without)
    assert said == []


def test_off_it_stands_in_nobodys_way(tmp_path: Path) -> None:
    profile, source = Profile(tmp_path, 0, CPU, 0, enabled=False), batches(0, 1)
    assert profile.watch(source) is source
    assert profile.report(run_ends=True) is None


def test_it_speaks_once_when_the_last_step_is_recorded(tmp_path: Path) -> None:
    profile = Profile(tmp_path, 100, CPU, 0)
    for step in range(1, 30):
        with profile.step():
            torch.zeros(2) + 1
        said = profile.report()
        assert (said is not None) == (step == RECORDED[1])
        assert said is None or said.startswith("profile of steps 110 to 120: ")
    assert profile.report(run_ends=True) is None


@pytest.mark.parametrize(
    ("num_steps", "said"), [(15, "profile of steps 10 to 15: "), (10, "profile of steps 10 to 10: "),
                            (9, "profile: nothing recorded, this start ended before its step 10"),
                            (2, "profile: nothing recorded, this start ended before its step 10")]
)  # fmt: skip
def test_a_shorter_run_has_fewer_steps(tmp_path: Path, num_steps: int, said: str) -> None:
    (text,), _ = train(Profile(tmp_path, 0, CPU, 0), num_steps)
    assert text.startswith(said)
    names = ranges(tmp_path / "trace.json.gz") if num_steps >= 10 else []
    assert names.count(STEP) == max(0, num_steps - 9)


def test_other_ranks_measure_and_are_silent(tmp_path: Path) -> None:
    rows: list[Tensor] = []

    def gather(row: Tensor) -> Tensor:
        rows.append(row)
        return torch.cat([row, row])

    said, _ = train(Profile(tmp_path, 0, CPU, 1, gather), 25)
    assert said == []
    assert list(tmp_path.iterdir()) == []
    assert [row.shape for row in rows] == [(1, 6)]
    assert float(rows[0][0, :4].sum()) == pytest.approx(1)


def test_a_trace_that_cannot_be_written_costs_neither_the_verdict_nor_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (said,), _ = train(Profile(tmp_path / "file", 0, CPU, 0), 25)
    assert "could not be written (" in said
    assert "\nbound by " in said
    assert len(said.splitlines()[0].replace(str(tmp_path), "")) < 250


@pytest.mark.parametrize("fails_at", [5, 9, 10, 15, 20])
def test_a_step_that_is_broken_off_does_not_confuse_it(tmp_path: Path, fails_at: int) -> None:
    profile, said = Profile(tmp_path, 0, CPU, 0), []
    for step in range(1, 25):
        try:
            with profile.step():
                torch.zeros(2) + 1
                if step == fails_at:
                    raise RuntimeError("back to the newest checkpoint")
        except RuntimeError:
            continue
        said.append(profile.report())
    (text,) = (found for found in said if found)
    assert text.startswith("profile of steps 10 to 20: ")
    assert ranges(tmp_path / "trace.json.gz").count(STEP) == 11


def gpu(*spans: tuple[str, str, float, float]) -> list[Span]:
    """Two steps of 100 us on the host, and what a GPU does: (name, kind, begin, end)."""
    steps = [Span(STEP, "step", 0, 100), Span(STEP, "step", 100, 200)]
    return steps + [
        Span(name, kind, begin, end, end - begin, on_gpu=kind not in ("data", "step") and not name.startswith("aten::"))
        for name, kind, begin, end in spans
    ]


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        # Kernels on two streams at once count once; launching them takes the host's time, but the GPU is busy.
        (
            [("gemm", "compute", 0, 150), ("copy", "compute", 100, 190), ("aten::mm", "compute", 0, 20)],
            (0, 0.95, 0, 0.05),
        ),
        # Communication costs where it is alone.
        ([("gemm", "compute", 0, 120), ("nccl", "communication", 60, 200)], (0, 0.6, 0.4, 0)),
        # Waiting for images costs where the GPU idles meanwhile.
        ([("gemm", "compute", 0, 60), (WAIT, "data", 10, 140), ("gemm", "compute", 140, 160)], (0.4, 0.4, 0, 0.2)),
        ([("gemm", "compute", 0, 200), (WAIT, "data", 10, 140)], (0, 1, 0, 0)),
        # Gaps between kernels without a reason are the host's.
        ([("relu", "compute", at, at + 4) for at in range(0, 200, 10)], (0, 0.4, 0, 0.6)),
        # What ran before the first and after the last step is no part of it.
        ([("gemm", "compute", -50, 20), ("gemm", "compute", 180, 300)], (0, 0.2, 0, 0.8)),
    ],
)
def test_the_time_of_a_gpu_is_shared_out(
    spans: list[tuple[str, str, float, float]], expected: tuple[float, ...]
) -> None:
    shares = measure(gpu(*spans), [])
    assert shares[:4] == pytest.approx(expected)
    assert shares.step_ms == pytest.approx(0.1)


def test_what_the_profiler_added_is_taken_off_the_host() -> None:
    spans = gpu(("gemm", "compute", 0, 100))
    assert measure(spans, [(0, 80), (80, 160)])[:4] == pytest.approx((0, 0.625, 0, 0.375))
    assert measure(spans, [(0, 80), (80, 160)])[4:] == pytest.approx((0.08, 0.25))
    assert measure(spans, [(0, 10), (10, 20)])[:4] == pytest.approx((0, 1, 0, 0)), "no more than the host had"
    assert measure(spans, [(0, 900), (900, 1800)])[:4] == pytest.approx((0, 0.5, 0, 0.5)), "it took nothing away"


def test_a_validation_between_steps_is_left_out() -> None:
    steps = [Span(STEP, "step", at, at + 100) for at in (0, 110, 5000)]
    work = [Span("aten::mm", "compute", at, at + 50, 50.0) for at in (0, 110, 3000, 5000)]
    shares = measure([*steps, *work], [])
    assert shares.compute == pytest.approx(150 / 310)
    assert operations([*steps, *work], shares)[1].split() == ["mm", "0.05", "48%", "1.0"]


def event(category: str, name: str, begin: float, length: float, thread: int = 1, identity: int = 0) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": length, "tid": thread,
            "args": {"External id": identity}}  # fmt: skip


def test_the_trace_of_a_gpu_is_read_as_it_was_written() -> None:
    spans = spans_of(
        [
            event("user_annotation", STEP, 0, 100),
            event("gpu_user_annotation", STEP, 20, 300, thread=7),
            event("user_annotation", "Optimizer.step#AdamW.step", 60, 30),
            event("cpu_op", "aten::linear", 10, 20, identity=3),
            event("cpu_op", "aten::addmm", 12, 10, identity=4),
            event("cuda_runtime", "cudaLaunchKernel", 14, 5, identity=4),
            event("kernel", "ampere_sgemm_128x64_tn", 40, 50, thread=7, identity=4),
            event("cpu_op", "aten::mm", 30, 10, thread=2, identity=5),  # autograd's thread
            event("kernel", "ampere_sgemm_64x64_nt", 90, 10, thread=7, identity=5),
            event("kernel", "triton_poi_fused_add_0", 100, 20, thread=7),
            event("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL", 90, 40, thread=9, identity=6),
            {"ph": "f", "cat": "ac2g", "name": "ac2g", "ts": 40, "tid": 7},
        ]
    )
    assert Span("aten::linear", "compute", 10, 30, 10.0) in spans
    assert Span("aten::addmm", "compute", 40, 90, 50.0, on_gpu=True) in spans
    assert Span("aten::mm", "compute", 90, 100, 10.0, on_gpu=True) in spans
    assert Span("Optimizer.step#AdamW.step", "", 60, 90, 30.0) in spans
    assert Span("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication", 90, 130, 40.0, on_gpu=True) in spans
    assert [span.name for span in spans if span.kind == "step"] == [STEP]
    table = operations(spans, measure(spans, []))
    assert [row.split()[:2] for row in table[1:]] == [
        ["addmm", "0.05"], ["ncclDevKernel_AllReduce_Sum_f32_RING_LL", "0.04"], ["triton_poi_fused_add_0", "0.02"],
        ["mm", "0.01"]
    ]  # fmt: skip


def test_the_rank_that_all_wait_for_gives_the_verdict() -> None:
    waits_for_others = Shares(0.05, 0.3, 0.6, 0.05, 100.0, 0.0)
    waits_for_images = Shares(0.55, 0.3, 0.1, 0.05, 100.0, 0.0)
    assert verdict([waits_for_others, waits_for_images, waits_for_others]).splitlines() == [
        "a step is data 55%, compute 30%, communication 10%, host 5% (on rank 1, for which the others wait)",
        "bound by data: 55% of a step waits for images; more data.workers, data.decoder=native, or a pack (scripts/pack.py) "
        "on a local disk help",
        "also compute: 30% computes; precision=bf16 or fp16, compile=true or a smaller network help",
        "also communication: 10% waits for other ranks; more images a rank or a faster network (NCCL_DEBUG=INFO shows which "
        "one is used) help",
    ]
    assert (
        verdict([waits_for_others]).splitlines()[1].startswith("bound by communication: 60% of a step waits for other")
    )
    assert "rank" not in verdict([waits_for_images]).splitlines()[0]
    unknown = Shares(*[math.nan] * 6)
    assert "(on rank 2, for which" in verdict([unknown, waits_for_others, waits_for_images])
    assert verdict([unknown]) == "no verdict: the trace could not be read back"
