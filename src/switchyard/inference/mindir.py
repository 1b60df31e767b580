"""Runs an exported directory with no model code: the graphs, what they take, and one line where something is wrong.

Legend: B batch, S prompt length, T cache length, L layers, J key/value heads, h head size, V vocabulary.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from switchyard.config.seq2seq import END, PAD
from switchyard.data.tokenizer import Tokenizer
from switchyard.errors import UserError
from switchyard.files import present
from switchyard.inference import manifest as manifests
from switchyard.inference.graph_files import check_graph
from switchyard.inference.manifest import AES_GCM, DECODE, DECODE_BATCH, DECODE_ONE, ENCODER, PREFILL, Manifest

SMALLEST_BUCKET = 16
KEPT, KEPT_BYTES = 4, 1 << 30  # loaded graphs that serve a single shape each, and what they may hold; one in any case


class ExportedModel:
    """Runs the two graphs of an exported directory. Set MindSpore's device and mode before making one.

    A graph is compiled for each new shape it meets, so lengths are rounded up to powers of two. Keys and values are L
    caches each; a decode step writes into them in place. It is loaded when it is first needed.

    Args:
        directory: where the files are.
        manifest: verified already.
        key: of an encrypted export.

    Raises:
        UserError: MindSpore cannot load a file, or the key is not the one it was written with.
    """

    holds = "prompt and answer together"  # what max_length counts
    between = ""  # is printed between a prompt and its answer: the answer continues the prompt

    def __init__(self, directory: str | Path, manifest: Manifest, key: bytes | None = None):
        self.manifest, self.max_length = manifest, manifest.limits.max_length
        self.vocab_size = manifest.model.vocab_size
        self.directory = directory = present(Path(directory))
        if manifests.TOKENIZER not in manifest.files:
            raise UserError(
                f"--model: '{directory / manifests.MANIFEST}' lists no tokenizer; export the checkpoint again"
            )
        self.tokenizer = Tokenizer.from_json(manifests.read_tokenizer(directory), str(directory / manifests.TOKENIZER))
        if self.tokenizer.vocab_size > self.vocab_size:
            raise UserError(
                f"--model: '{directory}': the tokenizer has {self.tokenizer.vocab_size} entries, the model "
                f"{self.vocab_size}; export the checkpoint again"
            )
        self._key, self._graphs = key, {}
        self._graphs[(PREFILL,)] = self._load(PREFILL)  # waits for its first shape

    def _graph(self, name: str, *shape: int):
        """Returns a graph, loaded at its first use; one of a single shape is loaded again for another, see Limits.

        `shape`: of the inputs. Of the graphs that serve a single shape, few are held: each has weights of its own.
        """
        key = (name, *shape) if name in self.manifest.limits.one_shape else (name,)
        graph = self._graphs.pop(key, None) or self._graphs.pop((name,), None)
        if graph is None:
            if len(key) > 1:
                self._make_room((self.directory / self.manifest.graphs[name]).stat().st_size)
            graph = self._load(name)
        self._graphs[key] = graph
        return graph

    def _make_room(self, size: int) -> None:
        """Lets go of graphs of a single shape, the oldest use first, for one more of `size` bytes."""
        held = [key for key in self._graphs if len(key) > 1]
        beside = max(0, min(KEPT, KEPT_BYTES // max(size, 1)) - 1)  # of those held, that may stay
        for key in held[: max(0, len(held) - beside)]:
            del self._graphs[key]

    def _load(self, name: str):
        return load_graph(self.directory / self.manifest.graphs[name], self._key)

    def encode(self, prompt: str) -> np.ndarray:
        """Returns the ids [T] of a prompt (UserError: see Tokenizer.encode)."""
        return self.tokenizer.encode(prompt)

    @property
    def longest_prompt(self) -> int:
        """Returns the most tokens of a prompt: one less than all, for an answer."""
        return self.max_length - 1

    def begun(self, prompts: Sequence[np.ndarray]) -> np.ndarray:
        """Returns at which position of its cache the answer to each prompt begins: [B]."""
        return np.array([len(prompt) for prompt in prompts])

    def bucket(self, length: int) -> int:
        """Returns the length to which a prompt or a cache of `length` is padded."""
        size = min(max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()), self.max_length)
        multiple = self.manifest.limits.prompt_multiple
        return -(-size // multiple) * multiple

    def prefill(self, prompts: Sequence[np.ndarray]):
        """Reads prompts, each ids [<= max_length], B of them -> (logits [B, V] float32, keys, values).

        Keys and values are L tensors [B, J, S, h] each, S = the longest prompt's bucket.

        Raises:
            UserError: no prompt, an empty or too long one, an id outside the vocabulary.
        """
        from mindspore import Tensor

        tokens, lengths = self._padded(prompts)
        found = run_graph(PREFILL, self._graph(PREFILL, *tokens.shape), Tensor(tokens), Tensor(lengths))
        return self._checked(found, len(prompts), tokens.shape[1])

    def _padded(self, prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Returns prompts as tokens [B, S], and their lengths [B] (UserError: see `prefill`)."""
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        self._check_prompts(prompts, lengths)
        tokens = np.zeros((len(prompts), self.bucket(int(lengths.max()))), np.int32)  # [B, S]
        for row, prompt in zip(tokens, prompts):
            row[: len(prompt)] = prompt
        return tokens, lengths

    def grow(self, keys, values, length: int):
        """Pads caches to at least `length` positions: L x [B, J, T, h] -> L x [B, J, >= length, h]."""
        from mindspore import ops

        more = self.bucket(length) - keys[0].shape[2]
        if more <= 0:
            return keys, values
        empty = ops.zeros((*keys[0].shape[:2], more, keys[0].shape[3]), keys[0].dtype)
        return tuple(tuple(ops.concat((cache, empty), 2) for cache in caches) for caches in (keys, values))

    def decode(self, tokens: np.ndarray, positions: np.ndarray, keys, values, graph: str | None = None):
        """Computes one step: ids [B] at positions [B], L caches [B, J, T, h] twice -> (logits [B, V], keys, values).

        The caches are written in place, and are the same tensors afterwards. `graph`: one of `decode_graphs`; None =
        the faster one for B rows.

        Raises:
            UserError: shapes that do not belong together, a place behind the cache, an id outside the vocabulary.
        """
        model = self.manifest.model
        chosen = faster_for(len(tokens), model.num_experts_chosen, model.expert_num, self.decode_graphs)
        graph = graph or chosen
        return self._step(graph, tokens, positions, keys, values), keys, values

    @property
    def decode_graphs(self) -> tuple[str, ...]:
        """Returns the names of the graphs that decode, all of which compute the same."""
        return tuple(name for name in (DECODE, DECODE_BATCH, DECODE_ONE) if name in self.manifest.graphs)

    def _step(self, graph: str, tokens, positions, keys, values, *memory) -> np.ndarray:
        """Runs a decode graph on inputs that are checked: logits [B, V]."""
        from mindspore import Tensor

        self._check_step(tokens, positions, keys, values)
        given = Tensor(tokens.astype(np.int32)), Tensor(positions.astype(np.int32)), *memory, *keys, *values
        logits = run_graph(graph, self._graph(graph, *keys[0].shape), *given)
        if tuple(getattr(logits, "shape", ())) != (len(tokens), self.vocab_size):
            raise UserError(f"--model: '{graph}' does not fit {manifests.MANIFEST}; export the checkpoint again")
        return logits.asnumpy()

    def _checked(self, found, batch: int, length: int):
        """(logits [B, V], keys, values) that the prefill gave, if they are what the manifest says (UserError)."""
        layers = self.manifest.model.num_layers
        shapes = [tuple(part.shape) for part in found] if isinstance(found, tuple) else []
        if shapes != [(batch, self.vocab_size)] + [self._cache_shape(batch, length)] * (2 * layers):
            raise UserError(f"--model: '{PREFILL}' does not fit {manifests.MANIFEST}; export the checkpoint again")
        return found[0].asnumpy(), tuple(found[1 : 1 + layers]), tuple(found[1 + layers :])

    def _cache_shape(self, batch: int, length: int) -> tuple[int, ...]:
        return batch, self.manifest.model.n_kv_heads, length, self.manifest.model.head_size

    def compile(self, batch: int, prompt_length: int, length: int) -> float:
        """Compiles both graphs for B prompts and caches of `length` places; seconds it took."""
        start = time.perf_counter()
        one = np.zeros(prompt_length, np.int32)
        _, *state = self.prefill([one] * batch)
        self.decode(np.zeros(batch, np.int32), np.zeros(batch, np.int32), *self.grow(*state, length))
        return time.perf_counter() - start

    def _check_prompts(self, prompts: Sequence[np.ndarray], lengths: np.ndarray) -> None:
        if not len(lengths) or lengths.min() == 0:
            raise UserError("prompt: empty; give at least one character")
        if lengths.max() > self.max_length:
            raise UserError(
                f"prompt: {lengths.max()} tokens; the model holds {self.max_length}: shorten it, or export with a "
                "larger export.max_length"
            )
        for prompt in prompts:
            self._check_ids(np.asarray(prompt))

    def _check_ids(self, ids: np.ndarray) -> None:
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise UserError(f"tokens: an id outside 0 .. {self.vocab_size - 1}; use the export's own tokenizer")

    def _check_step(self, tokens: np.ndarray, positions: np.ndarray, keys, values) -> None:
        layers, batch = self.manifest.model.num_layers, len(tokens)
        for name, caches in (("keys", keys), ("values", values)):
            if len(caches) != layers:
                raise UserError(f"{name}: {len(caches)} caches; must be {layers}, one a layer")
        length = keys[0].shape[2] if len(keys[0].shape) == 4 else 0
        wanted = self._cache_shape(batch, length)
        shapes = [("tokens", tokens.shape, (batch,)), ("positions", positions.shape, (batch,))]
        shapes += [("keys", tuple(cache.shape), wanted) for cache in keys]
        shapes += [("values", tuple(cache.shape), wanted) for cache in values]
        for name, shape, expected in shapes:
            if shape != expected:
                raise UserError(f"{name}: shape {shape}; must be {expected} here")
        places = min(length, self.max_length)
        if positions.min() < 0 or positions.max() >= places:
            raise UserError(f"positions: {positions.min()} .. {positions.max()}; must be in 0 .. {places - 1}")
        self._check_ids(tokens)


