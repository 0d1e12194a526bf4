"""Small generated shards, for trials of seconds that need nothing else."""

import tempfile
from pathlib import Path

from dlops_dist.config import Run, load_recipe
from dlops_dist.data.pack import pack
from dlops_dist.data.shapes import write_stl10, write_tiny_imagenet
from dlops_dist.data.shards import MANIFEST
from dlops_dist.data.sources import STL10, Source, TinyImageNet
from dlops_dist.files import Folder, make_writable, temporary_folder

SIZES = {"train_per_class": 40, "test_per_class": 10}


def with_smoke_shards(task: str, settings: Run) -> Run:
    """Settings that read generated shards, made under the runs folder unless they are there."""
    dataset = getattr(load_recipe(task).module, "SMOKE_DATASET", "shapes")
    out = (Folder(settings.runs_dir).local or temporary_folder()) / f".smoke-{dataset}"
    if not (out / MANIFEST).is_file():
        make_writable(out, "runs_dir", "choose another --runs-dir")
        with tempfile.TemporaryDirectory(dir=temporary_folder()) as scratch:
            source: Source
            if dataset == "shapes-stl10":
                write_stl10(Path(scratch) / "stl10_binary", **SIZES, num_unlabeled=100)
                source = STL10(Path(scratch))
            else:
                archive = Path(scratch) / "shapes.zip"
                write_tiny_imagenet(archive, **SIZES)
                source = TinyImageNet(archive)
            pack(source, out, dataset, workers=1, again=False)
    data = settings.data.model_copy(update={"shards": str(out)})
    return settings.model_copy(update={"data": data})
