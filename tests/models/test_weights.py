"""Checkpoints made elsewhere: every wrapping loads, by our loader and by timm's, and a misfit says what it is."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vip  # noqa: F401 (registers the models)
from vip.models import load_weights, unwrap_state_dict

WRAPPINGS = ["bare", "state_dict", "model", "state_dict_ema"]


def published(num_classes: int = 10, seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("vip_tiny", num_classes=num_classes, **options)


def assert_same(model: nn.Module, weights: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return published().state_dict()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_wrapping_loads(wrapping: str, prefix: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    named = {prefix + name: value for name, value in weights.items()}
    path = tmp_path / "published.pth"
    torch.save(named if wrapping == "bare" else {"epoch": 299, "arch": "vip_tiny", wrapping: named}, path)

    model = published(seed=1)
    load_weights(model, unwrap_state_dict(torch.load(path, weights_only=True)))
    assert_same(model, weights)
    assert_same(timm.create_model("vip_tiny", num_classes=10, checkpoint_path=str(path)), weights)
    source = {"file": str(path), "num_classes": 10}
    assert_same(timm.create_model("vip_tiny", pretrained=True, pretrained_cfg_overlay=source), weights)


def test_safetensors_load(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "published.safetensors"
    save_file(weights, path)
    model = published(seed=1)
    load_weights(model, unwrap_state_dict(load_file(path)))
    assert_same(model, weights)
    assert_same(timm.create_model("vip_tiny", num_classes=10, checkpoint_path=str(path)), weights)


def test_averaged_weights_come_first_unless_refused(weights: dict[str, Tensor]) -> None:
    averaged = published(seed=1).state_dict()
    both = {"state_dict": weights, "state_dict_ema": averaged}
    assert torch.equal(unwrap_state_dict(both)["head.weight"], averaged["head.weight"])
    assert torch.equal(unwrap_state_dict(both, use_ema=False)["head.weight"], weights["head.weight"])
    assert torch.equal(unwrap_state_dict({"model": weights, "model_ema": None})["head.weight"], weights["head.weight"])


@pytest.mark.parametrize("checkpoint", [{}, {"epoch": 3, "optimizer": {"lr": 0.1}}, {"state_dict": {"epoch": 3}}])
def test_no_weights_inside_is_said_so(checkpoint: dict) -> None:
    with pytest.raises(ValueError, match="no weights among the checkpoint's entries"):
        unwrap_state_dict(checkpoint)


@pytest.mark.parametrize("num_own", [7, 0])
def test_head_of_other_classes_says_which(num_own: int, weights: dict[str, Tensor]) -> None:
    model = published(num_classes=num_own)
    with pytest.raises(ValueError, match=rf"10 classes in the checkpoint and {num_own} here.*num_classes=10"):
        load_weights(model, weights)


def test_other_variants_weights_name_the_keys(weights: dict[str, Tensor]) -> None:
    del weights["norm.weight"]
    weights["norm.gamma"] = torch.ones(96)
    model = published(seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"missing norm\.weight; unexpected norm\.gamma") as caught:
        load_weights(model, weights)
    assert "\n" not in str(caught.value)
    assert_same(model, before)


def test_other_image_size_names_the_projection(weights: dict[str, Tensor]) -> None:
    model = published(img_size=(64, 32))
    with pytest.raises(ValueError, match=r"mlp_h\.weight: 48x48 in the checkpoint, 96x96 here.*img_size"):
        load_weights(model, weights)


def test_timm_networks_load_the_same_way() -> None:
    source = timm.create_model("resnet10t", num_classes=3)
    model = timm.create_model("resnet10t", num_classes=3)
    load_weights(model, unwrap_state_dict({"model": source.state_dict()}))
    assert_same(model, source.state_dict())
    with pytest.raises(ValueError, match="fc has 3 classes in the checkpoint and 4 here"):
        load_weights(timm.create_model("resnet10t", num_classes=4), source.state_dict())


def test_pretrained_backbone_takes_a_new_head_and_other_channels(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "published.pth"
    torch.save({"state_dict": weights}, path)
    source = {"file": str(path), "num_classes": 10}
    model = timm.create_model("vip_tiny", pretrained=True, num_classes=4, in_chans=1, pretrained_cfg_overlay=source)
    torch.testing.assert_close(model.patch_embed.proj.weight, weights["patch_embed.proj.weight"].sum(1, keepdim=True))
    assert torch.equal(model.norm.weight, weights["norm.weight"])
    assert model.head.out_features == 4
