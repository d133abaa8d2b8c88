"""The table of sizes against the published facts, and sizes that can and cannot be."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import vip  # noqa: F401 (registers the models)
from scripts.bench.literal import make_literal
from vip.models import VisionPermutator
from vip.models.permutator import PermutatorBlock


@pytest.mark.parametrize(
    ("name", "millions", "giga_macs"), [("vip_s7", 25.1, 7.0), ("vip_m7", 55.3, 16.4), ("vip_l7", 87.8, 24.5)]
)
def test_cost_is_the_published_one(name: str, millions: float, giga_macs: float) -> None:
    model = timm.create_model(name, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    counts = []
    for form in (model, make_literal(timm.create_model(name, device="meta").eval())):
        with FlopCounterMode(display=False) as counter:
            form(torch.empty(1, 3, 224, 224, device="meta"))
        counts.append(counter.get_total_flops() / 2e9)
    assert counts[0] == counts[1] == pytest.approx(giga_macs, rel=0.01, abs=0.1)  # products alone


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("vip_s16", [(4, 392, 14), (3, 392, 14), (8, 392, 14), (3, 392, 14)]),
        ("vip_s14", [(4, 384, 16), (3, 384, 16), (8, 384, 16), (3, 384, 16)]),
        ("vip_s7", [(4, 192, 32), (3, 384, 16), (8, 384, 16), (3, 384, 16)]),
        ("vip_m7", [(4, 256, 32), (3, 256, 32), (14, 512, 16), (3, 512, 16)]),
        ("vip_l7", [(8, 256, 32), (8, 512, 16), (16, 512, 16), (4, 512, 16)]),
    ],
)
def test_stages_are_the_published_ones(name: str, stages: list[tuple[int, int, int]]) -> None:
    """Depth, channels and grid of each stage; all three projections are as wide as the channels at 224 x 224."""
    model = timm.create_model(name, device="meta")
    features = model.forward_intermediates(torch.empty(1, 3, 224, 224, device="meta"), intermediates_only=True)
    blocks = [model.get_submodule(info["module"]) for info in model.feature_info]
    assert [(len(stage), f.shape[1], f.shape[2]) for stage, f in zip(blocks, features, strict=True)] == stages
    for stage, (_, dim, _) in zip(blocks, stages, strict=True):
        assert all(linear.weight.shape == (dim, dim) for b in stage for linear in (b.attn.mlp_h, b.attn.mlp_w))
        assert all(block.mlp.fc1.out_features == 3 * dim for block in stage)


def test_tiny_is_for_small_images() -> None:
    model = timm.create_model("vip_tiny", num_classes=10)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)


@pytest.mark.parametrize("img_size", [64, (64, 64), (32, 64), (72, 40)])
def test_any_size_that_the_patches_divide(img_size: int | tuple[int, int]) -> None:
    model = timm.create_model("vip_tiny", num_classes=3, img_size=img_size)
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    first = model.get_submodule("network.0.0.attn")
    assert first.mlp_h.in_features == height // 4 * first.segment_dim
    assert first.mlp_w.in_features == width // 4 * first.segment_dim
    images = torch.randn(2, 3, height, width)
    assert model.forward_features(images).shape == (2, height // 8, width // 8, model.num_features)
    assert model(images).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "img_size", "sizes"),
    [
        ("vip_s7", (256, 192), "252 and 266, the nearest widths 182 and 196"),
        ("vip_s14", 230, "224 and 238, the nearest widths 224 and 238"),
        ("vip_tiny", (4, 32), "8, the nearest widths 32"),
    ],
)
def test_impossible_sizes_name_those_that_would_work(name: str, img_size: int | tuple[int, int], sizes: str) -> None:
    with pytest.raises(ValueError, match=f"the nearest heights are {sizes}"):
        timm.create_model(name, img_size=img_size, device="meta")


def test_images_of_another_size_are_refused() -> None:
    model = timm.create_model("vip_s7", device="meta")
    with pytest.raises(ValueError, match=r"3x256x192 do not fit .* 3x224x224.*252 and 266, .* widths 182 and 196"):
        model(torch.empty(1, 3, 256, 192, device="meta"))
    with pytest.raises(ValueError, match=r"1x224x224 do not fit .* in_chans"):
        model(torch.empty(1, 1, 224, 224, device="meta"))


@pytest.mark.parametrize(("key", "value"), [("mixer", "attention"), ("global_pool", "max")])
def test_unknown_choices_name_the_known_ones(key: str, value: str) -> None:
    known = {"mixer": "'weighted', 'plain'", "global_pool": "'avg', ''"}[key]
    with pytest.raises(ValueError, match=f"{key}='{value}' is unknown: give one of {known}"):
        timm.create_model("vip_tiny", **{key: value})


def test_plain_mixer_has_no_gate() -> None:
    plain = timm.create_model("vip_tiny", mixer="plain")
    weighted = timm.create_model("vip_tiny")
    gate = {name for name, _ in weighted.named_parameters() if ".reweight." in name}
    assert gate
    assert {n for n, _ in weighted.named_parameters()} - gate == {n for n, _ in plain.named_parameters()}


def test_initialisation_is_published_and_repeats_with_the_seed() -> None:
    def build() -> VisionPermutator:
        torch.manual_seed(7)
        return timm.create_model("vip_tiny", num_classes=1000)

    model, again = build(), build()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, torch.nn.Linear) and name.endswith("weight"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        elif isinstance(module, torch.nn.Linear):
            assert not parameter.any(), name
        elif isinstance(module, torch.nn.LayerNorm):
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name


def test_blocks_drop_linearly_over_the_depth_as_published() -> None:
    model = timm.create_model("vip_s7", drop_path_rate=0.17, device="cpu", img_size=14)
    rates = [m.drop_path.rate.item() for m in model.modules() if isinstance(m, PermutatorBlock)]
    assert rates == pytest.approx([0.01 * i for i in range(18)])
    assert not any("drop_path" in name for name in model.state_dict())