class ExportedSeq2Seq(ExportedModel):
    """Runs the three graphs of an exported encoder-decoder: a prompt is read by the encoder, an answer begins with
    padding. See ExportedModel; what passes from call to call are caches, and what the encoder gave of the inputs."""

    holds = "a prompt and its end"
    between = "\n"  # the answer fills the gaps of the prompt, and does not continue it

    def __init__(self, directory: str | Path, manifest: Manifest, key: bytes | None = None):
        super().__init__(directory, manifest, key)
        self._graph(ENCODER)

    def encode(self, prompt: str) -> np.ndarray:
        """Returns the ids [T] of a prompt and the end."""
        return np.append(self.tokenizer.encode(prompt), END).astype(np.int32)

    @property
    def longest_prompt(self) -> int:
        """Returns the most tokens of a prompt; an answer has as many places of its own."""
        return self.max_length

    def begun(self, prompts: Sequence[np.ndarray]) -> np.ndarray:
        """Returns 1 for each prompt: its answer begins behind one token of padding."""
        return np.ones(len(prompts), np.int64)

    def prefill(self, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray] | None = None):
        """Reads prompts, and the first tokens of their answers -> (logits [B, V], keys, values, memory): memory is what
        the encoder gave, and the lengths of the prompts."""
        from mindspore import Tensor

        tokens, lengths = self._padded(prompts)
        memory = run_graph(ENCODER, self._graph(ENCODER), Tensor(tokens), Tensor(lengths))
        self._check_memory(memory, *tokens.shape)
        begun, places = self._padded([np.array([PAD])] * len(prompts) if answers is None else answers)
        memory = (*memory, Tensor(lengths))
        found = run_graph(PREFILL, self._graph(PREFILL), Tensor(begun), Tensor(places), *memory)
        return (*self._checked(found, *begun.shape), memory)

    def grow(self, keys, values, memory, length: int):
        """Pads caches to at least `length` positions; memory stays."""
        return (*super().grow(keys, values, length), memory)

    def decode(self, tokens: np.ndarray, positions: np.ndarray, keys, values, memory, graph: str = DECODE):
        """Computes one step: (logits [B, V] float32, keys, values, memory)."""
        return self._step(graph, tokens, positions, keys, values, *memory), keys, values, memory

    def _check_memory(self, found, batch: int, length: int) -> None:
        """Refuses what the encoder gave if it is not what the manifest says (UserError)."""
        model = self.manifest.model
        wanted = (model.num_layers, batch, model.n_kv_heads, length, model.head_size)
        shapes = [tuple(part.shape) for part in found] if isinstance(found, tuple) else []
        if shapes != [wanted, wanted]:
            raise UserError(f"--model: '{ENCODER}' does not fit {manifests.MANIFEST}; export the checkpoint again")


