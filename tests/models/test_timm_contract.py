"""What timm asks of every image model, asked of each variant, with inputs as small as they go."""

import io

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.models._manipulate import reinit_non_persistent_buffers
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

import vip  # noqa: F401 (registers the models)

NAMES = ["vip_l7", "vip_m7", "vip_s7", "vip_s14", "vip_s16", "vip_tiny"]
CROPS = {"vip_s16": 0.9, "vip_s14": 0.9, "vip_s7": 0.9, "vip_m7": 0.9, "vip_l7": 0.875, "vip_tiny": 1.0}


def meta_images(model: nn.Module, batch: int = 2) -> torch.Tensor:
    return torch.empty(batch, *model.pretrained_cfg["input_size"], device="meta")


def tiny(**options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vip_tiny", **{"num_classes": 10} | options)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_all_variants_are_registered() -> None:
    assert timm.list_models("vip_*") == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_reach_every_parameter(name: str) -> None:
    side = {"vip_s16": 32, "vip_tiny": 32}.get(name, 28)
    model = timm.create_model(name, num_classes=5, img_size=(side, 2 * side), drop_path_rate=0.1).train()
    logits = model(torch.randn(2, 3, side, 2 * side))
    assert logits.shape == (2, 5)
    logits.logsumexp(1).mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", NAMES)
def test_pretrained_cfg(name: str) -> None:
    model = timm.create_model(name, device="meta")
    cfg = model.pretrained_cfg
    side = 32 if name == "vip_tiny" else 224
    assert cfg["input_size"] == (3, side, side)
    assert cfg["fixed_input_size"]
    assert (cfg["crop_pct"], cfg["interpolation"]) == (CROPS[name], "bicubic")
    assert (cfg["mean"], cfg["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    headless = timm.create_model(name, num_classes=0, device="meta")
    assert not any(key.startswith(cfg["classifier"]) for key in headless.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_features_head_and_widths(name: str) -> None:
    model = timm.create_model(name, device="meta")
    features = model.forward_features(meta_images(model))
    assert features.shape[-1] == model.num_features == model.head_hidden_size
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model.forward_head(features).shape == (2, model.num_classes) == (2, 1000)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(meta_images(model)).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(meta_images(model)).shape == features.shape
    model.reset_classifier(7, "avg")
    assert model(meta_images(model)).shape == (2, 7)
    assert model.get_classifier().weight.device.type == "meta"


@pytest.mark.parametrize("name", NAMES)
def test_features_only(name: str) -> None:
    model = timm.create_model(name, features_only=True, device="meta")
    images = meta_images(model)
    features = model(images)
    assert [f.shape[1] for f in features] == model.feature_info.channels()
    assert [images.shape[2] // f.shape[2] for f in features] == model.feature_info.reduction()
    first = timm.create_model(name, features_only=True, out_indices=(0,), device="meta")
    assert [f.shape for f in first(images)] == [features[0].shape]
    assert sum(1 for _ in first.parameters()) < sum(1 for _ in model.parameters())


def test_intermediates_agree_with_the_features(images: torch.Tensor) -> None:
    model = tiny().eval()
    final, both = model.forward_intermediates(images)
    torch.testing.assert_close(final, model.forward_features(images))
    assert [tuple(f.shape) for f in both] == [(2, 48, 8, 8), (2, 96, 4, 4)]
    only = model.forward_intermediates(images, indices=[-1], intermediates_only=True, output_fmt="NHWC", norm=True)
    assert len(only) == 1
    torch.testing.assert_close(only[0], final)
    early, first = model.forward_intermediates(images, indices=[0], stop_early=True)
    torch.testing.assert_close(first[0], both[0])
    torch.testing.assert_close(early.permute(0, 3, 1, 2), first[0])
    with pytest.raises(ValueError, match="output_fmt='NLC' is unknown: give one of 'NCHW', 'NHWC'"):
        model.forward_intermediates(images, output_fmt="NLC")


def test_pruned_network_gives_the_same_features(images: torch.Tensor) -> None:
    model = tiny().eval()
    expected = model.forward_intermediates(images, indices=[0], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([0]) == [0]
    torch.testing.assert_close(model(images).permute(0, 3, 1, 2), expected)
    assert model.num_features == expected.shape[1]


def test_global_pool_none_gives_logits_per_token(images: torch.Tensor) -> None:
    assert tiny(global_pool="")(images).shape == (2, 4, 4, 10)


def test_dropout_before_the_head_alone(images: torch.Tensor) -> None:
    model = tiny(drop_rate=0.5).train()
    torch.testing.assert_close(model.forward_features(images), model.forward_features(images))
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


@pytest.mark.parametrize("in_chans", [1, 5])
def test_other_channel_counts(in_chans: int) -> None:
    assert tiny(in_chans=in_chans)(torch.randn(2, in_chans, 32, 32)).shape == (2, 10)


def test_dtype_and_device_reach_every_tensor() -> None:
    model = timm.create_model("vip_tiny", device="meta", dtype=torch.bfloat16, drop_path_rate=0.1)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert {b.device.type for b in model.buffers()} == {"meta"}


def test_network_from_the_meta_device_equals_one_built_in_place(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vip_tiny", num_classes=10, device="meta", drop_path_rate=0.1).to_empty(device="cpu")
    model.init_weights()
    reinit_non_persistent_buffers(model)
    built = tiny(drop_path_rate=0.1)
    for (name, buffer), expected in zip(model.named_buffers(), built.buffers(), strict=True):
        assert torch.equal(buffer, expected), name
    model.load_state_dict(built.state_dict())
    assert torch.equal(model.eval()(images), built.eval()(images))
    deviations = {n: p.std().item() for n, p in model.named_parameters() if "mlp" in n and "weight" in n}
    assert all(0.015 < deviation < 0.025 for deviation in deviations.values())


@pytest.mark.parametrize("mixer", ["weighted", "plain"])
def test_script_survives_saving_and_trains(mixer: str, images: torch.Tensor) -> None:
    model = tiny(mixer=mixer, drop_path_rate=0.1)
    stored = io.BytesIO()
    torch.jit.save(torch.jit.script(model), stored)
    stored.seek(0)
    scripted = torch.jit.load(stored)
    torch.testing.assert_close(scripted.eval()(images), model.eval()(images))
    scripted.train()(images).sum().backward()
    assert all(p.grad is not None for p in scripted.parameters())


@pytest.mark.parametrize("mixer", ["weighted", "plain"])
def test_export_with_any_batch_size(mixer: str, images: torch.Tensor) -> None:
    model = tiny(mixer=mixer).eval()
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    more = torch.cat([images, images.flip(0), images])
    torch.testing.assert_close(exported(more), model(more))


def test_gradient_checkpointing_changes_memory_alone(images: torch.Tensor) -> None:
    model = tiny(drop_path_rate=0.3).train()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(3)  # the same blocks are dropped
        model(images).logsumexp(1).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_checkpointed_blocks_store_less(images: torch.Tensor) -> None:
    stored = {}
    for enable in (False, True):
        model = tiny().train()
        model.set_grad_checkpointing(enable)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t.nbytes), t)[1], lambda t: t):
            model(images)
        stored[enable] = sum(kept)
    assert stored[True] < 0.5 * stored[False]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("coarse", [False, True])
def test_groups_follow_the_depth(name: str, coarse: bool) -> None:
    model = timm.create_model(name, device="meta")
    order = group_parameters(model, model.group_matcher(coarse), reverse=True)
    assert order.keys() == {key for key, _ in model.named_parameters()}
    num_blocks = sum(1 for key in order if key.endswith("norm1.weight"))
    num_merges = sum(
        1 for key in order if key.startswith("network.") and key.endswith(".proj.weight") and "attn" not in key
    )
    groups = [order[key] for key, _ in model.named_parameters()]
    assert groups == sorted(groups)
    assert order["norm.weight"] == order[next(key for key in reversed(order) if key.startswith("network."))]
    assert order["head.weight"] == max(groups) == (len(model.network) if coarse else num_blocks + num_merges) + 1


def test_layer_decay_grows_towards_the_head() -> None:
    model = tiny()
    scale = {
        id(parameter): group["lr_scale"]
        for group in param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
        for parameter in group["params"]
    }
    assert len(scale) == sum(1 for _ in model.parameters())
    assert scale[id(model.head.weight)] == 1.0
    assert scale[id(model.patch_embed.proj.weight)] == 0.5 ** (1 + 6 + 1)  # six blocks, one merging, the head


def test_weight_decay_spares_vectors_alone() -> None:
    model = tiny()
    optimizer = create_optimizer_v2(model, opt="adamw", weight_decay=0.05)
    decayed = {p.ndim for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    spared = {p.ndim for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert (decayed, spared) == ({2, 4}, {1})
