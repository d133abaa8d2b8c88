"""Names of classes, for people: from the checkpoint, from the data set or by number; ImageNet's ids become words."""

import re
from collections import Counter
from collections.abc import Sequence

from timm.data import ImageNetInfo

from data.sources import open_source
from vip.config import CheckpointData, ConfigError, EvalConfig
from vip.trained import Trained

WNID = re.compile(r"n\d{8}")
IMAGENET_CLASSES = 1000


def class_names(run: EvalConfig, trained: Trained) -> tuple[str, ...]:
    """One name for each logit. Raises ConfigError where the data that `run` names have other classes than the network."""
    num_classes = trained.num_classes
    if trained.class_names is not None:
        return in_words(trained.class_names)
    if trained.data is not None and (not isinstance(run.data, CheckpointData) or run.data.root is not None):
        names = open_source(trained.data, "val").class_names
        if len(names) != num_classes:
            raise ConfigError(
                f"data.root={trained.data.root} has {len(names)} classes, {trained.path} has {num_classes}: "
                "give the data it was trained on, or none"
            )
        return in_words(names)
    if trained.data is None and num_classes == IMAGENET_CLASSES:  # what is published with so many classes is ImageNet's
        return in_words(ImageNetInfo().label_names())
    return tuple(f"class {number}" for number in range(num_classes))


def in_words(names: Sequence[str]) -> tuple[str, ...]:
    """ImageNet's ids (n01440764) as timm's list translates them (tench), with the id where two would read the same."""
    if not all(map(WNID.fullmatch, names)):
        return tuple(names)
    info = ImageNetInfo()
    try:
        words = [info.label_name_to_description(name, detailed=False).partition(",")[0] for name in names]
    except (KeyError, AssertionError):  # one that is in none of ImageNet's lists
        return tuple(names)
    count = Counter(words)
    return tuple(word if count[word] == 1 else f"{word} ({name})" for word, name in zip(words, names, strict=True))
