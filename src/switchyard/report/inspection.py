"""Sends validation data through a run's model and notes which expert every token got. Imports MindSpore when called.

Legend: N tokens (of images: routed rows), M conditional layers, E experts, K choices of a token, G routing groups, C
capacity, B batch, S sequence.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from switchyard import config as configuration
from switchyard.checkpoint import store as checkpoint
from switchyard.config import Config
from switchyard.data import load_scored
from switchyard.data.stream_decoder import StreamDecoder
from switchyard.distributed.processes import on_one_device
from switchyard.errors import UserError
from switchyard.report.analysis import NONE
from switchyard.trust import check_trusted_section

COPIES = 3  # of the weights while a model is built from a checkpoint
MOST_CHOICES = 8  # choices of a token that are kept where every expert may take every token
TOGETHER = 4096  # tokens of a forward pass
PASSAGE = 2048  # tokens of the text that is shown in colours
CHOSEN = "each token counts for the experts that it chose"
TAKEN = "each token counts for the experts that took it"
LARGEST = "every expert takes part in every token: a token counts for the expert with the largest weight"


@dataclass(frozen=True)
class Inspection:
    """Holds what the routers did with validation data.

    Attributes:
        config: of the checkpoint.
        step: of the checkpoint.
        choices: [M, N, K] int16, best first; -1 where there is no further expert.
        gates: [M, N, K] float32, what the outputs of those experts are multiplied by.
        confidence: [M, N] float32, the largest probability of the router.
        losses: [N] cross-entropy of the prediction, nats.
        counting: one sentence about what counts as a choice.
        tokens: [N] ids of text; classes of the images that the rows are of.
        labels: one printable text for each id.
        pieces: of text: the text of each of the first tokens of `passage`.
        passage: first and last index (exclusive) of a run of consecutive tokens; (0, 0) of images.
        window: tokens of a forward pass, which follow each other; 0 where all do.
        images: [images, H, W] float32, grey; None of text.
        rows: rows of an image.
    """

    config: Config
    step: int
    choices: np.ndarray
    gates: np.ndarray
    confidence: np.ndarray
    losses: np.ndarray
    counting: str
    tokens: np.ndarray
    labels: list[str]
    pieces: list[str]
    passage: tuple[int, int]
    window: int = 0
    images: np.ndarray | None = None
    rows: int = 1

    @property
    def experts(self) -> int:
        """Returns E."""
        return self.config.moe.expert_num


def inspect(
    path: str | Path, tokens: int, trust_code: bool = False, say: Callable[[str], None] = print
) -> Inspection | None:
    """Runs the newest checkpoint of a run over a part of its validation set; None where no layer is conditional.

    The model runs in PyNative mode, which needs no compilation, without drops and without noise, as at evaluation.

    Args:
        path: a run folder, or one checkpoint.
        tokens: about how many tokens (or images) to send.
        trust_code: see training.evaluate.evaluate.
        say: receives lines about device and checkpoint.

    Raises:
        UserError: an encoder-decoder, no good checkpoint, data that cannot be read, a router that is not trusted.
    """
    require_memory(checkpoint.resolve(path))
    held = checkpoint.read(path, with_optimizer=False)
    if not held.config.moe_layers:
        return None
    if held.config.model.type == "seq2seq":
        raise UserError("model.type: seq2seq; experts are shown of decoders and image networks")
    tree = on_one_device(held.config).model_dump()
    tree["moe"] |= {"record": None, "replay": None}
    config = configuration.build(tree, ["context.mode=pynative", "context.device_target=CPU"], inherited=True)
    check_trusted_section(config.moe, trust_code, say)
    together = batches_together(config)
    data = load_scored(config, held.tokenizer_json, ())
    with _pynative(config, say):
        from switchyard.models import create_model

        model = create_model(config, data.tokenizer.vocab_size)
        checkpoint.load_weights(model, held.weights)
        model.set_train(False)
        batches = data.validation()
        each = together * config.predictions
        places = _middle(-(-len(batches) // together), max(1, -(-tokens // each)))
        found = [_scored(model, _joined_batch(batches, place, together), config) for place in places]
    if config.model.type == "decoder":
        return _text(config, held.step, data.tokenizer, found)
    return _images(config, held.step, data.tokenizer, found)


def batches_together(config: Config) -> int:
    """Returns how many batches a forward pass takes: about TOGETHER tokens, where no token's routing depends on others.

    A forward pass in PyNative mode costs about a second of CPU time besides its arithmetic.
    """
    from switchyard.moe.routing.base import find_router

    alone = find_router(config.moe.router).batch_independent and config.moe.eval_capacity_factor is None
    if config.model.type != "decoder" or not alone or config.moe.groups is not None:
        return 1
    return max(1, TOGETHER // (config.data.batch_size * config.model.seq_length))


def _joined_batch(batches, place: int, together: int):
    """Returns `together` neighbouring batches as one; fewer at the end of the set."""
    parts = [batches.at(index) for index in range(place * together, min((place + 1) * together, len(batches)))]
    return parts[0]._make(np.concatenate(arrays) for arrays in zip(*parts))


def require_memory(path: Path) -> None:
    """Refuses the weights of a checkpoint that this machine has no memory for (UserError)."""
    size, free = sum(file.stat().st_size for file in path.glob("weights*")), psutil.virtual_memory().available
    if COPIES * size > free:
        need, room = (f"{number / 1e9:.1f} GB" for number in (COPIES * size, free))
        raise UserError(
            f"checkpoint '{path}': about {need} of memory to look at it, {room} are free: use a larger machine"
        )


def _middle(count: int, wanted: int) -> list[int]:
    """Returns indices of batches, evenly over the set, that begin with neighbours: a passage of text."""
    if wanted >= count:
        return list(range(count))
    start, together = count // 2, min(2, wanted)
    neighbours = [min(start + step, count - 1) for step in range(together)]
    others = [index * count // wanted for index in range(wanted)]
    return list(dict.fromkeys(neighbours + others))[:wanted]


@contextlib.contextmanager
def _pynative(config: Config, say: Callable[[str], None]) -> Iterator[None]:
    """Switches MindSpore to PyNative mode meanwhile."""
    import mindspore as ms

    from switchyard.device import set_context

    before = ms.get_context("mode")
    set_context(config.context, config.train.seed, config.model.compute_dtype, say)
    try:
        yield
    finally:
        ms.set_context(mode=before)


def _scored(model, batch, config: Config) -> dict[str, Any]:
    """Returns the routing and the losses of one batch, real rows alone, as arrays by name."""
    from mindspore import Tensor

    from switchyard.nn.cross_entropy import TokenLosses

    noise = Tensor(np.zeros((1, 1, 1), np.float32))
    with _noted(model) as routings:
        logits = model(Tensor(batch[0]), Tensor(batch.valid), noise)[0]
        losses = TokenLosses()(logits, Tensor(batch.labels.reshape(-1))).asnumpy()
    layers = [_choices_of(routing) for routing in routings]
    if config.model.type == "decoder":
        real, ids = batch.valid.reshape(-1) > 0, batch.tokens.reshape(-1)
        repeat = config.row_tokens  # a routed row is a window of so many tokens
    else:
        asked, task = batch.valid.max(1) > 0, batch.valid.argmax(1)
        losses = losses.reshape(batch.valid.shape)[np.arange(len(task)), task]
        losses, ids, real = (
            np.repeat(part, config.units) for part in (losses, batch.labels[np.arange(len(task)), task], asked)
        )
        repeat = 1
    found = {"losses": losses[real], "ids": ids[real], "counting": layers[0][3]}
    for name, place in (("choices", 0), ("gates", 1), ("confidence", 2)):
        found[name] = np.stack([np.repeat(layer[place], repeat, 0)[real] for layer in layers])  # [M, N, ...]
    if config.model.type != "decoder":
        found["images"] = batch.images[asked].mean(1)  # [B, H, W]
    return found


@contextlib.contextmanager
def _noted(model) -> Iterator[list[dict[str, np.ndarray]]]:
    """Collects the decision of every conditional layer meanwhile, in the order of the layers."""
    from switchyard.moe.layer import MoELayer

    layers, found = [cell for _, cell in model.cells_and_names() if isinstance(cell, MoELayer)], []

    def watch(route: Callable) -> Callable:
        def noted(*inputs):
            routing = route(*inputs)
            found.append({name: value.asnumpy() for name, value in routing.items() if value is not None})
            return routing

        return noted

    for layer in layers:
        layer.route = watch(layer.route)
    try:
        yield found
    finally:
        for layer in layers:
            del layer.route  # the method of the class is back


def _choices_of(routing: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Returns (choices [N, K], gates [N, K], confidence [N], what counts as a choice) of a Routing of any form."""
    probabilities = routing["probabilities"]  # [G, N, E]
    experts = probabilities.shape[-1]
    confidence = probabilities.reshape(-1, experts).max(1)
    if "expert_index" in routing:
        chosen = routing["expert_index"].reshape(len(confidence), -1)
        gates = routing["gates"].reshape(chosen.shape)
        return np.where(chosen < experts, chosen, NONE).astype(np.int16), gates, confidence, CHOSEN
    if "token_index" in routing:
        weights = _taken(routing, probabilities.shape).reshape(-1, experts)
        most, counting = min(int((weights > 0).sum(1).max(initial=1)), MOST_CHOICES), TAKEN
    else:
        weights, most, counting = _weights(routing, probabilities.shape).reshape(-1, experts), 1, LARGEST
    chosen = np.argsort(-weights, 1, kind="stable")[:, :most]  # [N, K]
    gates = np.take_along_axis(weights, chosen, 1)
    return np.where(gates > 0, chosen, NONE).astype(np.int16), gates, confidence, counting


