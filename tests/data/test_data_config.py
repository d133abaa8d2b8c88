"""The schema: published defaults, bounds, and messages that name the value."""

import dataclasses
import json
from typing import Any, get_args, get_type_hints

import pytest
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from data.config import AugmentConfig, DataConfig


def test_defaults_are_the_published_recipe() -> None:
    config = AugmentConfig()
    assert (config.scale, config.ratio, config.hflip, config.interpolation) == (
        (0.08, 1.0),
        (3 / 4, 4 / 3),
        0.5,
        "random",
    )
    assert config.rand_augment == "rand-m9-mstd0.5-inc1"
    assert (config.erase_prob, config.erase_mode) == (0.25, "pixel")
    assert (config.mixup, config.cutmix, config.mix_prob, config.mix_switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert (config.label_smoothing, config.color_jitter, config.three_augment, config.repeats) == (0.1, 0.0, False, 1)


@pytest.mark.parametrize("schema", [DataConfig, AugmentConfig])
def test_every_key_is_described(schema: type) -> None:
    for field, hint in get_type_hints(schema, include_extras=True).items():
        assert any(isinstance(note, FieldInfo) and note.description for note in get_args(hint)[1:]), field


@pytest.mark.parametrize("config", [DataConfig(), AugmentConfig(), AugmentConfig.none()])
def test_survives_json(config: Any) -> None:
    text = json.dumps(dataclasses.asdict(config))
    assert TypeAdapter(type(config)).validate_json(text, strict=True) == config


@pytest.mark.parametrize(
    "values",
    [
        {"hflip": 1.5},
        {"hflip": "often"},
        {"mixup": -0.1},
        {"label_smoothing": 1.0},
        {"repeats": 0},
        {"interpolation": "nearest"},
        {"scale": [0.5]},
    ],
)
def test_refuses_impossible_values(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(values))):
        TypeAdapter(AugmentConfig).validate_json(json.dumps(values), strict=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale": (0.9, 0.1)}, r"scale=\[0.9, 0.1\] must satisfy"),
        ({"ratio": (0.0, 1.0)}, r"ratio=\[0.0, 1.0\] must satisfy"),
        ({"rand_augment": "random-m9"}, "'random-m9' is not a RandAugment string"),
        ({"rand_augment": "rand-x9"}, "'rand-x9' is not a RandAugment string"),
        ({"three_augment": True}, "set rand_augment=null or three_augment=false"),
    ],
)
def test_messages_name_value_and_remedy(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**values)
