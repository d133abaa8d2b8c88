"""The configuration: every file of conf/ composes, the published recipe is in it, and what cannot be is one line."""

import dataclasses
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from data.config import AugmentConfig
from scripts.faults.blackhole import black_hole
from tests.conftest import ROOT, Run
from vip import config
from vip.config import CheckpointData, ConfigError, EvalConfig, RunConfig
from vip.models.build import build_model

CHOICES = sorted(str(path.relative_to(config.CONF_DIR).with_suffix("")) for path in config.CONF_DIR.glob("*/*.yaml"))
# What some choices leave to the user.
REQUIRED = {"model/timm": ["model.name=resnet18"], "data/folder": ["data.root=images"],
            "data/arrow": ["data.root=images"]}  # fmt: skip
VIP_NAMES = ("vip_s16", "vip_s14", "vip_s7", "vip_m7", "vip_l7", "vip_tiny")


def compose(*overrides: str) -> RunConfig:
    return config.parse(RunConfig, config.compose("train", list(overrides)))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice != "data/checkpoint"])
def test_every_choice_of_every_group_composes(choice: str) -> None:
    group, name = choice.split("/")
    run = compose(f"{group}={name}", *REQUIRED.get(choice, []))
    text = (config.CONF_DIR / f"{choice}.yaml").read_text().removeprefix("# @package _global_\n")
    assert text.startswith("# "), "every file opens with a comment"
    written = flat({key: value for key, value in yaml.safe_load(text).items() if key != "defaults"})
    prefix = "" if group == "experiment" else f"{group}."
    composed = flat(dataclasses.asdict(run))
    for key, value in written.items():
        if value != "???":
            assert composed[prefix + key] == (tuple(value) if isinstance(value, list) else value), key


@pytest.mark.parametrize(
    "choice", [choice for choice in CHOICES if choice.split("/")[0] in ("model", "data", "precision")]
)
def test_every_choice_composes_for_evaluation(choice: str) -> None:
    overrides = ["checkpoint=runs/x", choice.replace("/", "=", 1), *REQUIRED.get(choice, [])]
    run = config.parse(EvalConfig, config.compose("eval", overrides))
    assert isinstance(run.data, CheckpointData) == (not choice.startswith("data/") or choice == "data/checkpoint")


@pytest.mark.parametrize("name", VIP_NAMES)
def test_every_model_choice_builds(name: str) -> None:
    chosen = compose(f"model={name}").model
    assert chosen.name == name
    options: dict[str, Any] = {
        "mixer": chosen.mixer,
        "drop_rate": chosen.drop_rate,
        "drop_path_rate": chosen.drop_path.rate,
    }
    assert timm.create_model(chosen.name, num_classes=7, device="meta", **options).num_classes == 7


@pytest.mark.parametrize(
    ("overrides", "size"), [(("model=vip_tiny", "model.img_size=[48,16]", "model.mixer=plain"), (48, 16)),
                            (("model=timm", "model.name=mixer_s32_224", "model.img_size=64"), (64, 64)),
                            (("model=timm", "model.name=resnet18", "model.img_size=64"), (64, 64))]
)  # fmt: skip
def test_model_keys_reach_the_network(overrides: tuple[str, ...], size: tuple[int, int]) -> None:
    from vip.models.build import input_spec

    chosen = compose(*overrides).model
    model = build_model(chosen, 3)
    assert input_spec(chosen, model).size == size
    assert model.num_classes == 3


def test_a_network_that_does_not_take_an_option_says_so() -> None:
    with pytest.raises(ValueError, match=r"model.name=resnet18: does not take .*mixer"):
        build_model(compose("model=timm", "model.name=resnet18", "model.mixer=plain").model, 3)
    with pytest.raises(ValueError, match=r"model.name=resnet81: no such network; near: .*resnet18"):
        build_model(compose("model=timm", "model.name=resnet81").model, 3)


@pytest.mark.parametrize("name", ["vip_s7", "vip_m7", "vip_l7"])
def test_a_bare_model_is_the_published_experiment(name: str) -> None:
    bare, experiment = compose(f"model={name}"), compose(f"experiment={name}_imagenet")
    assert experiment.name == f"{name}_imagenet"
    assert dataclasses.replace(bare, name=experiment.name) == experiment


