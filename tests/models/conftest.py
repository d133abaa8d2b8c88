"""Shared by the tests of models."""

import pytest
import torch
from torch import Tensor


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """What torch.compile is asked to compile from here on, whole or not at all; it is run as it is."""
    torch._dynamo.reset()
    asked: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor], **__: object) -> torch.fx.GraphModule:
        asked.append(graph)
        return graph

    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, **options: compiler(*args, **options | {"backend": backend, "fullgraph": True})
    )
    return asked
