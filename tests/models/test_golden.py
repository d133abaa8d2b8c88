"""The published networks, to rounding: names, shapes, logits, loss and the norm of every gradient in float64."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import vip  # noqa: F401 (registers the models)

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "vip_golden.json").read_text())
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Every parameter from a generator seeded with its name, at a scale that keeps activations near 1."""
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        values = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape)
        if len(shape) > 1:
            values /= np.sqrt(np.prod(shape[1:]))
        else:
            values = 0.1 * values + (1.0 if name.endswith("weight") else 0.0)
        parameter.copy_(torch.from_numpy(values))


@pytest.mark.parametrize("name", GOLDEN)
def test_network_computes_the_published_values(name: str) -> None:
    golden = GOLDEN[name]
    model = timm.create_model(name, dtype=torch.float64).eval()
    fill(model)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert list(shapes.items()) == list(golden["state_dict"].items())
    assert sum(p.numel() for p in model.parameters()) == golden["params"]

    images = np.random.Generator(np.random.PCG64(2106)).standard_normal((2, 3, 224, 224))
    logits = model(torch.from_numpy(images))
    loss = nn.functional.cross_entropy(logits, torch.tensor([3, 7]))
    loss.backward()

    np.testing.assert_allclose(logits[:, :8].detach(), golden["logits_first8"], **TOLERANCE)
    np.testing.assert_allclose(logits.norm(dim=1).detach(), golden["logits_l2"], **TOLERANCE)
    np.testing.assert_allclose(loss.item(), golden["cross_entropy"], **TOLERANCE)
    norms = {key: p.grad.norm().item() for key, p in model.named_parameters()}
    assert norms.keys() == golden["grad_l2"].keys()
    np.testing.assert_allclose(list(norms.values()), [golden["grad_l2"][key] for key in norms], **TOLERANCE)
