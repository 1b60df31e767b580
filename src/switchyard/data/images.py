"""Makes batches of images: scikit-learn's digits, which come with it, or IDX files as those of MNIST, by path.

Training batches are read by index, a pure function of (seed, index), as those of text.

Legend: B images of a batch, C channels, H and W height and width, T tasks.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from switchyard.config import Config, VisionConfig
from switchyard.data.batches import Course
from switchyard.errors import UserError
from switchyard.files import UnfitError, read_regular
from switchyard.optional import require

SHUFFLE_STREAM, SPLIT_STREAM = 0x696D_6773, 0x7370_6C74  # set these draws apart from other draws of the same seed
IDX_BYTES = 0x08  # the type of an IDX file's values: unsigned bytes
TRAIN, TEST = "train", "t10k"
LONGEST = 1 << 36  # bytes of a file


class ImageBatch(NamedTuple):
    """Holds one micro-batch: predict `labels` from `images` where `valid` is 1; each image is asked one task."""

    images: np.ndarray  # [B, C, H, W] float32, 0 to 1
    labels: np.ndarray  # [B, T] int32: right answers of every task
    valid: np.ndarray  # [B, T] float32: 1 at the task that is asked; 0 everywhere for padding


@dataclass(frozen=True)
class Classes:
    """Describes what an image network predicts; takes the place of the tokenizer of a text model.

    tasks: names. counts: classes of each. labels: classes of the images themselves.
    """

    tasks: tuple[str, ...]
    counts: tuple[int, ...]
    labels: int

    @property
    def vocab_size(self) -> int:
        """Returns the classes of the task with the most."""
        return max(self.counts)

    def to_json(self) -> str:
        """Returns the classes as JSON text."""
        return json.dumps({"kind": "classes", "tasks": self.tasks, "counts": self.counts, "labels": self.labels})

    @property
    def fingerprint(self) -> str:
        """Returns sha256 of the text."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def answers(self, labels: np.ndarray) -> np.ndarray:
        """Returns the right answer of each task: labels [B] -> [B, T] int32."""
        rules = {"identity": labels, "parity": labels % 2, "half": (2 * labels >= self.labels).astype(labels.dtype)}
        return np.stack([rules[task] for task in self.tasks], -1).astype(np.int32)


def classes_of(vision: VisionConfig, known: str | None) -> Classes:
    """Returns the classes that the configuration asks for.

    Args:
        vision: tasks and classes.
        known: those of a checkpoint, as `Classes.to_json` wrote them; None for a new run.

    Raises:
        UserError: the checkpoint was trained on others.
    """
    classes = Classes(tuple(vision.tasks), vision.task_classes, vision.classes)
    if known is not None and known != classes.to_json():
        raise UserError(f"vision.tasks: {vision.tasks}; the checkpoint was trained on other tasks or classes")
    return classes


class ImageBatches:
    """Returns training batches by index: `at(i)` for any i >= 0, in any order, on any process; see data.TrainBatches.

    An epoch permutes the images and draws the task of each, both by (seed, epoch). Images that do not fill a last batch
    wait for another epoch.

    Args:
        images: [N, C, H, W] float32.
        answers: [N, T] int32.
        batch_size: images B of one rank's batch.
        seed: of the shuffle.
        rank, world: which shard of how many.

    Raises:
        UserError: fewer images than one batch.
    """

    def __init__(
        self, images: np.ndarray, answers: np.ndarray, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ):
        self._images, self._answers, self._batch_size, self._seed = images, answers, batch_size, seed
        self._rank, self._world = rank, world
        self.batches_per_epoch = len(images) // (batch_size * world)
        if not self.batches_per_epoch:
            raise UserError(
                f"data.batch_size: {batch_size * world}; there are only {len(images)} training images; reduce it"
            )
        self.start_at(0, 0, 0)

    def start_at(self, index: int, epoch: int, window: int) -> None:
        """Moves batch `index` and the batches after it to the images of `epoch` from number `window` of its order
        on."""
        self.course = Course(len(self._images), self._batch_size * self._world, index, epoch, window)
        self._epoch = -1  # the permutation of one epoch is kept, for speed alone
        self._order = self._tasks = np.zeros(0, np.int64)

    def at(self, index: int) -> ImageBatch:
        """Returns micro-batch `index` of the training."""
        epoch, first = self.course.at(index)
        if epoch != self._epoch:
            rng = np.random.default_rng((SHUFFLE_STREAM, self._seed, epoch))
            self._order = rng.permutation(len(self._images))
            self._tasks = rng.integers(0, self._answers.shape[1], len(self._images))
            self._epoch = epoch
        start = first + self._rank * self._batch_size
        chosen = self._order[start : start + self._batch_size]  # [B]
        valid = np.eye(self._answers.shape[1], dtype=np.float32)[self._tasks[chosen]]  # [B, T]
        return ImageBatch(self._images[chosen], self._answers[chosen], valid)


