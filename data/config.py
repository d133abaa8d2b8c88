"""The schema of the `data` and `augment` groups: what may be set, its bounds, and what each key means.

Plain frozen dataclasses, so that the rest of the package needs nothing but attributes. Bounds and descriptions sit on
the fields as pydantic annotations: whoever composes the configuration validates with `pydantic.TypeAdapter` and prints
the descriptions as help. Built by hand (tests, notebooks) only the checks in `__post_init__` run.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

Probability = Annotated[float, Field(ge=0, le=1)]

IMAGENET = {"train": 1_281_167, "val": 50_000}  # images of its 1,000 classes

RAND_AUGMENT_SPEC = re.compile(r"rand(-(m\d+|n\d+|p[01]?\.?\d+|mstd\d+\.?\d*|mmax\d+|inc[01]|tweights|t3aw?))*")


@dataclass(frozen=True)
class DataConfig:
    """Which images, how many processes read them, and how much may be wrong with them."""

    kind: Annotated[
        Literal["imagenet", "folder", "arrow", "digits", "synthetic"],
        Field(
            description="imagenet: 1,000 class folders under train/ and val/, or packs of them; folder: any such tree or pack; "
            "arrow: a dataset of the `datasets` library, or its Parquet files; digits: scikit-learn's scanned digits, written on "
            "first use; synthetic: generated, for benchmarks"
        ),
    ] = "imagenet"
    root: Annotated[
        str | None,
        Field(
            description="holds train/ and val/; or the URL of a pack (s3://, gs://, https://), which is copied to data.cache; "
            "null: $IMAGENET_DIR for imagenet, datasets/digits for digits"
        ),
    ] = None
    cache: Annotated[
        str | None,
        Field(
            description="folder on the node's own disk to which the pack at data.root is copied first, once per node; null: "
            "~/.cache/vision-permutator/packs for a URL, else no copy"
        ),
    ] = None
    shuffle: Annotated[
        Literal["full", "blocks"],
        Field(
            description="full: every order of the images is as likely; blocks: a pack is read in large pieces, for network file "
            "systems, and images are mixed within 4,096 of them"
        ),
    ] = "full"
    block: Annotated[int, Field(ge=1, description="images in each piece for shuffle=blocks")] = 16
    workers: Annotated[
        int,
        Field(
            ge=0,
            description="loader threads (decoder native) or processes of each rank; 0: none of either, same samples",
        ),
    ] = 8
    decoder: Annotated[
        Literal["auto", "native", "torch"],
        Field(
            description="native: the project's C library, in threads; torch: torchvision's and torch's, in processes, with the "
            "same samples and other last bits; auto: native where it was built"
        ),
    ] = "auto"
    num_classes: Annotated[
        int | None,
        Field(
            ge=1, description="classes the data must have; null: 1000 for imagenet and synthetic, else as many as found"
        ),
    ] = None
    num_images: Annotated[
        int, Field(ge=1, description="training images that kind=synthetic generates; a tenth as many for validation")
    ] = 12_800
    exif: Annotated[
        bool,
        Field(
            description="turn images upright as their EXIF orientation says, in training and validation alike; "
            "false: ignore it, as ImageNet's published results do"
        ),
    ] = False
    max_bad: Annotated[
        Probability,
        Field(
            description="share of the training images that may be undecodable (others take their place) before the "
            "run stops"
        ),
    ] = 0.001


@dataclass(frozen=True)
class AugmentConfig:
    """What happens to training images; the defaults are the published recipe (arXiv 2106.12368, section 4)."""

    scale: Annotated[
        tuple[float, float] | None,
        Field(
            description="share of the image's area that a random crop covers, [low, high]; null: resize and centre crop"
        ),
    ] = (0.08, 1.0)
    ratio: Annotated[tuple[float, float], Field(description="width / height of the random crop, [low, high]")] = (
        3 / 4,
        4 / 3,
    )
    hflip: Annotated[Probability, Field(description="probability of a left-right flip")] = 0.5
    interpolation: Annotated[
        Literal["random", "bilinear", "bicubic"],
        Field(description="filter of crop and RandAugment; random draws bilinear or bicubic for each"),
    ] = "random"
    rand_augment: Annotated[
        str | None,
        Field(
            description="timm's RandAugment string: m magnitude, n operations, mstd noise on the magnitude, "
            "inc1 severity grows with it; null: off"
        ),
    ] = "rand-m9-mstd0.5-inc1"
    three_augment: Annotated[
        bool, Field(description="DeiT III's choice of gray, solarize or blur, in place of RandAugment")
    ] = False
    color_jitter: Annotated[
        float, Field(ge=0, le=1, description="strength of brightness, contrast and saturation jitter; 0: off")
    ] = 0.0
    erase_prob: Annotated[Probability, Field(description="probability of erasing one box of an image (CutOut)")] = 0.25
    erase_mode: Annotated[
        Literal["pixel", "rand", "const"],
        Field(description="the erased box becomes normal noise per pixel, one random colour, or the mean colour"),
    ] = "pixel"
    mixup: Annotated[float, Field(ge=0, description="alpha of MixUp's beta distribution; 0: off")] = 0.8
    cutmix: Annotated[float, Field(ge=0, description="alpha of CutMix's beta distribution; 0: off")] = 1.0
    mix_prob: Annotated[Probability, Field(description="probability that a batch is mixed at all")] = 1.0
    mix_switch_prob: Annotated[
        Probability, Field(description="probability of CutMix rather than MixUp when both are on")
    ] = 0.5
    label_smoothing: Annotated[
        float, Field(ge=0, lt=1, description="share of each target spread evenly over all classes")
    ] = 0.1
    repeats: Annotated[
        int,
        Field(
            ge=1,
            description="copies of an image drawn side by side, augmented differently (repeated augmentation); 1: off",
        ),
    ] = 1

    def __post_init__(self) -> None:
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale={list(self.scale)} must satisfy 0 < low <= high <= 1, for example [0.08, 1.0]")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio={list(self.ratio)} must satisfy 0 < low <= high, for example [0.75, 1.3333]")
        if self.rand_augment is not None and not RAND_AUGMENT_SPEC.fullmatch(self.rand_augment):
            raise ValueError(
                f"rand_augment={self.rand_augment!r} is not a RandAugment string: "
                "use one like 'rand-m9-mstd0.5-inc1', or null to turn it off"
            )
        if self.three_augment and self.rand_augment is not None:
            raise ValueError(
                f"three_augment=true replaces RandAugment, but rand_augment={self.rand_augment!r}: "
                "set rand_augment=null or three_augment=false"
            )

    @classmethod
    def none(cls) -> "AugmentConfig":
        """Everything off: resize, centre crop, one-hot targets."""
        return cls(
            scale=None,
            hflip=0.0,
            interpolation="bicubic",
            rand_augment=None,
            erase_prob=0.0,
            mixup=0.0,
            cutmix=0.0,
            label_smoothing=0.0,
        )