@pytest.mark.parametrize(("name", "drop_path"), [("vip_s7", 0.1), ("vip_m7", 0.2), ("vip_l7", 0.3)])
def test_the_published_recipe_key_by_key(name: str, drop_path: float) -> None:
    run = flat(dataclasses.asdict(compose(f"experiment={name}_imagenet")))
    published = {
        "epochs": 300, "batch_size": 2048, "ema_decay": None, "max_steps": None,
        "model.name": name, "model.mixer": "weighted", "model.img_size": None, "model.drop_rate": 0.0,
        "model.drop_path.rate": drop_path, "model.drop_path.over_depth": "linear",
        "model.drop_path.over_training": "constant",
        "data.kind": "imagenet",
        "optimizer.name": "adamw", "optimizer.lr": 1e-3, "optimizer.lr_batch": 1024, "optimizer.weight_decay": 0.05,
        "optimizer.clip_grad": None,
        "schedule.kind": "cosine", "schedule.per": "epoch", "schedule.warmup_epochs": 20, "schedule.warmup_lr": 1e-6,
        "schedule.min_lr": 1e-5, "schedule.cooldown_epochs": 10,
        "augment.scale": (0.08, 1.0), "augment.hflip": 0.5, "augment.interpolation": "random",
        "augment.rand_augment": "rand-m9-mstd0.5-inc1", "augment.three_augment": False, "augment.color_jitter": 0.0,
        "augment.erase_prob": 0.25, "augment.erase_mode": "pixel", "augment.mixup": 0.8, "augment.cutmix": 1.0,
        "augment.mix_prob": 1.0, "augment.mix_switch_prob": 0.5, "augment.label_smoothing": 0.1, "augment.repeats": 1,
        "precision.name": "fp16",
    }  # fmt: skip
    assert {key: run[key] for key in published} == published
    assert compose(f"experiment={name}_imagenet").total_epochs == 310


def test_the_default_augmentation_is_the_published_one() -> None:
    assert compose("augment=vip").augment == AugmentConfig()
    assert compose("augment=none").augment == AugmentConfig.none()


