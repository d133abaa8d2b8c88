"""Where the time of a training step goes: torch's profiler, its operations sorted by what they are for.

What belongs to a Vision Permutator's gate (the means it sees, its MLP, its softmax) is told from the rest by marks around
the functions that do it, and in autograd's own backward pass by the numbers that tie a gradient to the operation it is of.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from scripts.bench.candidate import Candidate
from scripts.bench.traffic import category
from vip.models import fusion
from vip.models.permutator import PermuteMlp

GATE = "gate"
_SOFTMAX = ("aten::_softmax", "aten::_softmax_backward_data")


def shares(candidate: Candidate) -> dict[str, float]:
    """Of an eager training step's time in operations, what each category takes, in percent."""
    candidate.model.train()
    candidate.train()
    on_gpu = candidate.device.type == "cuda"
    with (
        _gates_marked(candidate),
        profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as seen,
    ):
        candidate.train()
    events = list(seen.events() or ())
    numbers = {event.sequence_nr for event in events if event.sequence_nr >= 0 and _within(event, _is_mark)}

    def is_gates(event: FunctionEvent) -> bool:
        return _is_mark(event) or (event.name.startswith("autograd::engine") and event.sequence_nr in numbers)

    times: Counter[str] = Counter()
    for event in events:
        if event.name.startswith("aten::"):
            of_gate = _within(event, is_gates) or (bool(numbers) and event.name in _SOFTMAX)
            name = GATE if of_gate else category(event.name.removeprefix("aten::"))
            times[name] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    return {name: 100 * spent / times.total() for name, spent in times.most_common()}


@contextmanager
def _gates_marked(candidate: Candidate) -> Iterator[None]:
    """Within, what each gate of the network does is inside an event of the profiler with the gate's name."""
    marks: list[tuple[Any, str]] = [(fusion, name) for name in ("mean_of_sum", "_gate", "_gate_backward")]
    for module in candidate.model.modules():
        if isinstance(module, PermuteMlp) and module.reweight is not None:
            marks.append((module.reweight, "forward"))
    patches = [mock.patch.object(owner, name, _marked(getattr(owner, name))) for owner, name in marks]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def _marked(function: Callable[..., Any]) -> Callable[..., Any]:
    def marked(*args: Any) -> Any:
        with record_function(GATE):
            return function(*args)

    return marked


def _is_mark(event: FunctionEvent) -> bool:
    return event.name == GATE


def _within(event: FunctionEvent | None, wanted: Callable[[FunctionEvent], bool]) -> bool:
    while event is not None and not wanted(event):
        event = event.cpu_parent
    return event is not None
