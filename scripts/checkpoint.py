"""Look into checkpoints, verify them, and export their weights.

python scripts/checkpoint.py inspect runs/x [--json]          what the newest one holds
python scripts/checkpoint.py verify runs/x runs/y ...         all of them against their checksums; exit status 1 if one is damaged
python scripts/checkpoint.py export runs/x x.safetensors      the best one's bare weights (or x.pth; --ema: the averaged ones)

PATH is a run folder, a folder of checkpoints or a file. Nothing is renamed, repaired or overwritten.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from vip import checkpoint, config
from vip.checkpoint import CheckpointError
from vip.config import ConfigError, RunConfig
from vip.ranks import one_line_errors
from vip.tracking.jsonl import read_lines

GROUPS = ("model", "ema", "optimizer")
FORMATS = {"parameters": "{:,}", "best_top1": "{:.2f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Look into checkpoints, verify them, export their weights.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="what a checkpoint holds (of a folder: the newest)")
    inspect.add_argument("path", type=Path)
    inspect.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    verify = commands.add_parser("verify", help="check checksums (of a folder: all checkpoints)")
    verify.add_argument("paths", type=Path, nargs="+", metavar="path")
    export = commands.add_parser(
        "export", help="bare weights (of a folder: the best checkpoint's), for eval.py and others"
    )
    export.add_argument("path", type=Path)
    export.add_argument("out", type=Path, help="to be written: *.safetensors or *.pth")
    export.add_argument("--ema", action="store_true", help="the averaged weights")
    args = parser.parse_args()
    with one_line_errors():
        if args.command == "inspect":
            print_facts(facts_of(files_of(args.path)[-1]), args.json)
        elif args.command == "verify":
            raise SystemExit(verify_files([file for path in args.paths for file in files_of(path)]))
        else:
            export_weights(checkpoint.find(args.path), args.out, args.ema)


def files_of(path: Path) -> list[Path]:
    """The checkpoints meant by a path, the newest last. Raises CheckpointError where there is none."""
    best = checkpoint.find(path)
    if path.is_file():
        return [path]
    return [*best.parent.glob("best.safetensors"), *sorted(best.parent.glob("step_*.safetensors"))]


def facts_of(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; sizes in MB (10^6 bytes). Raises CheckpointError where it is not whole."""
    state = checkpoint.read(path).state
    about, weights = state["fingerprint"], state["model"]
    groups = {name: _tensors(state[name]) for name in GROUPS}
    return {
        "file": str(path),
        "checksum": "ok",
        "step": state["step"],
        "epoch": _epoch(path, state["step"]),
        "model": about["model"],
        "classes": about["num_classes"],
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "precision": about["precision"],
        "world_size": about["world_size"],
        "batch_size": about["batch_size"],
        "best_top1": state["progress"]["best_top1"] if state["progress"]["best_top1"] >= 0 else None,
        "departures": _departures(state["config"]),
        "tensors": {
            name: {"count": len(tensors), "megabytes": round(sum(t.nbytes for t in tensors) / 1e6, 3)}
            for name, tensors in groups.items()
        },
    }


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    shown = Table(title=facts["file"], title_justify="left", show_header=False)
    for name, value in facts.items():
        if name == "tensors":
            for group, size in value.items():
                shown.add_row(group, f"{size['count']} tensors, {size['megabytes']:,.1f} MB")
        elif name == "departures":
            shown.add_row("departures from the published recipe", "\n".join(value) or "none")
        elif name != "file":
            text = "unknown" if value is None else FORMATS.get(name, "{}").format(value)
            shown.add_row(name.replace("_", " "), text)
    Console(soft_wrap=True, highlight=False, markup=False).print(shown)


def verify_files(paths: list[Path]) -> int:
    """Print a table of all of them; the exit status, 1 where one is not whole."""
    shown, damaged = Table("file", "MB", "step", "state"), 0
    for path in paths:
        try:
            step, said = str(checkpoint.read(path).step), "ok"
        except CheckpointError as error:
            step, said = "", str(error).removeprefix(f"{path}: ").removesuffix("; delete it")
            damaged += 1
        shown.add_row(str(path), f"{path.stat().st_size / 1e6:,.1f}", step, said)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(shown)
    console.print(f"{len(paths)} checkpoints, {damaged} damaged")
    return int(damaged > 0)


def export_weights(path: Path, out: Path, ema: bool) -> None:
    """Write the weights alone, under their published names: whole, or not at all.

    Raises ConfigError for another suffix, a file that is there, and averages that are not.
    """
    if out.suffix not in (".safetensors", ".pth"):
        raise ConfigError(f"{out}: neither .safetensors nor .pth; the name says which format is meant")
    if out.exists():
        raise ConfigError(f"{out}: is there already; choose another name, or delete it")
    state = checkpoint.read(path).state
    if ema and state["ema"] is None:
        raise ConfigError(f"--ema: {path} has no averaged weights (train with ema_decay=0.9999)")
    weights = {name: tensor.contiguous() for name, tensor in state["ema" if ema else "model"].items()}
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(checkpoint.encode_weights(weights, out.suffix))
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    name = state["fingerprint"]["model"]
    print(f"{out}: {'averaged' if ema else 'raw'} weights of {name} after step {state['step']} of {path}")
    print(f"next: python eval.py checkpoint={out} model={name} data=... data.root=...")


def _tensors(node: Any) -> list[Tensor]:
    if isinstance(node, Tensor):
        return [node]
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [tensor for child in children for tensor in _tensors(child)]


def _epoch(path: Path, step: int) -> float | None:
    """Finished epochs, as the run's metrics.jsonl counts them; None where there is none beside the checkpoint."""
    lines = read_lines(path.parent.parent / "metrics.jsonl")
    return round(step * lines[-1]["epoch"] / lines[-1]["step"], 2) if lines else None


def _departures(trained: dict[str, Any]) -> list[str]:
    try:
        return config.departures(config.parse(RunConfig, trained))
    except ConfigError as error:  # from a version with other keys
        return [f"unknown ({error})"]


if __name__ == "__main__":
    main()