def test_departures_name_what_differs_and_nothing_else() -> None:
    assert config.departures(compose("model=vip_m7", "name=x", "seed=1", "data.workers=2", "tracking=wandb")) == []
    departed = compose("model=vip_m7", "optimizer.lr=2e-3", "augment.mixup=0", "epochs=100", "ema_decay=0.9")
    assert config.departures(departed) == [
        "epochs: 300 -> 100",
        "ema_decay: null -> 0.9",
        "augment.mixup: 0.8 -> 0.0",
        "optimizer.lr: 0.001 -> 0.002",
    ]
    assert config.departures(compose("experiment=digits")) == []
    assert config.departures(compose("model=vip_s14")) == [], "it has no published run"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("epocs=3", ("epocs=3", "nearest: epochs")),
        ("+epocs=3", ("epocs=3", "nearest: epochs")),
        ("optimizer.learning_rate=1", ("optimizer.learning_rate=1",)),
        ("optimizer.weight_decai=0", ("optimizer.weight_decai=0", "nearest: optimizer.weight_decay")),
        ("lr=0.1", ("lr=0.1", "nearest: optimizer.lr")),
        ("modle=vip_s7", ("modle=vip_s7", "nearest: model")),
        ("model=vip_s6", ("model=vip_s6", "nearest: vip_s", "vip_tiny")),
        ("experiment=vip_s7_imagnet", ("experiment=vip_s7_imagnet", "nearest: vip_s7_imagenet")),
        ("epochs=many", ("epochs=many", "integer")),
        ("epochs=-5", ("epochs=-5", "greater than or equal to 1")),
        ("optimizer.lr=abc", ("optimizer.lr=abc", "number")),
        ("epochs=1.5", ("epochs=1.5", "integer")),
        ("epochs=0", ("epochs=0", "greater than or equal to 1")),
        ("epochs=null", ("epochs=null",)),
        ("compile=1", ("compile=1", "boolean")),
        ("batch_size=-8", ("batch_size=-8", "1")),
        ("optimizer.lr=0", ("optimizer.lr=0", "greater than 0")),
        ("optimizer.betas=[0.9]", ("optimizer.betas",)),
        ("schedule.kind=cosin", ("schedule.kind=cosin", "'cosine' or 'constant'")),
        ("schedule.warmup_epochs=300", ("schedule.warmup_epochs=300", "schedule.warmup_epochs=30")),
        ("model.drop_path.rate=1", ("model.drop_path.rate=1", "less than 1")),
        ("model.mixer=heavy", ("model.mixer=heavy", "weighted|plain")),
        ("model.img_size=wide", ("model.img_size=wide",)),
        ("augment.scale=[0.9,0.1]", ("augment.scale=[0.9, 0.1]", "[0.08, 1.0]")),
        ("augment.rand_augment=rnd-m9", ("augment.rand_augment='rnd-m9'", "rand-m9-mstd0.5-inc1")),
        ("augment.repeats=4096", ("augment.repeats=4096", "2048")),
        ("keep=1", ("keep=1", "2")),
        ("name=a/b", ("name=a/b", "letters")),
        ("model=timm", ("model.name", "must be given")),
        ("~epochs", ("epochs", "required")),
        ("just_a_word", ("just_a_word",)),
    ],
)
def test_a_wrong_key_or_value_is_named_in_one_line(override: str, expected: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refused:
        compose(override)
    message = str(refused.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("train.py", ("epocs=3",), "train.py: error: epocs=3: no such key; nearest: epochs\n"),
        (
            "train.py",
            ("model=vip_s8", "batch_size=x"),
            "train.py: error: model=vip_s8: no such choice; nearest: vip_s7",
        ),
        ("train.py", ("experiment=digits", "optimizer.lr=fast"), "train.py: error: optimizer.lr=fast: should be"),
        ("train.py", ("-m", "epocs=3,4"), "train.py: error: epocs=3: no such key; nearest: epochs\n"),
        (
            "train.py",
            ("-m", "model=vip_s8", "seed=1,2"),
            "train.py: error: model=vip_s8: no such choice; nearest: vip_s7",
        ),
        ("train.py", ("-m", "optimizer.lr=range(0,3)"), "train.py: error: optimizer.lr=0: should be"),
        (
            "eval.py",
            ("checkpoint=x", "precison=bf16"),
            "eval.py: error: precison=bf16: no such key; nearest: precision\n",
        ),
        ("eval.py", ("checkpoint=x", "batch_size=0"), "eval.py: error: batch_size=0: should be greater"),
    ],
)
def test_the_command_line_says_it_before_anything_is_written(
    run: Run, tmp_path: Path, script: str, arguments: tuple[str, ...], expected: str
) -> None:
    refused = run(script, *arguments, status=2)
    assert refused.stderr.startswith(expected)
    assert refused.stderr.count("\n") == 1
    assert refused.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("script", "schema"), [("train.py", RunConfig), ("eval.py", EvalConfig)])
def test_help_mentions_every_key_and_every_choice(run: Run, script: str, schema: Any) -> None:
    said = run(script, "--help").stdout
    for key, kind, text in config.walk(schema):
        assert re.search(rf"^{re.escape(key)}( =|   )", said, re.MULTILINE), key
        assert kind in said
        assert text, f"{key} has no description"
        assert " ".join(text.split()[:4]) in said
    groups = {"model", "data", "precision"} if script == "eval.py" else {choice.split("/")[0] for choice in CHOICES}
    for choice in CHOICES:
        group, name = choice.split("/")
        if group in groups:
            assert re.search(rf"^ *({group} +)?{name}  ", said, re.MULTILINE), choice


@pytest.mark.parametrize(("name", "schema"), [("train", RunConfig), ("eval", EvalConfig)])
def test_every_key_of_the_schema_stands_in_the_yaml(name: str, schema: Any) -> None:
    """Else the command line could not set it."""
    given = {key for key, _ in config.defaults(name)}
    optional = ("model.", "data.") if name == "eval" else ()  # the checkpoint's own, unless a group is chosen
    assert [key for key, *_ in config.walk(schema) if key not in given and not key.startswith(optional)] == []


