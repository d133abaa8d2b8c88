"""The rules of docs/design.md that a machine can check: who imports whom, sizes, and nothing of one machine in the tree."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

ENTRY_POINTS = {"train.py", "eval.py"}


@cache
def files() -> tuple[str, ...]:
    """What is under version control, or would be: as git lists it, or the tree itself where there is no git."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        names = set(listed.stdout.split("\0")) - {""}
    else:
        places = ("conf", "data", "vip", "scripts", "tests", "docs")
        found = [*ROOT.glob("*.*"), *(path for place in places for path in (ROOT / place).rglob("*"))]
        names = {str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts}
    return tuple(sorted(name for name in names if (ROOT / name).is_file()))


def python(*places: str) -> list[str]:
    return [name for name in files() if name.endswith(".py") and name.startswith(places or ("",))]


@cache
def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


@cache
def imports(name: str) -> frozenset[str]:
    """Every module a file imports, anywhere in it; `from a import b` counts as a and as a.b."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def of(name: str, *packages: str) -> set[str]:
    return {module for module in imports(name) if any(module == p or module.startswith(f"{p}.") for p in packages)}


def test_the_rules_see_the_whole_tree() -> None:
    assert {"train.py", "eval.py", "vip/engine.py", "vip/tracking/wandb_run.py", "data/loader.py"} <= set(python())
    assert "vip.schedule.lr_at" in imports("vip/engine.py")
    assert of("vip/distributed.py", "torch.distributed")


@pytest.mark.parametrize("name", python("train.py", "eval.py", "vip/", "data/", "scripts/"))
def test_nothing_imports_the_entry_points(name: str) -> None:
    inside_scripts = name.startswith("scripts/")
    assert not of(name, "train", "eval", "tests", *(() if inside_scripts else ("scripts",)))


@pytest.mark.parametrize("name", python("vip/"))
def test_the_small_parts_know_torch_timm_and_their_own_dataclass(name: str) -> None:
    own = {
        "vip/models/": ("vip.models", "vip.stochastic_depth", "vip.apex_kernels"),
        "vip/optim.py": ("vip.apex_kernels",),
        "vip/apex_kernels.py": (),
        "vip/scaling.py": ("vip.plan",),
        "vip/schedule.py": (),
        "vip/precision.py": (),
        "vip/stochastic_depth.py": (),
        "vip/checkpoint.py": (),
        "vip/tracking/": ("vip.tracking", "vip.plan"),
        "vip/evaluate.py": ("vip.distributed", "vip.precision", "data"),
        "vip/metrics.py": ("vip.distributed",),
        "vip/distributed.py": ("data.parent", "vip.host_memory"),
        "vip/host_memory.py": (),
        "vip/plan.py": ("data",),
        "vip/guard.py": ("data",),
        "vip/watch.py": ("vip.distributed",),
        "vip/bad_images.py": ("vip.config", "data"),
        "vip/gates.py": ("vip.distributed", "vip.models"),
        "vip/views.py": ("vip.evaluate", "vip.gates", "vip.tracking", "data"),
        "vip/environment.py": ("vip.redact",),
        "vip/mfu.py": ("vip.models",),
        "vip/profiling.py": (),
        "vip/page/": ("vip.page",),
        "vip/preflight.py": ("vip.config", "vip.checkpoint"),
        "vip/engine.py": (
            "vip.checkpoint", "vip.tracking", "vip.distributed", "vip.metrics", "vip.evaluate", "vip.schedule",
            "vip.precision", "vip.optim", "vip.stochastic_depth", "vip.plan", "vip.config", "vip.guard", "vip.watch",
            "vip.bad_images", "vip.gates", "vip.profiling", "vip.views", "data",
        ),
    }  # fmt: skip
    for place, allowed in own.items():
        if name.startswith(place):
            beyond = of(name, "vip", "data") - of(name, *allowed) - {"vip"}
            assert not beyond, f"{name} may not import {sorted(beyond)}"


@pytest.mark.parametrize("name", python("data/"))
def test_data_never_imports_vip(name: str) -> None:
    assert not of(name, "vip")


@pytest.mark.parametrize("name", python("vip/", "data/", "scripts/", "train.py", "eval.py"))
def test_libraries_with_side_effects_stay_in_their_place(name: str) -> None:
    if name not in ENTRY_POINTS | {"vip/config.py"} and not name.startswith("scripts/"):
        assert not of(name, "hydra", "omegaconf")
    if not name.startswith("vip/tracking/"):
        assert not of(name, "wandb", "tensorboard", "torch.utils.tensorboard")
    if name != "vip/distributed.py":
        assert not of(name, "torch.distributed")
        assert not [
            n for n in ast.walk(tree(name)) if isinstance(n, ast.Attribute) and ast.unparse(n) == "torch.distributed"
        ]
    if name != "vip/checkpoint.py" and not name.startswith("vip/models/"):
        calls = {ast.unparse(node.func) for node in ast.walk(tree(name)) if isinstance(node, ast.Call)}
        assert not calls & {"torch.load", "torch.save", "save_file", "load_file", "safe_open"}


def functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (part for part in ast.walk(node) if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("name", python())
def test_files_and_functions_are_short_and_say_what_they_are(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) < 400
    for function in functions(tree(name)):
        assert function.end_lineno is not None
        assert function.end_lineno - function.lineno < 60, f"{name}: {function.name}"
    if tree(name).body:
        assert ast.get_docstring(tree(name)), f"{name} has no docstring"


HOME_OF_SOMEONE = r"(?<![\w.}])/(?:home|root|Users|work|workspace|scratch)/\w"
PACKAGE_INDEX = (
    r"https?://[\w.:@/-]*(?:pypi|pythonhosted|artifactory|nexus)|(?:-index|index|find-links)(?:-url)?[ =]\"?https?:"
)


@pytest.mark.parametrize("pattern", [HOME_OF_SOMEONE, PACKAGE_INDEX])
def test_no_file_names_a_machine_or_a_package_index(pattern: str) -> None:
    for name in files():
        content = (ROOT / name).read_bytes()
        if b"\0" not in content:
            found = re.search(pattern, content.decode())
            assert found is None, f"{name}: {found[0]}"
    examples = [
        "cd " + "/home" + "/me/x",
        "--index-url " + "https:" + "//10.0.0.1/simple",
        "https:" + "//files." + "pythonhosted" + ".org",
    ]
    assert any(re.search(pattern, example) for example in examples)


def test_every_fault_has_its_test() -> None:
    rows = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", (ROOT / "docs/reliability.md").read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 41))
    for number, cell in rows:
        named = re.findall(r"`([\w/]+\.py)` ([^;]+)", cell)
        assert named, number
        for file, names in named:
            tests = {function.name for function in functions(tree(f"tests/{file}"))}
            for name in names.split(","):
                assert name.strip() == "(all)" or f"test_{name.strip()}" in tests, f"row {number}: {file} {name}"


def test_importing_vip_registers_the_models_and_does_nothing_else(tmp_path: Path) -> None:
    code = """
import os, sys, timm
before = set(sys.modules), os.environ.copy(), timm.list_models()
import vip
new = set(timm.list_models()) - set(before[2])
assert new == {"vip_s16", "vip_s14", "vip_s7", "vip_m7", "vip_l7", "vip_tiny"}, new
assert os.environ.copy() == before[1]
loaded = {name.split(".")[0] for name in set(sys.modules) - before[0]}
assert not loaded & {"hydra", "omegaconf", "wandb", "data"}, loaded
import torch
assert not torch.distributed.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
    assert list(tmp_path.iterdir()) == []
