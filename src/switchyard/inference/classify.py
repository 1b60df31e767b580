"""Runs an exported network that reads images, with no model code.

DIR/
    manifest.json      what the graph takes and gives, parity, size and sha256 of the other files
    classify.mindir    images [B, C, H, W] float32 from 0 to 1, tasks [B] int32 -> logits [B, V] of each image's task

B is fixed: data.batch_size. A cascade's graph has every stage at work; to save their work is the host's, see
models.cascade.EarlyExit.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from switchyard.errors import UserError
from switchyard.inference import manifest as manifests
from switchyard.inference.manifest import Count, Part, Signed, Source
from switchyard.inference.mindir import load_graph

FORMAT, GRAPH = "switchyard classifier", "classify.mindir"


class ImageParity(Part):
    """How the reloaded graph compared with the training graph on the validation images."""

    max_abs_difference: float
    bound: float
    answers: Count


class ClassifierManifest(Signed):
    """manifest.json. image: [C, H, W]. counts: classes of each task."""

    format: Literal["switchyard classifier"] = FORMAT
    version: Literal[1] = 1
    network: Literal["vision", "cascade"]
    image: tuple[Count, Count, Count]
    batch: Count
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    counts: tuple[Count, ...]
    parameters: Count
    parity: ImageParity | None
    source: Source


def is_classifier(directory: str | Path) -> bool:
    """Whether a directory says that it is an export of a network that reads images."""
    try:
        tree = json.loads((Path(directory) / manifests.MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and tree.get("format") == FORMAT


def read(directory: str | Path) -> ClassifierManifest:
    """The manifest of such a directory, its files verified (UserError)."""
    manifest = manifests.read(directory, ClassifierManifest)
    manifests.verify(directory, manifest)
    return manifest


def classify(directory: str | Path, images: np.ndarray, task: str | None = None, key: bytes | None = None) -> list:
    """What an exported classifier says of images [N, C, H, W]: N times the probabilities of the task's classes.

    Args:
        directory: what export.py made.
        images: float32 from 0 to 1.
        task: one of the manifest's; None = its first.
        key: of an encrypted export.

    Raises:
        UserError: a damaged export, images of another shape, an unknown task.
    """
    from mindspore import Tensor

    manifest = read(directory)
    if images.shape[1:] != manifest.image:
        raise UserError(f"--image: an array of {images.shape[1:]}; the model takes {manifest.image}")
    if task is not None and task not in manifest.tasks:
        raise UserError(f"--task: {task}; the model's tasks: {', '.join(manifest.tasks)}")
    place = manifest.tasks.index(task) if task else 0
    graph, found = load_graph(Path(directory) / GRAPH, key), []
    tasks = Tensor(np.full(manifest.batch, place, np.int32))
    for start in range(0, len(images), manifest.batch):
        part = images[start : start + manifest.batch]
        filled = np.zeros((manifest.batch, *manifest.image), np.float32)
        filled[: len(part)] = part
        logits = graph(Tensor(filled), tasks).asnumpy()[: len(part), : manifest.counts[place]].astype(np.float64)
        shifted = np.exp(logits - logits.max(1, keepdims=True))
        found += (shifted / shifted.sum(1, keepdims=True)).tolist()
    return found


def read_image(path: str | Path) -> np.ndarray:
    """A .npy array [H, W], [C, H, W] or [N, C, H, W] (bytes, or floats from 0 to 1) or a picture -> [N, C, H, W]."""
    try:
        if str(path).endswith(".npy"):
            values = np.load(path, allow_pickle=False)
        else:
            from matplotlib.image import imread

            values = imread(path)
            values = values[..., :3].mean(-1) if values.ndim == 3 else values  # grey
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"--image: '{path}'; cannot be read: {' '.join(str(error).split())}") from None
    if values.ndim not in (2, 3, 4) or not values.size:
        raise UserError(f"--image: '{path}'; holds an array of {values.shape}, wants [H, W], [C, H, W] or [N, C, H, W]")
    scale = 255.0 if values.dtype == np.uint8 or values.max() > 1.0 else 1.0
    values = (values / scale).astype(np.float32)
    return values.reshape((1,) * (4 - values.ndim) + values.shape)
