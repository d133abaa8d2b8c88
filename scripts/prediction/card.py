"""The card of one image: the picture, its likeliest classes as bars and, beside it, the map of what speaks for the first."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.folder import printable
from scripts.prediction.network import Prediction

PANEL, TEXT, MARGIN, CAPTION = 448, 448, 40, 40  # pixels
HEADING_SIZE, TEXT_SIZE, SMALL_SIZE = 26, 22, 17
ROW = 78  # from bar to bar
PAPER, INK, FAINT, TRACK = (255, 255, 255), (28, 30, 34), (118, 122, 130), (236, 238, 241)
FIRST, OTHERS = (30, 98, 214), (150, 178, 222)  # bars
GLOW = (255, 140, 0)  # of the map
STRONGEST = 99.5  # percentile of the map that gets the full colour: one bright pixel must not dim the rest
MAX_SHEET = 64  # cards on one


def draw_card(prediction: Prediction, class_names: tuple[str, ...], shares: np.ndarray | None) -> Image.Image:
    """An RGB image. `shares` is float32 (H, W), the map over the part that the network saw, or None for no map."""
    panels = 1 if shares is None else 2
    size = (MARGIN + panels * (PANEL + MARGIN) + TEXT + MARGIN, MARGIN + PANEL + CAPTION + MARGIN)
    card = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(card)
    scale = PANEL / max(prediction.picture.size)
    picture = _resized(prediction.picture, scale)
    _place(card, picture, 0)
    names = [class_names[label] for label, _ in prediction.top]
    if shares is not None:
        window = tuple(round(side * scale) for side in prediction.window)
        _place(card, overlay(picture, window, shares), 1)
        _caption(pen, 1, f"what speaks for {names[0]}")
    left = size[0] - MARGIN - TEXT
    _line(pen, (left, MARGIN - 6), printable(prediction.image.path.name), HEADING_SIZE, INK, TEXT, elide_middle=True)
    for place, (name, (_, probability)) in enumerate(zip(names, prediction.top, strict=True)):
        top = MARGIN + 62 + place * ROW
        number = f"{100 * probability:.1f} %"
        width = round(_font(TEXT_SIZE).getlength(number))
        pen.text((left + TEXT - width, top), number, INK if place == 0 else FAINT, _font(TEXT_SIZE))
        _line(pen, (left, top), name, TEXT_SIZE, INK, TEXT - width - 16)
        bar = [left, top + 36, left + TEXT, top + 48]
        pen.rounded_rectangle(bar, 6, TRACK)
        if filled := round(probability * TEXT):
            colour = FIRST if place == 0 else OTHERS
            pen.rounded_rectangle([*bar[:2], left + filled, bar[3]], min(6, filled / 2), colour)
    return card


def overlay(picture: Image.Image, window: tuple[int, ...], shares: np.ndarray) -> Image.Image:
    """The picture in grey, with the map in colour over `window` (left, top, right, bottom); paler where nothing was seen."""
    grey = np.asarray(picture.convert("L"), np.float32)
    shown = np.repeat((60 + 0.5 * grey)[..., None], 3, axis=2)
    strength = max(float(np.percentile(shares, STRONGEST)), 1e-12)
    left, top = min(window[0], picture.width - 1), min(window[1], picture.height - 1)
    part = shown[top : max(window[3], top + 1), left : max(window[2], left + 1)]
    fitted = np.asarray(Image.fromarray(shares / strength).resize(part.shape[1::-1], Image.Resampling.BICUBIC))
    blended = part + (np.array(GLOW, np.float32) - part) * fitted[..., None].clip(0, 1)
    shown = 0.35 * shown + 0.65 * 245
    shown[top : top + blended.shape[0], left : left + blended.shape[1]] = blended
    return Image.fromarray(shown.clip(0, 255).astype(np.uint8))


def draw_sheet(cards: list[Image.Image]) -> Image.Image:
    """All cards on one page, in as many columns as make it about square."""
    width, height = cards[0].size
    columns = max(1, round((len(cards) * height / width) ** 0.5))
    page = Image.new("RGB", (columns * width, -(-len(cards) // columns) * height), PAPER)
    for place, card in enumerate(cards):
        page.paste(card, (place % columns * width, place // columns * height))
    return page


def _resized(picture: Image.Image, scale: float) -> Image.Image:
    """Small images keep their pixels visible."""
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.NEAREST if scale > 4 else Image.Resampling.LANCZOS)


def _place(card: Image.Image, picture: Image.Image, panel: int) -> None:
    """Into the middle of its square."""
    left = MARGIN + panel * (PANEL + MARGIN)
    ImageDraw.Draw(card).rectangle([left, MARGIN, left + PANEL - 1, MARGIN + PANEL - 1], TRACK)
    card.paste(picture, (left + (PANEL - picture.width) // 2, MARGIN + (PANEL - picture.height) // 2))


def _caption(pen: ImageDraw.ImageDraw, panel: int, text: str) -> None:
    left, top = MARGIN + panel * (PANEL + MARGIN), MARGIN + PANEL + 14
    pen.ellipse([left, top + 3, left + 13, top + 16], GLOW)
    _line(pen, (left + 22, top), text, SMALL_SIZE, FAINT, PANEL - 22)


def _line(
    pen: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    size: int,
    colour: tuple[int, int, int],
    width: int,
    elide_middle: bool = False,
) -> None:
    """One line of text, shortened where it is wider than `width` pixels."""
    text = shown = " ".join(text.split())
    font, kept = _font(size), len(text)
    while font.getlength(shown) > width and kept > 1:
        kept -= 1
        tail = kept // 2 if elide_middle else 0
        shown = f"{text[: kept - tail].rstrip()}…{text[len(text) - tail :]}"
    pen.text(place, shown, colour, font)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
