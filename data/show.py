"""Draws a grid of training images as the network sees them: cropped, augmented, erased, mixed, with their targets.

python -m data.show --data digits --out grid.png
python -m data.show --data imagenet --root /data/imagenet --size 224 --set mixup=0 cutmix=0
"""

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pydantic import TypeAdapter, ValidationError
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from data import decoders
from data.augment import TrainTransform
from data.config import AugmentConfig, DataConfig
from data.finish import BatchFinisher, Normalize
from data.loader import Request, TrainBatches
from data.order import EpochOrder
from data.sources import open_source

TILE = 192  # pixels on the page for one image
CAPTION = 36  # two lines below it
MARGIN = 8
AUGMENTS = {"vip": AugmentConfig(), "none": AugmentConfig.none()}


def main() -> None:
    args = _arguments()
    try:
        config = _augment_config(args.augment, args.set)
        images, captions = _augmented(args, config)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{error}") from None
    draw_grid(images, captions).save(args.out)
    print(f"{args.out}: {len(images)} training images of epoch {args.epoch}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m data.show", description="Draw augmented training images.")
    parser.add_argument("--data", choices=("imagenet", "folder", "digits", "synthetic"), default="digits")
    parser.add_argument("--root", help="folder that holds train/ and val/")
    parser.add_argument("--augment", choices=tuple(AUGMENTS), default="vip", help="vip: the published recipe")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes to it, like mixup=0")
    parser.add_argument("--size", type=int, help="height and width (default: 32 for digits, else 224)")
    parser.add_argument("--num", type=int, default=24, help="how many images (default: %(default)s)")
    parser.add_argument("--epoch", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("grid.png"), help="the file to write (default: %(default)s)")
    return parser.parse_args()


def _augment_config(preset: str, changes: list[str]) -> AugmentConfig:
    values = asdict(AUGMENTS[preset])
    for change in changes:
        key, _, value = change.partition("=")
        if key not in values:
            raise ValueError(f"--set {change}: no such key; there are {', '.join(values)}")
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            values[key] = value
    try:
        return TypeAdapter(AugmentConfig).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = f"{first['loc'][0]}: " if first["loc"] else ""
        raise ValueError(f"--set {key}{first['msg'].removeprefix('Value error, ')}") from None


def _augmented(args: argparse.Namespace, config: AugmentConfig) -> tuple[torch.Tensor, list[str]]:
    """The first `num` samples of the epoch, finished and made visible: uint8 (num, 3, H, W), captions.

    Each row of the grid is a batch of its own, so that the page shows several draws of the mixing.
    """
    source = open_source(DataConfig(kind=args.data, root=args.root), "train")
    size = args.size or (32 if args.data == "digits" else 224)
    order = EpochOrder(len(source), args.seed, config.repeats)
    indices = order.indices(args.epoch)
    batches = TrainBatches(source, TrainTransform(config, (size, size)), args.seed, decoders.choose("auto"))
    normalize = Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, torch.device("cpu"))
    finisher = BatchFinisher(config, len(source.class_names), normalize, args.seed)
    num = min(args.num, len(source))
    images: list[torch.Tensor] = []
    captions: list[str] = []
    for row, start in enumerate(range(0, num, num_columns(num))):
        positions = np.arange(start, min(start + num_columns(num), num))
        batch = batches.load(Request(args.epoch, indices[positions], order.copies(positions)))
        finished, targets = finisher.finish(batch, step=args.epoch, micro=row)
        images.append(normalize.invert(finished))
        captions += [_caption(target, source.class_names) for target in targets]
    return torch.cat(images), captions


def _caption(target: torch.Tensor, class_names: tuple[str, ...]) -> str:
    """The classes that stand out of the smoothing, heaviest first: one or, in a mixed image, two."""
    weights, labels = target.topk(min(2, len(target)))
    floor = target.min().item()
    lines = [
        f"{class_names[label]}: {weight:.0%}"
        for weight, label in zip(weights.tolist(), labels.tolist(), strict=True)
        if weight > floor + 0.005
    ]
    return "\n".join(lines)


def num_columns(num: int) -> int:
    """Of a grid half as wide again as high."""
    return math.ceil(math.sqrt(num * 1.5))


def draw_grid(images: torch.Tensor, captions: list[str]) -> Image.Image:
    """A page of tiles, each image enlarged to TILE pixels with its caption below. images: uint8 (B, 3, H, W)."""
    columns = num_columns(len(captions))
    rows = math.ceil(len(captions) / columns)
    step_x, step_y = TILE + MARGIN, TILE + CAPTION + MARGIN
    page = Image.new("RGB", (columns * step_x + MARGIN, rows * step_y + MARGIN), "white")
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default(size=14)
    for tile, (pixels, caption) in enumerate(zip(images.permute(0, 2, 3, 1).numpy(), captions, strict=True)):
        x, y = MARGIN + tile % columns * step_x, MARGIN + tile // columns * step_y
        image = Image.fromarray(pixels)
        image.thumbnail((TILE, TILE))
        scale = min(TILE / image.width, TILE / image.height)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.NEAREST)
        page.paste(image, (x, y))
        pen.text((x, y + TILE + 1), caption, fill="black", font=font)
    return page


if __name__ == "__main__":
    main()
