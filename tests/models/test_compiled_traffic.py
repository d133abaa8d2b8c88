"""What a compiled training step moves, by inductor's own count; no GPU is needed, nor used."""

import pytest
import timm
import torch

import vip  # noqa: F401 (registers the models)
from scripts.bench import compiled

MEGABYTES = {"vip_s7": 550, "vip_l7": 1450}  # an image
# Inductor's inner parts, which other versions may have otherwise, say what it would fuse.
pytestmark = pytest.mark.skipif(
    not (compiled.can_count() and torch.__version__.startswith("2.10.")), reason="counted with torch 2.10 and triton"
)


@pytest.mark.parametrize("name", MEGABYTES)
def test_a_compiled_training_step_moves_few_bytes(name: str) -> None:
    blocks, rest = compiled.count(lambda: timm.create_model(name), 32, torch.float16)
    assert blocks > 10 * rest, "the blocks were not seen"
    assert blocks + rest <= MEGABYTES[name] * 1e6
