"""Small packs, written by hand."""

import io
from pathlib import Path

import numpy as np
import xxhash
from PIL import Image

from data.pack import ABOUT, INDEX, NAMES, RECORD, About, data_file, encode_about

CLASSES = ("a", "b")


def write_pack(folder: Path, num_images: int, num_files: int = 3) -> None:
    """A pack of JPEGs of two classes, `num_files` data files."""
    folder.mkdir(parents=True)
    contents = [io.BytesIO() for _ in range(num_files)]
    index, paths = np.zeros(num_images, RECORD), b""
    for number in range(num_images):
        file, label = number * num_files // num_images, number * 2 // num_images
        record = io.BytesIO()
        pixels = np.random.default_rng(number).integers(256, size=(20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(record, "JPEG")
        paths += f"{CLASSES[label]}/{number}.jpg".encode()
        checksum = xxhash.xxh3_64_intdigest(record.getvalue())
        facts = {"file": file, "offset": contents[file].tell(), "length": record.tell(), "checksum": checksum}
        facts |= {"label": label, "name_end": len(paths), "height": 20, "width": 30, "orientation": 1}
        for key, value in facts.items():
            index[key][number] = value
        contents[file].write(record.getvalue())
    np.save(folder / INDEX, index)
    (folder / NAMES).write_bytes(paths)
    for file, content in enumerate(contents):
        (folder / data_file(file)).write_bytes(content.getvalue())
    describe(folder, num_images)


def describe(folder: Path, num_images: int) -> None:
    """Writes pack.json for the files that are there."""
    files = {
        path.name: (path.stat().st_size, xxhash.xxh3_64_hexdigest(path.read_bytes()))
        for path in sorted(folder.iterdir())
        if path.name != ABOUT
    }
    (folder / ABOUT).write_text(encode_about(About("lossless", {}, CLASSES, files, {"images": num_images})))
