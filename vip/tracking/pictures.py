"""Pictures for those who look at a run from afar: grids of images, and what each block listens to over training."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GateHistory = list[tuple[int, list[list[Any]]]]  # step, and the block, height, width and channel of each row
BRANCHES = ("height", "width", "channel")
# Dark blue over green to yellow, of even lightness: matplotlib's viridis at nine places.
COLOURS = np.array(
    [[68, 1, 84], [71, 45, 123], [59, 82, 139], [44, 114, 142], [33, 145, 140], [40, 174, 128], [94, 201, 98],
     [173, 220, 48], [253, 231, 37]], float,
)  # fmt: skip
FONT = ImageFont.load_default()
TEXT, PAPER = (40, 40, 40), (255, 255, 255)
LINE = 15  # pixels of a line of text
PANEL = (260, 360)  # pixels, width and height at most, of one branch's map
TILE = 176  # pixels, width of a picture in a grid


def decode(picture: str) -> bytes:
    """The JPEG within a data URI of views.jsonl."""
    return base64.b64decode(picture.partition(",")[2])


def shares(named: Sequence[Sequence[Any]]) -> str:
    """[["cat", 0.63], ["dog", 0.37]] in words: `cat 0.63, dog 0.37`."""
    return ", ".join(f"{name} {value:.2f}" for name, value in named)


def grid(pictures: Sequence[tuple[str, str]], columns: int = 4) -> Image.Image:
    """Pictures (data URIs, empty where there is none) with a caption below each."""
    columns = min(columns, max(len(pictures), 1))
    tiles = [(Image.open(io.BytesIO(decode(uri))) if uri else Image.new("RGB", (1, 1)), text) for uri, text in pictures]
    for image, _ in tiles:
        image.thumbnail((TILE - 8, TILE - 8))
    height = max((image.height for image, _ in tiles), default=0) + LINE + 8
    paper = Image.new("RGB", (columns * TILE, -(-len(tiles) // columns) * height or 1), PAPER)
    draw = ImageDraw.Draw(paper)
    for i, (image, text) in enumerate(tiles):
        left, top = i % columns * TILE + 4, i // columns * height + 4
        paper.paste(image, (left, top))
        _write(draw, (left, top + image.height), text, TILE - 8)
    return paper


def gate_map(history: GateHistory) -> Image.Image:
    """A map for each branch: blocks downwards, validations to the right, one scale for all three.

    `history` must hold at least one validation, each with the same blocks.
    """
    blocks = [row[0] for row in history[-1][1]]
    weights = np.array([[row[1:] for row in gates] for _, gates in history if len(gates) == len(blocks)], float)
    low, high = float(weights.min()), float(weights.max())
    cell = max(6, min(24, PANEL[1] // len(blocks)))
    height, margin = cell * len(blocks), 8 + max(7 * len(block) for block in blocks)
    paper = Image.new("RGB", (margin + 3 * (PANEL[0] + 12) + 70, height + 3 * LINE + 16), PAPER)
    draw = ImageDraw.Draw(paper)
    for i, block in enumerate(blocks):
        if cell >= LINE - 3 or i % 2 == 0:
            _write(draw, (4, LINE + 8 + i * cell + (cell - LINE) // 2), block, margin)
    for branch, name in enumerate(BRANCHES):
        left = margin + branch * (PANEL[0] + 12)
        _write(draw, (left, 4), name, PANEL[0])
        paper.paste(_coloured(weights[:, :, branch].T, low, high).resize((PANEL[0], height), 0), (left, LINE + 8))
        _write(draw, (left, LINE + 8 + height), f"step {history[0][0]} to {history[-1][0]}", PANEL[0])
    left = margin + 3 * (PANEL[0] + 12)
    paper.paste(_coloured(np.linspace(1, 0, 64)[:, None], 0, 1).resize((14, height)), (left, LINE + 8))
    _write(draw, (left + 18, LINE + 8), f"{high:.2f}", 50)
    _write(draw, (left + 18, height - 7 + LINE), f"{low:.2f}", 50)
    return paper


def encode(image: Image.Image, kind: str) -> bytes:
    """A JPEG where `kind` says so, which suits photographs, or a PNG."""
    stream = io.BytesIO()
    image.save(stream, kind, quality=85)
    return stream.getvalue()


def _coloured(values: np.ndarray, low: float, high: float) -> Image.Image:
    """A picture of one pixel a value (rows, columns); yellow is `high`."""
    places = (values - low) / max(high - low, 1e-9) * (len(COLOURS) - 1)
    channels = [np.interp(places, np.arange(len(COLOURS)), COLOURS[:, c]) for c in range(3)]
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int) -> None:
    text = text[:width].encode("latin-1", "replace").decode("latin-1")  # the font has no more
    while (length := draw.textlength(text, FONT)) > width:
        text = text[: min(len(text) - 1, int(len(text) * width / length))]
    draw.text(place, text, TEXT, FONT)