def test_the_configuration_is_frozen_and_writes_itself_back() -> None:
    run = compose("experiment=digits", "model.img_size=[32,48]", "name=123")
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.epochs = 3  # type: ignore[misc]
    assert run.name == "123"
    assert run.folder == Path("runs/123")
    assert config.parse(RunConfig, yaml.safe_load(config.to_yaml(run))) == run


@pytest.mark.parametrize("override", ["epochs=-5", "optimizer.lr=abc", "epocs=3", "epochs=1.5"])
def test_a_rank_says_what_is_wrong_before_it_looks_for_the_others(
    override: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with black_hole() as url:  # joining the group would hang here
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", url.rpartition(":")[2])
        monkeypatch.setattr(sys, "argv", ["train.py", "experiment=digits", override])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert stopped.value.code == 2
    assert not torch.distributed.is_initialized()
    said = capsys.readouterr().err
    assert said.startswith(f"train.py: error: {override}: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "text", ["epochs: [1,\n", "epochs: 3\n  seed: 1\n", "a: *nowhere\n", "\tepochs: 3\n", "a: @x\n"]
)
def test_a_file_that_is_not_yaml_is_named_with_its_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}")
    with pytest.raises(ConfigError, match=r"experiment/mine\.yaml, line \d+: not plain YAML \(.+\)$") as refused:
        compose(f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine")
    assert "\n" not in str(refused.value)


def test_a_file_of_ones_own_is_found_on_the_search_path(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 7\n")
    assert compose(f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine").seed == 7


def test_every_job_of_a_sweep_is_checked_before_the_first_begins(run: Run, tmp_path: Path) -> None:
    refused = run("train.py", "-m", "experiment=digits", "seed=1,2", "epochs=4,-5", status=2)
    assert refused.stderr == "train.py: error: epochs=-5: should be greater than or equal to 1\n"
    assert list(tmp_path.iterdir()) == []


SECRETS = {
    "https://me:pa/s@s:word@host.example/images?x=1": "https://<redacted>@host.example/images?x=1",
    "s3://AKIAIOSFODNN7EXAMPLE/bucket": "s3://<redacted>/bucket",
    "https://ghp_0123456789abcdefghijABCDEFGHIJ012345@host/x": "https://<redacted>@host/x",
    "https://host/x.tar?sv=1&sig=abc%2F=&y=2": "https://host/x.tar?sv=1&<redacted>&y=2",
    "0123456789abcdef0123456789abcdef01234567": "<redacted>",
    "run-hf_abcdefghijklmnopqrstuvwxyz012345": "run-<redacted>",
    "sk-proj-abcdefghijklmnopqrstuvwxyz": "<redacted>",
}
HARMLESS = [
    "runs/vip_s7",
    "https://host:8080/a/b",
    "rand-m9-mstd0.5-inc1",
    "/data/n01440764",
    "task-force-of-many-people-x",
]


@pytest.mark.parametrize(("value", "shown"), [*SECRETS.items(), *((value, value) for value in HARMLESS)])
def test_what_looks_like_a_secret_is_not_shown(value: str, shown: str) -> None:
    run = dataclasses.replace(compose("experiment=digits"), runs_dir=value)
    assert config.redacted(run)["runs_dir"] == shown
    assert yaml.safe_load(config.to_yaml(run))["runs_dir"] == shown
    kept = config.redacted(run) | {"runs_dir": value}
    assert kept == yaml.safe_load(config.to_yaml(compose("experiment=digits"))) | {"runs_dir": value}, (
        "nothing else changes"
    )


def test_keys_that_are_named_like_secrets_are_not_shown() -> None:
    @dataclasses.dataclass
    class Account:
        api_key: str | None
        access_token: str
        password: int
        nested: dict[str, Any]

    shown = config.redacted(Account(None, "x", 1234, {"client_secret": ["a", "b"], "steps": 3}))
    hidden = "<redacted>"
    nested = {"client_secret": [hidden, hidden], "steps": 3}
    assert shown == {"api_key": None, "access_token": hidden, "password": hidden, "nested": nested}
