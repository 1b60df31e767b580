"""Text from prompts: prefill once, then decode token by token; all prompts of a call are one batch.

Legend: B prompts.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from switchyard.data.stream_decoder import StreamDecoder
from switchyard.data.utf8 import decoded
from switchyard.errors import UserError
from switchyard.inference.mindir import ExportedModel
from switchyard.inference.sampling import Sampler, Sampling

ENDED, LENGTH, FULL = "end of document", "max new tokens", "max length"


@dataclass(frozen=True)
class Generated:
    """Holds the answer to one prompt.

    Attributes:
        prompt: the text that was given.
        text: what the model added.
        tokens: how many tokens that is.
        stopped: "max new tokens", "max length" (of the export) or "end of document" (the tokenizer's separator came).
    """

    prompt: str
    text: str
    tokens: int
    stopped: str


@dataclass(frozen=True)
class Timing:
    """Seconds of one batch, compilation apart.

    Attributes:
        prompt_tokens: of all prompts together.
        new_tokens: of all prompts together, the first of each made by the prefill.
        decode_tokens: those made by decode steps.
    """

    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    prompt_tokens: int
    new_tokens: int
    decode_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Returns the tokens per second of the decode steps; 0 where there was none."""
        return self.decode_tokens / self.decode_seconds if self.decode_tokens else 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Returns the prompt tokens read per second."""
        return self.prompt_tokens / self.prefill_seconds


def encode_prompts(model: ExportedModel, prompts: Sequence[str]) -> list[np.ndarray]:
    """Ids of each prompt.

    Raises:
        UserError: no prompt, an empty one, one that leaves no room for an answer, a character outside the vocabulary.
    """
    if not prompts:
        raise UserError("prompt: none given; use --prompt TEXT or --prompts-file FILE with one prompt a line")
    found = []
    for number, prompt in enumerate(prompts, 1):
        name = "prompt" if len(prompts) == 1 else f"prompt {number}"
        if not prompt:
            raise UserError(f"{name}: empty; give at least one character")
        try:
            ids = model.encode(prompt)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        if not len(ids):
            raise UserError(f"{name}: {prompt!r} gives no token; give other text")
        if len(ids) > model.longest_prompt:
            raise UserError(
                f"{name}: {len(ids)} tokens; the model holds {model.max_length} of {model.holds}: shorten "
                "the prompt, or export with a larger export.max_length"
            )
        found.append(ids)
    return found


def generate(
    model: ExportedModel,
    prompts: Sequence[str],
    max_new_tokens: int = 200,
    sampling: Sampling | None = None,
    on_text: Callable[[str], None] = lambda text: None,
) -> tuple[list[Generated], Timing]:
    """Continues every prompt.

    Args:
        model: see `mindir.open_model`.
        prompts: texts; with greedy sampling each gets the answer that it would get alone.
        max_new_tokens: most tokens of an answer; fewer where the export's max_length comes first.
        sampling: how tokens are drawn; None = the defaults.
        on_text: receives the first prompt's answer piece by piece, whole characters only.

    Raises:
        UserError: see `encode_prompts`; max_new_tokens below 1.
    """
    require_positive(max_new_tokens)
    ids = encode_prompts(model, prompts)
    return continue_ids(model, prompts, ids, max_new_tokens, sampling, on_text)


def require_positive(max_new_tokens: int) -> None:
    """Refuses answers of no token (UserError)."""
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: {max_new_tokens}; at least 1")


def continue_ids(
    model: ExportedModel,
    prompts: Sequence[str],
    ids: Sequence[np.ndarray],
    max_new_tokens: int,
    sampling: Sampling | None,
    on_text: Callable[[str], None],
    ends: frozenset[int] | None = None,
) -> tuple[list[Generated], Timing]:
    """Continues the ids [<= max_length] of every prompt.

    Args:
        model, max_new_tokens, sampling, on_text: see `generate`.
        prompts: what the answers name as their prompts.
        ids: of each prompt.
        ends: tokens that end an answer; None = the separator of documents.
    """
    if ends is None:
        ends = frozenset({model.tokenizer.separator} - {None})
    lengths = model.begun(ids)  # [B]
    room = np.minimum(max_new_tokens, model.max_length - lengths)  # [B]
    read = np.array([len(one) for one in ids])  # [B]
    compile_seconds = model.compile(len(ids), int(read.max()), int((lengths + room).max()))
    rows = _Rows(model, lengths, room, sampling or Sampling(), on_text, ends)
    start = time.perf_counter()
    logits, *state = model.prefill(ids)
    state = model.grow(*state, int((lengths + room).max()))
    rows.add(logits)
    middle = time.perf_counter()
    while rows.running.any():
        logits, *state = model.decode(*rows.next(), *state)
        rows.add(logits)
    rows.flush()
    end = time.perf_counter()
    made = [len(one) for one in rows.ids]
    later = sum(max(count - 1, 0) for count in made)
    timing = Timing(compile_seconds, middle - start, end - middle, int(read.sum()), sum(made), later)
    return rows.results(prompts, max_new_tokens), timing


class _Rows:
    """Holds the growing answers. A row that has stopped stays in the batch, and its further tokens are not read."""

    def __init__(
        self,
        model: ExportedModel,
        lengths: np.ndarray,
        room: np.ndarray,
        sampling: Sampling,
        on_text: Callable[[str], None],
        ends: frozenset[int],
    ):
        self._tokenizer, self._lengths, self._room, self._ends = model.tokenizer, lengths, room, ends
        self._sample = Sampler(sampling, len(lengths))
        self._on_text, self._stream = on_text, StreamDecoder(model.tokenizer)
        self.ids: list[list[int]] = [[] for _ in lengths]
        self.running = np.ones(len(lengths), bool)
        self._ended = np.zeros(len(lengths), bool)
        self._last = np.zeros(len(lengths), np.int32)
        self._steps = 0

    def add(self, logits: np.ndarray) -> None:
        """Draws one token a row from logits [B, V]."""
        self._last = self._sample(logits)
        self._steps += 1
        for row in np.flatnonzero(self.running):
            token = int(self._last[row])
            if token in self._ends:
                self._ended[row] = True
                self.running[row] = False
                continue
            self.ids[row].append(token)
            if row == 0 and (piece := self._stream.push([token])):
                self._on_text(piece)
            self.running[row] = len(self.ids[row]) < self._room[row]

    def next(self) -> tuple[np.ndarray, np.ndarray]:
        """(tokens [B], positions [B]) of the next decode step."""
        places = self._lengths + np.minimum(self._steps, self._room) - 1
        return self._last, places

    def flush(self) -> None:
        """Ends the stream of text."""
        if piece := self._stream.flush():
            self._on_text(piece)

    def results(self, prompts: Sequence[str], max_new_tokens: int) -> list[Generated]:
        """Returns one Generated for each prompt."""
        found = []
        for row, prompt in enumerate(prompts):
            stopped = ENDED if self._ended[row] else LENGTH if self._room[row] == max_new_tokens else FULL
            text = self._tokenizer.decode(self.ids[row])
            found.append(Generated(prompt, text, len(self.ids[row]), stopped))
        return found


def read_prompts(path: str | Path) -> list[str]:
    """Reads a UTF-8 file with one prompt per line; the last line end is optional (UserError)."""
    try:
        raw = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"--prompts-file: '{path}': {error.strerror}; give a file with one prompt a line") from None
    text = decoded(raw, f"--prompts-file: '{path}'").replace("\r\n", "\n").replace("\r", "\n")
    lines = text.removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.rstrip("\r"):
            raise UserError(f"--prompts-file: '{path}': line {number} is empty; every line is a prompt")
    return [line.rstrip("\r") for line in lines]


def to_dict(generated: Generated, timing: Timing) -> dict[str, Any]:
    """Returns what `infer.py --json` prints for one prompt; the seconds are those of the full batch."""
    rate = max(generated.tokens - 1, 0) / timing.decode_seconds if timing.decode_tokens else 0.0
    return {
        "prompt": generated.prompt,
        "text": generated.text,
        "tokens": generated.tokens,
        "stopped": generated.stopped,
        "prefill_seconds": timing.prefill_seconds,
        "decode_seconds": timing.decode_seconds,
        "tokens_per_second": rate,
    }
