"""Networks that read images: a checkpoint becomes one MindIR graph, `classify`, that runs without this code.

DIR/
    manifest.json      what the graph takes and gives, parity, size and sha256 of the other files
    classify.mindir    images [B, C, H, W] float32 from 0 to 1, tasks [B] int32 -> logits [B, V] of each image's task

B is fixed: data.batch_size. A cascade's graph has every stage at work; to save their work is the host's, see
models.cascade.EarlyExit.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from pydantic import Field, ValidationError

import switchyard
from switchyard.config import Config, ParallelConfig
from switchyard.data import ImageEvalBatches, load_data
from switchyard.device import set_context
from switchyard.dispatch import block_size
from switchyard.errors import UserError
from switchyard.inference import manifest as manifests
from switchyard.inference.manifest import AES_GCM, Count, File, Part, Source
from switchyard.inference.mindir import load_graph
from switchyard.inference.parity import BOUNDS
from switchyard.models import create_model
from switchyard.training import checkpoint
from switchyard.training.checkpoint import Checkpoint

FORMAT, GRAPH = "switchyard classifier", "classify.mindir"


class ImageParity(Part):
    """How the reloaded graph compared with the training graph on the validation images."""

    max_abs_difference: float
    bound: float
    answers: Count


class ClassifierManifest(Part):
    """manifest.json; `sha256` is that of all its other fields. image: [C, H, W]. counts: classes of each task."""

    format: Literal["switchyard classifier"] = FORMAT
    version: Literal[1] = 1
    encryption: Literal["AES-GCM"] | None
    network: Literal["vision", "cascade"]
    image: tuple[Count, Count, Count]
    batch: Count
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    counts: tuple[Count, ...]
    parameters: Count
    parity: ImageParity | None
    source: Source
    files: dict[str, File]
    sha256: str = ""

    def digest(self) -> str:
        """sha256 over every field but itself."""
        text = json.dumps(self.model_dump(mode="json", exclude={"sha256"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class Classify(nn.Cell):
    """What is exported: images [B, C, H, W] and tasks [B] -> logits [B, V]."""

    def __init__(self, model: nn.Cell, tasks: int):
        super().__init__(auto_prefix=False)
        self.model, self.tasks = model, tasks
        self.one_hot, self.no_noise = ops.OneHot(), Tensor(np.zeros((1, 1, 1), np.float32))
        self.on, self.off = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)

    def construct(self, images: Tensor, tasks: Tensor) -> Tensor:
        asked = self.one_hot(tasks, self.tasks, self.on, self.off)  # [B, T]
        logits, _, _ = self.model(images, asked, self.no_noise)  # [B * T, V]
        logits = logits.reshape(asked.shape[0], self.tasks, -1)
        return (logits * ops.expand_dims(asked, 2)).sum(1)  # [B, V]


def export_classifier(
    held: Checkpoint, config: Config, out: Path, key: bytes | None, say: Callable[[str], None], put: Callable
) -> ClassifierManifest:
    """Writes a checkpoint of a network that reads images; see inference.export.export, which calls this.

    Args:
        held, config: the checkpoint and its configuration with overrides.
        out: the directory to make.
        key: encrypts the graph.
        say: receives lines about what is done.
        put: (temporary directory, out) -> None brings the finished directory into its place.

    Raises:
        UserError: logits that differ; nothing is written then.
    """
    set_context(config.context, config.train.seed, config.model.compute_dtype, say)
    say(f"checkpoint: {held.path}")
    config = inference_config(config)
    data = load_data(config, held.tokenizer_json)
    model = create_model(config, data.tokenizer.vocab_size)
    checkpoint.load_weights(model, held.weights)
    vision, batch = config.vision, config.data.batch_size
    cell = Classify(model, len(vision.tasks)).set_train(False)
    expected = answers(cell, data.validation())
    shape = (vision.channels, vision.image_size, vision.image_size)
    temporary = out.absolute().parent / f".tmp-{out.absolute().name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        options = {"enc_key": key, "enc_mode": AES_GCM} if key else {}
        inputs = Tensor(np.zeros((batch, *shape), np.float32)), Tensor(np.zeros(batch, np.int32))
        ms.export(cell, *inputs, file_name=str(temporary / "classify"), file_format="MINDIR", **options)
        (temporary / GRAPH).chmod(0o644)  # MindSpore writes it read-only
        written = ClassifierManifest(
            encryption=AES_GCM if key else None,
            network=config.model.type,
            image=shape,
            batch=batch,
            tasks=vision.tasks,
            counts=vision.task_classes,
            parameters=sum(parameter.size for parameter in model.get_parameters()),
            parity=compare(temporary / GRAPH, key, expected, data.validation(), config.model.compute_dtype),
            source=Source(
                checkpoint=held.path.as_posix(),
                step=held.step,
                mindspore=ms.__version__,
                switchyard=switchyard.__version__,
            ),
            files=manifests.fingerprints(temporary),
        )
        written = written.model_copy(update={"sha256": written.digest()})
        (temporary / manifests.MANIFEST).write_text(written.model_dump_json(indent=1), encoding="utf-8")
        put(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    parity = written.parity
    say(f"{out / GRAPH}  {written.files[GRAPH].bytes / 1e6:,.1f} MB")
    say(
        f"parity: largest difference of a logit {parity.max_abs_difference:.1e} (bound {parity.bound:.0e}) over "
        f"{parity.answers:,} answers on the validation images"
    )
    say(f"export: '{out}', {batch} images of {shape} at a time")
    return written


def inference_config(config: Config) -> Config:
    """The configuration that the graph runs with: one device, and a block size that is a number already."""
    moe, rows = config.moe, config.rows // config.groups
    block = moe.dropless_block_size or block_size(rows, moe.expert_num, moe.choices)
    moe = moe.model_copy(update={"dropless_block_size": block, "groups": config.groups})
    return config.model_copy(update={"moe": moe, "parallel": ParallelConfig()})


def answers(graph: nn.Cell, batches: ImageEvalBatches) -> np.ndarray:
    """The logits of every real answer: [answers, V]."""
    found = []
    for batch in batches:
        logits = graph(Tensor(batch.images), Tensor(batch.valid.argmax(1).astype(np.int32))).asnumpy()
        found.append(logits[batch.valid.sum(1) > 0])
    return np.concatenate(found)


def compare(path: Path, key: bytes | None, expected: np.ndarray, batches: ImageEvalBatches, dtype: str) -> ImageParity:
    """The graph in a file, loaded again, against the logits of the training graph (UserError where they differ)."""
    found = answers(load_graph(path, key), batches)
    difference, bound = float(np.abs(found - expected).max()), BOUNDS[dtype]
    if not difference <= bound:
        raise UserError(
            f"export: a logit of '{GRAPH}' differs by {difference:.1e} from the training graph, the bound is "
            f"{bound:.0e} ({dtype}): nothing was written; report it with the checkpoint"
        )
    return ImageParity(max_abs_difference=difference, bound=bound, answers=len(expected))


def is_classifier(directory: str | Path) -> bool:
    """Whether a directory says that it is an export of a network that reads images."""
    try:
        tree = json.loads((Path(directory) / manifests.MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and tree.get("format") == FORMAT


def read(directory: str | Path) -> ClassifierManifest:
    """The manifest of such a directory, its files verified (UserError)."""
    path = Path(directory) / manifests.MANIFEST
    try:
        manifest = ClassifierManifest(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, ValidationError):
        raise UserError(f"--model: '{path}' was cut or altered; export the checkpoint again") from None
    if manifest.sha256 != manifest.digest():
        raise UserError(f"--model: '{path}' was altered: its sha256 is another; export the checkpoint again")
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