def _taken(routing: dict[str, np.ndarray], shape: tuple[int, int, int]) -> np.ndarray:
    """Returns the gates [G, N, E] of experts that take tokens; 0 where an expert does not take a token."""
    index, gates = routing["token_index"], routing["gates"] * routing["slot_mask"]  # [G, E, C] each
    found = np.zeros(shape, np.float32)
    for group in range(shape[0]):
        for expert in range(shape[2]):
            kept = gates[group, expert] > 0
            found[group, index[group, expert][kept], expert] = gates[group, expert][kept]
    return found


def _weights(routing: dict[str, np.ndarray], shape: tuple[int, int, int]) -> np.ndarray:
    """Returns what each expert contributes to each token, [G, N, E], where all experts work on all tokens."""
    if "combine" in routing:
        return routing["combine"].sum(-1)  # [G, N, E, C] -> [G, N, E]
    gates = routing["gates"]
    return np.broadcast_to(gates[:, None], shape) if gates.ndim == 2 else gates  # [G, E] of one mixture


def _joined(found: list[dict[str, Any]], name: str) -> np.ndarray:
    """Joins the arrays of all batches along their tokens; choices may differ in K."""
    parts = [part[name] for part in found]
    if name not in ("choices", "gates"):
        return np.concatenate(parts, -1 if name == "confidence" else 0)
    most = max(part.shape[2] for part in parts)
    fill = NONE if name == "choices" else 0.0
    padded = [np.pad(part, ((0, 0), (0, 0), (0, most - part.shape[2])), constant_values=fill) for part in parts]
    return np.concatenate(padded, 1)


