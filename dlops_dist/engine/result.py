"""What a run came to, ready to judge images."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dlops_dist.config import Run, is_loaded, load_recipe, recipe_from_source
from dlops_dist.data.crops import crop_of, middle_of
from dlops_dist.data.images import packable
from dlops_dist.engine.device import default_device
from dlops_dist.engine.exactness import threads_at_start
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.numerics import set_numerics
from dlops_dist.engine.recipe import made
from dlops_dist.engine.run_folder import RunFolder
from dlops_dist.engine.samples import Inputs
from dlops_dist.errors import UserError

BATCH = 64
"""Images that are predicted together."""


class Result(NamedTuple):
    """The checkpoint that is a run's result, and a learner in that state."""

    settings: Run
    learner: Learner
    state: dict[str, Any]


def result_of(
    run: str, device: torch.device, warn: Callable[[str], None], recipe: str | None = None,
    image_size: tuple[int, int] | None = None, compiles: bool = True,
) -> Result:  # fmt: skip
    """The best checkpoint on the held-out part of train, where there is one, else the latest.

    Args:
        recipe: of a run of a user's recipe: its file, or its module's name.
        image_size: that it is to judge, by default what it was trained on.
        compiles: whether the run's settings may compile its kernels, for each number of images anew.

    Raises:
        UserError: there is no such run, no checkpoint, no classifier in it, or it takes images of another size.
    """
    folder = RunFolder(run)
    task, _ = folder.settings()
    given = None if recipe is None else load_recipe(recipe)
    if not is_loaded(task):
        if given is None:
            raise UserError(f"{run} was trained by the recipe {task}; pass --recipe FILE: nothing in a run is executed")
        recipe_from_source(task, given.source)  # it lies elsewhere now, or the path is another's
    _, settings = folder.settings()
    state = folder.result(device, warn)
    if "fc.weight" not in state["model"]:
        raise UserError(f"{run} has no classifier yet, only pretrained layers; train it to the end")
    inputs = Inputs(**state["inputs"])
    inputs = inputs if image_size is None else inputs._replace(image_size=image_size)
    threads_at_start()  # what lanes may take
    torch.set_num_threads(state["threads"])  # sums are rounded alike
    set_numerics(settings, device)
    built = made(settings, inputs)
    wanted = built.model.state_dict()
    if any(name in wanted and value.shape != wanted[name].shape for name, value in state["model"].items()):
        shown = "x".join(map(str, inputs.image_size))
        raise UserError(f"images of {shown} are not what {run} was trained on: its weights have other sizes")
    settings = settings if compiles else settings.model_copy(update={"compile": False})
    learner = Learner(settings, inputs, 1, device, built)
    learner.load_state_dict(state)
    return Result(settings, learner, state)


class Predictor(nn.Module):
    """A trained model in evaluation mode: what `dlops_dist.load` gives. Nothing in it is trained further.

    Attributes:
        model: the module itself, that of the averaged weights where `ema_decay` keeps some.
        classes: their names, in the order of the logits.
        image_size: (height, width) of the images that it was trained on.
        learner: what judges the images.
    """

    def __init__(self, learner: Learner, classes: Sequence[str]) -> None:
        super().__init__()
        self.model: nn.Module = learner.model if learner.ema is None else learner.ema.model
        self.classes, self.image_size, self.learner = tuple(classes), learner.inputs.image_size, learner
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C) of uint8 images (N, H, W, 3)."""
        return self._judged(images)[1]

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings (N, D) of uint8 images (N, H, W, 3)."""
        return self._judged(images)[0]

    def _judged(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images must be uint8 (N, H, W, 3), not {images.dtype} {tuple(images.shape)}")
        return self.learner.judge(images.to(self.learner.device))

    def preprocess(self, image: bytes | Path | str) -> Tensor:
        """uint8 (H, W, 3) of an image file or its bytes, as packing makes it: turned by its EXIF, RGB, fitted.

        With augment.size, its middle, as evaluation sees it.

        Raises:
            ValueError: it is no image that can be read.
        """
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        if (crop := crop_of(self.learner.settings.augment)) is not None:
            return torch.from_numpy(middle_of(data, crop))
        height, width = self.image_size
        pixels = packable(data, "npy", height if height == width else None).pixels
        if pixels.shape[:2] != (height, width):
            raise ValueError(f"it is {pixels.shape[0]}x{pixels.shape[1]}, the run was trained on {height}x{width}")
        return torch.from_numpy(np.array(pixels))

    def predict(self, images: Tensor, top: int = 1) -> list[list[tuple[str, float]]]:
        """(class, probability) of the most probable classes, for each of uint8 images (N, H, W, 3)."""
        found = []
        for part in images.split(BATCH):
            probabilities = self(part).double().softmax(dim=1).topk(min(top, len(self.classes)))
            rows = zip(probabilities.indices.tolist(), probabilities.values.tolist(), strict=True)
            found += [[(self.classes[c], p) for c, p in zip(*row, strict=True)] for row in rows]
        return found


def load(run: str | Path, recipe: str | None = None, device: torch.device | None = None) -> Predictor:
    """The model of a run's result, by the run's folder or URL.

        model = dlops_dist.load("runs/NAME")
        image = model.preprocess("cat.jpg")
        model.predict(image[None], top=5)

    Args:
        recipe: of a run of a user's recipe: its file, or its module's name.
        device: by default this process's GPU, else the CPU.
    """
    _, learner, state = result_of(str(run), device or default_device(), warnings.warn, recipe, compiles=False)
    numbers = map(str, range(learner.inputs.num_classes))  # a checkpoint of an earlier version has no names
    return Predictor(learner, state.get("classes", list(numbers)))
