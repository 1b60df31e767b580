"""Runs an exported network that reads images, with no model code.

DIR/
    manifest.json      what the graph takes and gives, parity, size and sha256 of the other files
    classify.mindir    images [B, C, H, W] float32 from 0 to 1, tasks [B] int32 -> logits [B, V] of each image's task

B is fixed: data.batch_size. A cascade's graph has every stage at work; to save their work is the host's, see
models.cascade.EarlyExit.
"""

import math
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from switchyard.config.reader import parse_json
from switchyard.errors import UserError
from switchyard.files import present, read_regular
from switchyard.inference import manifest as manifests
from switchyard.inference.images import RANGES
from switchyard.inference.manifest import Count, Part, Signed, Source, Total
from switchyard.inference.mindir import load_graph, run_graph

FORMAT, GRAPH = "switchyard classifier", "classify.mindir"
LARGEST = 2**31  # values of a batch


class ImageParity(Part):
    """Holds the comparison of the reloaded graph with the training graph on the validation images."""

    max_abs_difference: float
    bound: float
    answers: Count


class ClassifierManifest(Signed):
    """Describes manifest.json of a classifier. image: [C, H, W]. counts: classes of each task.

    value_range: values that the graph takes. file_ranges: the values in a file that mean these two, by type; for other
    files --value-range declares them. batch_independent: the answer to an image does not depend on the other
    images of its batch.
    """

    format: Literal["switchyard classifier"] = FORMAT
    version: Literal[2] = 2
    network: Literal["vision", "cascade"]
    image: tuple[Count, Count, Count]
    value_range: tuple[float, float] = (0.0, 1.0)
    file_ranges: dict[Literal["uint8", "float"], tuple[float, float]] = RANGES
    batch_independent: bool = True
    batch: Count
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    counts: tuple[Count, ...]
    parameters: Total
    parity: ImageParity | None
    source: Source

    @model_validator(mode="after")
    def _fits(self) -> "ClassifierManifest":
        """Checks that the graph is among the files, that each task has its classes, and that a batch fits into
        memory."""
        if GRAPH not in self.files or len(self.counts) != len(self.tasks) or self.value_range != (0.0, 1.0):
            raise ValueError("files, counts or value_range")
        if any(low >= high for low, high in self.file_ranges.values()):
            raise ValueError("file_ranges")
        if self.batch * math.prod(self.image) > LARGEST:
            raise ValueError("batch and image")
        return self


def is_classifier(directory: str | Path) -> bool:
    """Returns whether a directory is an export of a network that reads images, by its manifest."""
    try:
        directory = present(Path(directory))
        tree = parse_json(read_regular(directory / manifests.MANIFEST, manifests.LONGEST, directory))
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and tree.get("format") == FORMAT


def read(directory: str | Path) -> ClassifierManifest:
    """Returns the manifest of an exported classifier, with its files verified (UserError)."""
    manifest = manifests.read(directory, ClassifierManifest)
    manifests.verify(directory, manifest)
    return manifest


def classify(directory: str | Path, images: np.ndarray, task: str | None = None, key: bytes | None = None) -> list:
    """Classifies images [N, C, H, W] with an exported classifier: N arrays of probabilities of the task's classes.

    Args:
        directory: what export.py made.
        images: float32 from 0 to 1.
        task: one of the manifest's; None = its first.
        key: of an encrypted export.

    Raises:
        UserError: a damaged export, images of another shape or with other values, an unknown task.
    """
    from mindspore import Tensor

    directory = present(Path(directory))
    manifest = read(directory)
    if images.shape[1:] != manifest.image:
        raise UserError(f"--image: an array of {images.shape[1:]}; the model takes {manifest.image}")
    if not ((images >= 0.0) & (images <= 1.0)).all():  # false for what is no number
        raise UserError("--image: a value outside 0 to 1; see switchyard.inference.images")
    if task is not None and task not in manifest.tasks:
        raise UserError(f"--task: {task}; the model's tasks: {', '.join(manifest.tasks)}")
    place = manifest.tasks.index(task) if task else 0
    graph, found = load_graph(Path(directory) / GRAPH, key), []
    tasks = Tensor(np.full(manifest.batch, place, np.int32))
    for start in range(0, len(images), manifest.batch):
        part = images[start : start + manifest.batch]
        filled = np.zeros((manifest.batch, *manifest.image), np.float32)
        filled[: len(part)] = part
        logits = _logits(run_graph(GRAPH, graph, Tensor(filled), tasks), manifest)
        logits = logits[: len(part), : manifest.counts[place]].astype(np.float64)
        shifted = np.exp(logits - logits.max(1, keepdims=True))
        found += (shifted / shifted.sum(1, keepdims=True)).tolist()
    return found


def _logits(found, manifest: ClassifierManifest) -> np.ndarray:
    """Returns the logits [B, V] of the graph after a check against the manifest (UserError)."""
    shape = tuple(getattr(found, "shape", ()))
    if shape != (manifest.batch, max(manifest.counts)):
        raise UserError(f"--model: '{GRAPH}' does not fit {manifests.MANIFEST}; export the checkpoint again")
    return found.asnumpy()