def _text(config: Config, step: int, tokenizer, found: list[dict[str, Any]]) -> Inspection:
    ids = _joined(found, "ids")
    stop = min(sum(len(part["ids"]) for part in found[:2]), PASSAGE)
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push([token]) for token in ids[:stop]]
    return Inspection(
        config,
        step,
        *(_joined(found, name) for name in ("choices", "gates", "confidence", "losses")),
        counting=found[0]["counting"],
        tokens=ids,
        labels=[label_of(tokenizer, token) for token in range(tokenizer.vocab_size)],
        pieces=pieces,
        passage=(0, stop),
        window=len(found[0]["ids"]),
    )


def _images(config: Config, step: int, classes, found: list[dict[str, Any]]) -> Inspection:
    return Inspection(
        config,
        step,
        *(_joined(found, name) for name in ("choices", "gates", "confidence", "losses")),
        counting=found[0]["counting"],
        tokens=_joined(found, "ids"),
        labels=[f"class {number}" for number in range(classes.vocab_size)],
        pieces=[],
        passage=(0, 0),
        images=_joined(found, "images"),
        rows=config.units,
    )


SHOWN = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍", "\0": "␀"}


def label_of(tokenizer, token: int) -> str:
    """Returns a token as a short printable text: white space has a sign, half a character its byte."""
    text = tokenizer.decode([token])
    if tokenizer.kind == "byte" and token >= 0x80:
        return f"0x{token:02X}"
    if not text or "�" in text:
        return f"#{token}"
    shown = "".join(SHOWN.get(sign, sign if sign.isprintable() else f"\\x{ord(sign):02x}") for sign in text)
    return shown if len(shown) <= 24 else f"{shown[:23]}…"


def mean_loss(inspection: Inspection) -> float:
    """Returns the mean loss of the inspected predictions, nats."""
    return float(inspection.losses.mean()) if len(inspection.losses) else math.nan
