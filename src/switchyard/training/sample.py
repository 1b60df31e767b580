"""Continues a short text with the weights of a run in training, so that a reader sees what the model has learned.

Legend: G routing groups, S sequence, V vocabulary.
"""

from typing import Any

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.config import Config
from switchyard.data import Data
from switchyard.distributed.mesh import LocalMesh

SAMPLE = "sample"  # kind of a line of the metrics
PROMPT, NEW = 16, 64  # tokens that are given, and most tokens that the model adds
TEMPERATURE = 0.8
SAMPLE_STREAM = 0x7361_6D70  # sets these draws apart from other draws of the same seed
NOWHERE = "train.sample_every: {every}; no text is sampled: only a decoder on one device samples"


class NextToken(nn.Cell):
    """Computes the logits of the next token: tokens [G, S] int32, valid [G, S] float32, place -> [V] float32.

    The sequence is the same in each of the G routing groups; the logits are those after token `place` of the first.

    Args:
        model: see models.Decoder.
    """

    def __init__(self, model: nn.Cell):
        super().__init__(auto_prefix=False)
        self.model, self.gather = model, ops.Gather()
        self.no_noise = Tensor(np.zeros((1, 1, 1), np.float32))

    def construct(self, tokens: Tensor, valid: Tensor, place: Tensor):
        logits = self.model(tokens, valid, self.no_noise)[0]  # [G * S, V]
        return self.gather(logits, place, 0)


class TextSampler:
    """Samples one text after some training steps; no figure of the training depends on it.

    The prompt is the beginning of the middle batch of the validation set. The draws follow from train.seed and the
    step, so a resumed run writes the texts of an uninterrupted one.

    Args:
        model: of the run; it is switched to evaluation for the time of a call.
        config: of the run.
        data: names the tokenizer, and gives the prompt.
    """

    def __init__(self, model: nn.Cell, config: Config, data: Data):
        self._model, self._seed, self._tokenizer = model, config.train.seed, data.tokenizer
        self._shape = (config.groups, config.model.seq_length)  # [G, S]
        batches = data.validation()
        first = batches.at(len(batches) // 2)
        given = min(PROMPT, config.model.seq_length // 2, int(first.valid[0].sum()))
        self._prompt = first.tokens[0, :given]
        self._program = NextToken(model)
        self._program.set_train(False)
        self.is_compiled = False

    def __call__(self, step: int) -> dict[str, Any]:
        """Returns the line of the metrics: kind "sample", step, prompt and text."""
        self._model.set_train(False)
        rng = np.random.default_rng((SAMPLE_STREAM, self._seed, step))
        ids, given = list(self._prompt), len(self._prompt)
        while len(ids) < min(given + NEW, self._shape[1]):
            logits = self._logits(ids) / TEMPERATURE  # [V]
            ids.append(int(np.argmax(logits + rng.gumbel(size=len(logits)))))  # a draw from their softmax
        decode = self._tokenizer.decode
        return {"kind": SAMPLE, "step": step, "prompt": decode(ids[:given]), "text": decode(ids[given:])}

    def _logits(self, ids: list[int]) -> np.ndarray:
        """Returns the logits of the token after `ids`: [V] float64."""
        tokens, valid = np.zeros(self._shape, np.int32), np.zeros(self._shape, np.float32)
        tokens[:, : len(ids)], valid[:, : len(ids)] = ids, 1.0
        found = self._program(Tensor(tokens), Tensor(valid), Tensor(len(ids) - 1, mstype.int32))
        self.is_compiled = True
        return found.asnumpy().astype(np.float64)


def create_sampler(model: nn.Cell, config: Config, data: Data, mesh: LocalMesh) -> TextSampler | None:
    """Returns what samples text in a run, None where it samples none; see `NOWHERE`."""
    if not config.train.sample_every or config.model.type != "decoder" or not mesh.samples:
        return None
    return TextSampler(model, config, data)
