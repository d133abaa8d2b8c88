"""Small image trees, written once per session or per test."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.config import DataConfig
from data.digits import prepare_digits
from data.sources import Source, open_sources

WriteTree = Callable[[dict[str, Iterable[str]]], Path]


@pytest.fixture(scope="session")
def digits_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("datasets") / "digits"
    prepare_digits(root)
    return root


@pytest.fixture(scope="session")
def digits(digits_root: Path) -> tuple[Source, Source]:
    return open_sources(DataConfig(kind="digits", root=str(digits_root)))


@pytest.fixture
def write_tree(tmp_path: Path) -> WriteTree:
    """Writes images named in `{"train/cat": ["a.png", ...], ...}` below a new folder."""

    def write(folders: dict[str, Iterable[str]]) -> Path:
        root = tmp_path / "images"
        for folder, names in folders.items():
            (root / folder).mkdir(parents=True)
            for name in names:
                pixels = np.random.default_rng(len(name)).integers(256, size=(20, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / folder / name)
        return root

    return write
