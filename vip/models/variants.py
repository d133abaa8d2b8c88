"""The sizes of Vision Permutator, registered with timm: `import vip; timm.create_model("vip_s7")`.

The dimensions are those of the published networks (arXiv 2106.12368 and its checkpoints). Small/16 was
reported without code: 392 is the multiple of its 14 rows nearest to the 384 channels of Small/14. Tiny is ours, for
32x32 images. A 2x2 merging opens each stage whose channels differ from those before.
"""

from dataclasses import dataclass
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from vip.models.permutator import Stage, VisionPermutator
from vip.models.weights import checkpoint_filter_fn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Variant:
    """One size: pixels per patch side, the stages in order, and the evaluation crop it was published with."""

    patch_size: int
    stages: tuple[Stage, ...]
    img_size: int = 224
    crop_pct: float = 0.9


VARIANTS = {
    "vip_s16": Variant(16, tuple(Stage(depth, dim=392, segment_dim=28) for depth in (4, 3, 8, 3))),
    "vip_s14": Variant(14, tuple(Stage(depth, dim=384, segment_dim=24) for depth in (4, 3, 8, 3))),
    "vip_s7": Variant(
        7,
        (
            Stage(4, dim=192, segment_dim=6),
            Stage(3, dim=384, segment_dim=24),
            Stage(8, dim=384, segment_dim=24),
            Stage(3, dim=384, segment_dim=24),
        ),
    ),
    "vip_m7": Variant(
        7,
        (
            Stage(4, dim=256, segment_dim=8),
            Stage(3, dim=256, segment_dim=8),
            Stage(14, dim=512, segment_dim=32),
            Stage(3, dim=512, segment_dim=32),
        ),
    ),
    "vip_l7": Variant(
        7,
        (
            Stage(8, dim=256, segment_dim=8),
            Stage(8, dim=512, segment_dim=32),
            Stage(16, dim=512, segment_dim=32),
            Stage(4, dim=512, segment_dim=32),
        ),
        crop_pct=0.875,
    ),
    "vip_tiny": Variant(
        4,
        (
            Stage(2, dim=48, segment_dim=6),
            Stage(4, dim=96, segment_dim=24),
        ),
        img_size=32,
        crop_pct=1.0,
    ),
}


def _pretrained_cfg(variant: Variant) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, variant.img_size, variant.img_size),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": variant.crop_pct,
        "interpolation": "bicubic",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2106.12368",
    }


default_cfgs = generate_default_cfgs({name: _pretrained_cfg(variant) for name, variant in VARIANTS.items()})


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    variant = VARIANTS[name]
    return build_model_with_cfg(
        VisionPermutator,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(len(variant.stages))), "feature_cls": "getter"},
        patch_size=variant.patch_size,
        stages=variant.stages,
        **kwargs,
    )


@register_model
def vip_s16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Small/16: 14x14 tokens of 392 channels throughout."""
    return _create("vip_s16", pretrained, kwargs)


@register_model
def vip_s14(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Small/14: 16x16 tokens of 384 channels throughout."""
    return _create("vip_s14", pretrained, kwargs)


@register_model
def vip_s7(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Small/7: 32x32 tokens of 192 channels, then 16x16 of 384."""
    return _create("vip_s7", pretrained, kwargs)


@register_model
def vip_m7(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Medium/7: 32x32 tokens of 256 channels, then 16x16 of 512."""
    return _create("vip_m7", pretrained, kwargs)


@register_model
def vip_l7(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Large/7: as Medium/7, deeper."""
    return _create("vip_l7", pretrained, kwargs)


@register_model
def vip_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Tiny: 8x8 tokens of 48 channels, then 4x4 of 96, for 32x32 images."""
    return _create("vip_tiny", pretrained, kwargs)
