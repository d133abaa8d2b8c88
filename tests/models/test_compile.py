"""Regional compilation: as many graphs as there are kinds of block, whatever comes after the first step."""

import pytest
import timm
import torch
from torch import Tensor, nn

import vip  # noqa: F401 (registers the models)
from vip.models.build import compile_model
from vip.stochastic_depth import set_drop_path_rate


def step(model: nn.Module, images: Tensor, autocast: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(images)
    logits.float().logsumexp(1).sum().backward()


@pytest.mark.parametrize(
    ("name", "size", "checkpointing", "autocast"),
    [("vip_l7", 28, False, False), ("vip_tiny", 32, False, True), ("vip_tiny", 32, True, False)],
)
def test_equal_blocks_share_a_graph_and_later_steps_add_none(
    graphs: list[torch.fx.GraphModule], name: str, size: int, checkpointing: bool, autocast: bool
) -> None:
    model = timm.create_model(name, num_classes=3, img_size=size, drop_path_rate=0.3).train()
    model.set_grad_checkpointing(checkpointing)
    images = torch.randn(3, 3, size, size)
    compile_model(model)
    step(model, images, autocast)
    assert len(graphs) == 2  # two widths of blocks, 8 and 28 of them in vip_l7
    set_drop_path_rate(model, 0.1, "uniform")
    step(model, images, autocast)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():  # as evaluate does
        model.eval()(torch.randn(5, 3, size, size))
    step(model.train(), images, autocast)
    assert len(graphs) == 2


def test_another_number_of_images_is_the_only_thing_that_compiles_again(graphs: list[torch.fx.GraphModule]) -> None:
    model = timm.create_model("vip_tiny", num_classes=3, drop_path_rate=0.1).train()
    compile_model(model)
    for batch, num_graphs in ((4, 2), (4, 2), (3, 4), (4, 4), (3, 4)):
        step(model, torch.randn(batch, 3, 32, 32), autocast=False)
        assert len(graphs) == num_graphs
