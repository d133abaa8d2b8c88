"""The course of scripts/predict.py: look at the images in turn, say what is in them, and leave the cards."""

import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.folder import printable
from scripts.prediction.card import MAX_SHEET, draw_card, draw_sheet
from scripts.prediction.explain import Explainer
from scripts.prediction.images import list_images, place_cards
from scripts.prediction.names import class_names
from scripts.prediction.network import Prediction, Predictor
from vip.config import ConfigError, EvalConfig, compose, parse
from vip.ranks import one_line_errors
from vip.trained import open_trained

BAR, NAME = 32, 32  # columns of the terminal


def predict(keys: list[str], arguments: list[str], explain: bool) -> None:
    """`keys` are eval.py's, `arguments` files and folders."""
    with one_line_errors():
        run = parse(EvalConfig, compose("eval", keys))
        out = Path(run.out or "predictions")
        images = list_images(arguments)
        on_sheet = out.suffix.lower() == ".png"
        if on_sheet and len(images) > MAX_SHEET:
            raise ConfigError(
                f"out={out}: {MAX_SHEET} images fit on a sheet, {len(images):,} were given; name a folder"
            )
        trained = open_trained(run)
        names = class_names(run, trained)
        predictor = Predictor(trained, run.precision)
        explainer = Explainer(predictor.model) if explain else None
        console = Console(highlight=False, markup=False)
        console.print(f"{trained.model.name}, {trained.path} ({trained.origin})", soft_wrap=True)
        cards = _cards(predictor.predict(images, _warn), names, explainer, console)
        if on_sheet:
            sheet = [card for _, card in cards]
            num = len(sheet)
            if sheet:
                _save(draw_sheet(sheet), out)
        else:
            places, num = place_cards(images, out), 0
            for prediction, card in cards:
                _save(card, places[prediction.image.path])
                num += 1
        if not num:
            raise ConfigError(f"none of the {len(images):,} images could be decoded: the warnings say why")
        left_out = f", {len(images) - num:,} left out" if num < len(images) else ""
        console.print(f"{num:,} image{'s' if num > 1 else ''}{left_out}; written: {out}", soft_wrap=True)


def _cards(
    predictions: Iterator[Prediction], names: tuple[str, ...], explainer: Explainer | None, console: Console
) -> Iterator[tuple[Prediction, Image.Image]]:
    """Each prediction with its card, once it was printed."""
    for prediction in predictions:
        _print(prediction, names, console)
        shares = explainer.map(prediction.seen, prediction.top[0][0]).numpy() if explainer else None
        yield prediction, draw_card(prediction, names, shares)


def _print(prediction: Prediction, names: tuple[str, ...], console: Console) -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=2)
    table.add_column(width=min(NAME, max(map(len, names))), no_wrap=True)
    table.add_column(width=BAR)
    table.add_column(justify="right")
    for place, (label, probability) in enumerate(prediction.top):
        bar = Bar(1, 0, probability, width=BAR, color="blue" if place == 0 else "bright_black")
        table.add_row("", Text(names[label]), bar, f"{100 * probability:.2f} %")
    console.print(Text(printable(str(prediction.image.path)), "bold"), soft_wrap=True)
    console.print(table)


def _save(card: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    card.save(path)
    return path


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
