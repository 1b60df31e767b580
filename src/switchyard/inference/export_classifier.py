"""Export of networks that read images: a checkpoint becomes one MindIR graph, see inference.classify."""

from collections.abc import Callable
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

import switchyard
from switchyard import files
from switchyard.checkpoint import store as checkpoint
from switchyard.checkpoint.store import Checkpoint
from switchyard.config import Config, ParallelConfig
from switchyard.data import ImageEvalBatches, load_data
from switchyard.device import set_context
from switchyard.errors import UserError
from switchyard.inference import manifest as manifests
from switchyard.inference.classify import GRAPH, ClassifierManifest, ImageParity
from switchyard.inference.manifest import AES_GCM, Source
from switchyard.inference.mindir import load_graph
from switchyard.inference.parity import BOUNDS
from switchyard.models import create_model
from switchyard.moe.dispatch.plan import block_size
from switchyard.nn.masks import keep_where


class Classify(nn.Cell):
    """Computes the exported function: images [B, C, H, W] and tasks [B] -> logits [B, V]."""

    def __init__(self, model: nn.Cell, tasks: int):
        super().__init__(auto_prefix=False)
        self.model, self.tasks = model, tasks
        self.one_hot, self.no_noise = ops.OneHot(), Tensor(np.zeros((1, 1, 1), np.float32))
        self.on, self.off = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)

    def construct(self, images: Tensor, tasks: Tensor) -> Tensor:
        """images [B, C, H, W], tasks [B] int32 -> logits of the task that was asked [B, V]."""
        asked = self.one_hot(tasks, self.tasks, self.on, self.off)  # [B, T]
        logits, _, _ = self.model(images, asked, self.no_noise)  # [B * T, V]
        logits = logits.reshape(asked.shape[0], self.tasks, -1)
        return keep_where(logits, asked).sum(1)  # [B, V]


def export_classifier(
    held: Checkpoint, config: Config, out: Path, key: bytes | None, say: Callable[[str], None]
) -> ClassifierManifest:
    """Writes a checkpoint of a network that reads images; see inference.export.export, which calls this.

    Args:
        held, config: the checkpoint and its configuration with overrides.
        out: the directory to make.
        key: encrypts the graph.
        say: receives lines about what is done.

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
    with files.unfinished(out.resolve()) as temporary:
        write_graph(cell, temporary, (batch, *shape), key)
        written = ClassifierManifest(
            encryption=AES_GCM if key else None,
            network=config.model.type,
            image=shape,
            batch_independent=is_batch_independent(model),
            batch=batch,
            tasks=vision.tasks,
            counts=vision.task_classes,
            parameters=sum(parameter.size for parameter in model.get_parameters()),
            parity=compare(temporary / GRAPH, key, expected, data.validation(), config.model.compute_dtype),
            source=Source(
                checkpoint=manifests.checkpoint_name(held.path),
                step=held.step,
                mindspore=ms.__version__,
                switchyard=switchyard.__version__,
            ),
            files=manifests.fingerprints(temporary),
        )
        written = written.signed()
        manifests.publish(temporary, written, out.resolve())
    report(out, written, say)
    return written


def write_graph(cell: nn.Cell, folder: Path, shape: tuple[int, ...], key: bytes | None) -> None:
    """Writes the graph for images [B, C, H, W] of a shape into a folder, encrypted where there is a key."""
    options = {"enc_key": key, "enc_mode": AES_GCM} if key else {}
    inputs = Tensor(np.zeros(shape, np.float32)), Tensor(np.zeros(shape[0], np.int32))
    with files.plain_path(folder) as plain:
        ms.export(cell, *inputs, file_name=f"{plain}/classify", file_format="MINDIR", **options)
    files.follow_umask(folder)  # MindSpore gives modes of its own


def is_batch_independent(model: nn.Cell) -> bool:
    """Returns whether the answer to an image never depends on the other images of its batch."""
    routers = [cell.feed_forward.router for _, cell in model.cells_and_names() if getattr(cell, "conditional", False)]
    return all(router.batch_independent for router in routers)


def report(out: Path, written: ClassifierManifest, say: Callable[[str], None]) -> None:
    """Tells what was written and how well it agrees with the training graph."""
    parity = written.parity
    say(f"{out / GRAPH}  {written.files[GRAPH].bytes / 1e6:,.1f} MB")
    say(
        f"parity: largest difference of a logit {parity.max_abs_difference:.1e} (bound {parity.bound:.0e}) over "
        f"{parity.answers:,} answers on the validation images"
    )
    say(f"export: '{out}', {written.batch} images of {written.image} at a time")


def inference_config(config: Config) -> Config:
    """Returns the configuration of the exported graph: one device, and a fixed block size."""
    moe, rows = config.moe, config.rows // config.groups
    block = moe.dropless_block_size or block_size(rows, moe.expert_num, moe.choices)
    changes = {"dropless_block_size": block, "groups": config.groups, "eval_capacity_factor": None}
    moe = moe.model_copy(update=changes)  # without drops, so that no image takes the place of another
    return config.model_copy(update={"moe": moe, "parallel": ParallelConfig()})


def answers(graph: nn.Cell, batches: ImageEvalBatches) -> np.ndarray:
    """Returns the logits of every real answer: [answers, V]."""
    found = []
    for batch in batches:
        logits = graph(Tensor(batch.images), Tensor(batch.valid.argmax(1).astype(np.int32))).asnumpy()
        found.append(logits[batch.valid.sum(1) > 0])
    return np.concatenate(found)


def compare(path: Path, key: bytes | None, expected: np.ndarray, batches: ImageEvalBatches, dtype: str) -> ImageParity:
    """Compares the reloaded graph with the logits of the training graph (UserError where they differ)."""
    found = answers(load_graph(path, key), batches)
    difference, bound = float(np.abs(found - expected).max()), BOUNDS[dtype]
    if not difference <= bound:
        raise UserError(
            f"export: a logit of '{GRAPH}' differs by {difference:.1e} from the training graph, the bound is "
            f"{bound:.0e} ({dtype}): nothing was written; report it with the checkpoint"
        )
    return ImageParity(max_abs_difference=difference, bound=bound, answers=len(expected))