def exported_model(directory: str | Path, manifest: Manifest, key: bytes | None = None) -> ExportedModel:
    """Returns what runs the graphs that a manifest lists; arguments as of ExportedModel."""
    kind = ExportedSeq2Seq if ENCODER in manifest.graphs else ExportedModel
    return kind(directory, manifest, key)


def open_model(directory: str | Path, key_file: str | Path | None = None, say=print) -> ExportedModel:
    """Verifies an exported directory, sets the device and loads its graphs.

    Args:
        directory: what export.py made.
        key_file: file with the key of an encrypted export.
        say: receives the line about the device.

    Raises:
        UserError: a missing, cut or altered file; a key that is missing, wrong or not asked for.
    """
    directory = present(Path(directory))
    manifest = manifests.read(directory)
    key = manifests.key_of(directory, manifest.encryption, key_file, say)
    manifests.verify(directory, manifest)
    from switchyard.config import ContextConfig
    from switchyard.device import set_context

    set_context(ContextConfig(), compute_dtype=manifest.model.compute_dtype, say=say)
    return exported_model(directory, manifest, key)


def faster_for(batch: int, choices: int, experts: int, graphs: Sequence[str]) -> str:
    """Returns which of the graphs that an export has decodes B rows: `decode` copies the weights of the chosen experts
    (read, written, read again), `decode_batch` reads those of all once, `decode_one` those of the chosen ones.
    """
    if batch == 1 and DECODE_ONE in graphs:
        return DECODE_ONE
    return DECODE_BATCH if DECODE_BATCH in graphs and 3 * batch * choices > experts else DECODE


def load_graph(path: Path, key: bytes | None):
    """Loads the callable graph of a MindIR file (UserError: MindSpore refuses it, or it reads files elsewhere)."""
    import mindspore as ms
    from mindspore import nn

    if not key:  # whoever wrote an encrypted graph has the key
        check_graph(path)
    options = {"dec_key": key, "dec_mode": AES_GCM} if key else {}
    try:
        return nn.GraphCell(ms.load(str(path), **options))
    except Exception as error:  # what MindSpore raises depends on where it stops reading
        if key:
            raise UserError(f"--key-file: the key does not decrypt '{path}'; give the key of the export") from None
        raise UserError(f"--model: MindSpore cannot load '{path}': {_first_line(error)}") from None


def run_graph(name: str, graph, *inputs):
    """Runs a loaded graph on its inputs (UserError: the graph takes other inputs than its manifest says)."""
    try:
        return graph(*inputs)
    except (RuntimeError, ValueError, TypeError) as error:
        text = f"--model: MindSpore cannot run '{name}': {_first_line(error)}; export the checkpoint again"
        raise UserError(text) from None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
