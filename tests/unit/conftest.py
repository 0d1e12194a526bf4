"""Small datasets in the official layouts, and what a user's mistake must look like."""

import contextlib
import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dlops_dist.errors import UserError

SIZE = 16


@pytest.fixture(scope="session")
def user_error() -> Callable:
    """A context that demands a UserError of one line which shows all the given parts."""

    @contextlib.contextmanager
    def expect(*shown: object) -> Iterator[None]:
        with pytest.raises(UserError) as caught:
            yield
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        for part in shown:
            assert str(part) in message

    return expect


@pytest.fixture(scope="session")
def jpeg() -> Callable:
    """Encode (H, W, 3) or greyscale (H, W) uint8 pixels by PIL."""

    def encode(pixels: np.ndarray, **options: object) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", **{"quality": 90, **options})
        return file.getvalue()

    return encode


@pytest.fixture
def tiny_files(jpeg: Callable) -> dict[str, bytes]:
    """Tiny ImageNet's files below its top folder: 3 classes, 4 training images each, 12 of val, some greyscale."""
    rng = np.random.default_rng(0)
    files = {
        "wnids.txt": b"n03\nn01\nn02\n",
        "words.txt": b"n01\tcat, domestic cat\nn02\tdog\nn99\tnever used\n",
    }
    for wnid in ("n03", "n01", "n02"):
        boxes = "".join(f"{wnid}_{i}.JPEG\t0\t0\t9\t9\n" for i in range(4))
        files[f"train/{wnid}/{wnid}_boxes.txt"] = boxes.encode()
        for i in range(4):
            shape = (SIZE, SIZE) if i == 1 else (SIZE, SIZE, 3)
            files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = jpeg(rng.integers(0, 256, shape, np.uint8))
    annotations = []
    for i in range(12):
        files[f"val/images/val_{i}.JPEG"] = jpeg(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8))
        annotations.append(f"val_{i}.JPEG\tn0{1 + i % 3}\t0\t32\t44\t62\n")
    files["val/val_annotations.txt"] = "".join(annotations).encode()
    return files


@pytest.fixture(scope="session")
def write_zip() -> Callable:
    def write(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in files.items():
                archive.writestr(f"tiny/{name}", content)
        return path

    return write


@pytest.fixture(scope="session")
def write_folder() -> Callable:
    def write(path: Path, files: dict[str, bytes]) -> Path:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
        return path

    return write


@pytest.fixture
def tiny_zip(tmp_path: Path, tiny_files: dict[str, bytes], write_zip: Callable) -> Path:
    return write_zip(tmp_path / "tiny.zip", tiny_files)


@pytest.fixture
def stl10(tmp_path: Path) -> Path:
    """STL-10's binary files: 3 classes; 5 training, 2 test and 3 unlabeled images, all pixels random."""
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    rng = np.random.default_rng(1)
    for split, number in (("train", 5), ("test", 2), ("unlabeled", 3)):
        (folder / f"{split}_X.bin").write_bytes(rng.bytes(number * 96 * 96 * 3))
    (folder / "train_y.bin").write_bytes(bytes([1, 2, 3, 1, 2]))
    (folder / "test_y.bin").write_bytes(bytes([3, 1]))
    (folder / "class_names.txt").write_text("airplane\nbird\ncar\n")
    (folder / "fold_indices.txt").write_text("0 1 2 \n")
    return folder
