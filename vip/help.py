"""`--help`: written from the schema and the files of conf/, so that it cannot say what is not there."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from vip import config

GROUPS = {
    "train": ["model", "data", "augment", "optimizer", "schedule", "precision", "tracking", "experiment"],
    "eval": ["model", "data", "precision"],
}


def print_help(config_name: str, schema: Any) -> None:
    """What the command does, the choices of each group with their first words, and every key."""
    console = Console()
    main = config.CONF_DIR / f"{config_name}.yaml"
    console.print(f"[bold]{Path(sys.argv[0]).name} key=value ... group=choice ...[/bold]\n")
    console.print(escape("\n".join(_opening(main))), highlight=False)
    groups = Table(title="\nGroups: group=choice", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("group", "choice", "what it is"):
        groups.add_column(heading, no_wrap=heading != "what it is")
    for group in GROUPS[config_name]:
        for i, path in enumerate(sorted((config.CONF_DIR / group).glob("*.yaml"))):
            groups.add_row(group if i == 0 else "", path.stem, escape(_opening(path)[0]))
    console.print(groups, highlight=False)
    console.print("\nKeys: key=value")
    defaults = dict(config.defaults(config_name))
    for key, kind, text in config.walk(schema):
        default = f" = {config.as_yaml(defaults[key])}" if key in defaults else ""
        console.print(
            f"[bold]{key}[/bold]{escape(default)}   [dim]{escape(kind)}[/dim]", highlight=False, soft_wrap=True
        )
        console.print(Padding(escape(text), (0, 0, 0, 4)), highlight=False)
    console.print(
        "\nSeveral values at once, one run after the other: -m seed=1,2,3.  The composed configuration: --cfg job."
    )


def _opening(path: Path) -> list[str]:
    """The comment that opens a YAML file, line by line."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    return [
        line.lstrip("# ") if i == 0 else line.removeprefix("#") for i, line in enumerate(lines) if line.startswith("#")
    ]