class ImageEvalBatches:
    """Reads every image once with every task, in order; zeros with `valid` 0 fill the last batch."""

    def __init__(self, images: np.ndarray, answers: np.ndarray, batch_size: int):
        self._images, self._answers, self._batch_size = images, answers, batch_size

    def __len__(self) -> int:
        return -(-self._answers.size // self._batch_size)

    def __iter__(self) -> Iterator[ImageBatch]:
        return (self.at(index) for index in range(len(self)))

    def at(self, index: int) -> ImageBatch:
        """Returns batch `index`, 0 <= index < len."""
        if not 0 <= index < len(self):
            raise IndexError(f"validation batch {index} of {len(self)}")
        size, tasks = self._batch_size, self._answers.shape[1]
        asked = np.arange(index * size, min((index + 1) * size, self._answers.size))
        image, task, real = asked // tasks, asked % tasks, len(asked)
        images = np.zeros((size, *self._images.shape[1:]), np.float32)
        labels, valid = np.zeros((size, tasks), np.int32), np.zeros((size, tasks), np.float32)
        images[:real], labels[:real], valid[np.arange(real), task] = self._images[image], self._answers[image], 1.0
        return ImageBatch(images, labels, valid)


class Split(NamedTuple):
    """Holds images [N, C, H, W] float32 from 0 to 1 and labels [N] int64, for training and for validation."""

    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    description: str


def load_split(config: Config) -> Split:
    """Returns the images that data.path names, or scikit-learn's digits (UserError where they cannot be read or do not
    fit).
    """
    images, labels, name = _read_part(config, TRAIN)
    path = config.data.path
    if path is not None and find_file(Path(path).expanduser(), TEST, "images") is not None:
        *held_out, _ = _read_part(config, TEST)
    else:
        order = np.random.default_rng(SPLIT_STREAM).permutation(len(images))  # the same for every seed
        count = max(1, round(config.data.val_fraction * len(images)))
        rest, out = np.sort(order[count:]), np.sort(order[:count])
        held_out, images, labels = (images[out], labels[out]), images[rest], labels[rest]
    description = f"{name}, {len(images):,} training and {len(held_out[0]):,} validation images"
    return Split((images, labels), tuple(held_out), description)


def _read_part(config: Config, part: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Returns the images, the labels and a name of one part of data.path, checked against the configuration."""
    path = config.data.path
    images, labels = load_digits() if path is None else read_images(Path(path).expanduser(), part)
    check_fit(images, labels, config.vision)
    return images, labels, "scikit-learn's digits" if path is None else f"'{path}'"


def load_all(config: Config) -> tuple[np.ndarray, np.ndarray, str]:
    """Returns the images, labels and a description of data.path: of its t10k files where it has some, otherwise of all
    its images.

    Raises:
        UserError: as load_split.
    """
    path, part = config.data.path, TRAIN
    if path is not None and find_file(Path(path).expanduser(), TEST, "images") is not None:
        part = TEST
    images, labels, name = _read_part(config, part)
    name += f" ({part} files)" if path is not None else ""
    return images, labels, f"{name}, {len(images):,} images, all evaluated"


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns scikit-learn's digits: 1,797 images [N, 1, 8, 8] and labels [N] (UCI, Alpaydin and Kaynak, 1998).

    Raises:
        UserError: scikit-learn is not installed.
    """
    datasets = require("sklearn.datasets", "scikit-learn", "data.path: null (scikit-learn's digits)")
    found = datasets.load_digits()
    return (found.images[:, None] / 16.0).astype(np.float32), found.target.astype(np.int64)


def find_file(folder: Path, part: str, what: str) -> Path | None:
    """Finds PART-WHAT-idxN-ubyte or PART-WHAT.idxN-ubyte in a folder, plain or .gz; None where there is none."""
    if not folder.is_dir():
        raise UserError(f"data.path: '{folder}'; give a folder with {TRAIN}-images-idx3-ubyte and its labels")
    found = sorted(folder.glob(f"{part}-{what}[-.]idx[0-9]-ubyte*"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"data.path: '{folder}'; several files of {part}-{what}: {names}; keep one")
    return found[0] if found else None


def read_images(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads images [N, C, H, W] float32 and labels [N] of one part of a folder of IDX files (UserError)."""
    files = [find_file(folder, part, what) for what in ("images", "labels")]
    for file, what in zip(files, ("images-idx3-ubyte", "labels-idx1-ubyte")):
        if file is None:
            raise UserError(f"data.path: '{folder}'; holds no {part}-{what} or {part}-{what}.gz")
    images, labels = (read_idx(file) for file in files)
    if images.ndim not in (3, 4) or labels.ndim != 1:
        raise UserError(
            f"data.path: '{folder}'; images need 3 or 4 axes and labels 1, not {images.ndim}, {labels.ndim}"
        )
    if len(images) != len(labels):
        raise UserError(
            f"data.path: '{folder}'; {len(images)} images and {len(labels)} labels of '{part}' do not match"
        )
    if images.ndim == 3:
        images = images[:, None]  # [N, 1, H, W]
    return images.astype(np.float32) / 255.0, labels.astype(np.int64)


def read_idx(path: Path) -> np.ndarray:
    """Returns the array of unsigned bytes in an IDX file, plain or gzip (UserError where it is damaged or something
    else).
    """
    try:
        data = read_regular(path, LONGEST)
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, UnfitError, zlib.error) as error:
        raise UserError(f"data.path: '{path}'; cannot be read: {' '.join(str(error).split())}") from None
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != IDX_BYTES or not data[3]:
        raise UserError(f"data.path: '{path}'; is not an IDX file of bytes; it must begin with 0, 0, 8 and its axes")
    start = 4 + 4 * data[3]
    shape = [int.from_bytes(data[place : place + 4], "big") for place in range(4, start, 4)]
    if len(data) != start + int(np.prod(shape, dtype=np.int64)):
        raise UserError(
            f"data.path: '{path}'; is truncated: {len(data) - start} bytes do not make {shape}; download it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def check_fit(images: np.ndarray, labels: np.ndarray, vision: VisionConfig) -> None:
    """Refuses images [N, C, H, W] and labels that the configuration does not describe (UserError)."""
    _, channels, height, width = images.shape
    if height != width:
        raise UserError(f"data.path: images of {height} x {width}; only square images are supported, pad them")
    for key, wanted, found in (("image_size", vision.image_size, width), ("channels", vision.channels, channels)):
        if wanted != found:
            raise UserError(f"vision.{key}: {wanted}; the images have {found}; set vision.{key}={found}")
    if not len(images):
        raise UserError("data.path: holds no image; give a folder with some")
    if labels.max() >= vision.classes:
        raise UserError(
            f"vision.classes: {vision.classes}; labels go up to {labels.max()}; set vision.classes={labels.max() + 1}"
        )
