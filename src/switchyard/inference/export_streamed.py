"""Exports a checkpoint tensor by tensor: a model that is larger than memory, in one process.

The graphs are compiled without weights. Each tensor is then copied, in pieces, from the files of the checkpoint, of
whatever layout, into the files beside a graph. So memory holds the graphs and one piece, and where a tensor changes
its type, that piece. The files have the form in which MindSpore writes an export of more than 1 GB:

    prefill_graph.mindir        the graph; each parameter names a file, a first byte and a length
    prefill_variables/data_0    64 bytes, of which the first is 1 (little endian); then tensors, each from a multiple
                                of 64 bytes on; another file begins when one is full

A model that is larger than memory cannot be run here, so nothing is compared: the manifest has no parity.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn

from switchyard import files
from switchyard.checkpoint import store as checkpoint
from switchyard.checkpoint.manifest import KINDS, read_manifest, read_texts
from switchyard.checkpoint.reader import Tensors
from switchyard.checkpoint.tensors import TYPES, full_box, pieces
from switchyard.config import Config
from switchyard.data.tokenizer import Tokenizer
from switchyard.device import set_context
from switchyard.distributed.processes import require_one_device
from switchyard.errors import UserError
from switchyard.inference import manifest as manifests
from switchyard.inference.export import (
    announce,
    check_causal,
    figures_of,
    inference_config,
    key_to_write,
    limits_of,
    longest,
    place_of,
    prefill_block,
    source_of,
)
from switchyard.inference.export_graphs import graphs_of, write_graph
from switchyard.inference.manifest import Manifest
from switchyard.models import create_model
from switchyard.nn.initializers import shapes_only
from switchyard.training.companions import kept_texts
from switchyard.training.evaluate_keys import overridden

ALIGNMENT = 64  # bytes
LARGEST_FILE = 1 << 30  # bytes, but for a tensor that is larger
HEAD = bytes([1]) + bytes(ALIGNMENT - 1)


def export_streamed(
    path: str | Path,
    out: str | Path,
    overrides: list[str] | tuple[str, ...] = (),
    key_file: str | Path | None = None,
    say: Callable[[str], None] = print,
    trust_code: bool = False,
) -> Manifest:
    """Does `export.export` of a network that generates text, without running it; arguments and errors as there."""
    place = checkpoint.resolve(path)
    manifest = read_manifest(place)
    trained, tokenizer_json, state = read_texts(manifest)
    config = overridden(trained, overrides)
    announce(config, overrides, say, trust_code)
    require_one_device(config)
    check_streams(config)
    key, out = key_to_write(config, key_file, say), place_of(out)
    set_context(config.context, config.train.seed, config.model.compute_dtype, say)
    say(f"checkpoint: {place}")
    weights, tokenizer = Tensors(manifest, KINDS[0]), Tokenizer.from_json(tokenizer_json)
    config, names, model = empty_model(inference_config(config), tokenizer.vocab_size, weights)
    with files.unfinished(out) as temporary:
        for name, text in {manifests.TOKENIZER: tokenizer_json, **kept_texts(state)}.items():
            (temporary / name).write_text(text, encoding="utf-8")
        written = write_streamed(config, model, temporary, names, weights, key, source_of(place, state["step"]))
        manifests.publish(temporary, written, out)
    report(out, written, say)
    return written


def check_streams(config: Config) -> None:
    """Refuses what cannot be copied tensor by tensor (UserError)."""
    if not config.reads_text:
        raise UserError(f"--streamed: a network of model.type {config.model.type} is exported in memory: leave it out")
    if config.train.lora is not None:
        raise UserError(
            "--streamed: the checkpoint has adapters (train.lora); merge them first: "
            "python -m switchyard.checkpoint merge RUN --out DIR"
        )


def empty_model(config: Config, vocab_size: int, weights: Tensors) -> tuple[Config, dict[int, str], nn.Cell]:
    """Returns the configuration, id of a parameter -> its name in the checkpoint, and the model without numbers.

    Raises:
        UserError: a name or shape is not that of the checkpoint, or text cannot be generated with its router.
    """
    with shapes_only():
        model = create_model(config, vocab_size, longest(config), drawn=False)
    check_causal(config, model)
    parameters = list(model.get_parameters())
    shapes = {parameter.name: tuple(parameter.shape) for parameter in parameters}
    checkpoint.check_arrays(shapes, weights.entries, "weight")
    return config, {id(parameter): parameter.name for parameter in parameters}, model.set_train(False)


def write_streamed(
    config: Config, model: nn.Cell, folder: Path, names: dict[int, str], weights: Tensors, key: bytes | None, source
) -> Manifest:
    """Writes the graphs and their weights into a folder; returns the manifest, which is not written yet."""
    length = longest(config)
    graphs = graphs_of(model, length, prefill_block(config, length), copies=False)
    for graph, (cell, *inputs) in graphs.items():
        compiled = compiled_graph(cell, folder / graph, key, inputs)
        kept = {parameter.name: (names[id(parameter)], parameter.dtype) for parameter in cell.get_parameters()}
        write_weights(compiled, folder, graph, kept, weights, key)
        (folder / f"{graph}_graph.mindir").write_bytes(sealed(compiled.SerializeToString(), key))
    files.follow_umask(folder)
    return Manifest(
        graphs={graph: f"{graph}_graph.mindir" for graph in graphs},
        encryption=manifests.AES_GCM if key else None,
        model=figures_of(config, model),
        limits=limits_of(config),
        parity=None,
        source=source,
        files=manifests.fingerprints(folder),
    ).signed()


def compiled_graph(cell: nn.Cell, path: Path, key: bytes | None, inputs: Iterable[Tensor]):
    """Returns the graph of a cell as MindSpore's message of a MindIR, its parameters without numbers.

    MindSpore hands the message over before it adds the numbers of the parameters that it lists; here it lists none.
    """
    held = []

    def take(message) -> None:
        held.append(type(message)())
        held[0].CopyFrom(message)
        del message.graph.parameter[:]

    with files.plain_path(path.parent) as name:
        write_graph(cell, Path(name) / path.name, key, *inputs, custom_func=take)
    path.with_name(f"{path.name}.mindir").unlink()  # the graph without its parameters
    return held[0]


def write_weights(
    compiled, folder: Path, graph: str, kept: dict[str, tuple], weights: Tensors, key: bytes | None
) -> None:
    """Writes the tensors of a graph, and tells the graph where they are.

    Args:
        compiled: the graph's message.
        folder: of the export.
        graph: its name.
        kept: name of a parameter of the graph -> (its name in the checkpoint, its type).
        weights: the checkpoint's tensors.
        key: encrypts the files.
    """
    (folder / f"{graph}_variables").mkdir()
    parameters = {parameter.name.partition(":")[2]: parameter for parameter in compiled.graph.parameter}
    number, place = -1, LARGEST_FILE
    for name in sorted(parameters):
        if place >= LARGEST_FILE:
            number, place = number + 1, ALIGNMENT
            location = f"{graph}_variables/data_{number}"
            (folder / location).write_bytes(sealed(HEAD, key))
        with open(folder / location, "ab") as file:
            length = copy_tensor(weights, *kept[name], lambda content: file.write(sealed(content, key)))
        where = parameters[name].external_data
        where.location, where.offset, where.length = location, place, length
        place += length + -length % ALIGNMENT


def copy_tensor(weights: Tensors, name: str, dtype, write: Callable[[bytes], object]) -> int:
    """Writes a tensor piece by piece in another type, and zeros up to a multiple of ALIGNMENT; returns its bytes."""
    entry, length = weights.entries[name], 0
    for box in pieces(full_box(entry.shape), np.dtype(TYPES[entry.dtype]).itemsize):
        content = Tensor(weights.read_finite(name, box), dtype).get_bytes()
        length += len(content)
        write(content)
    if length % ALIGNMENT:
        write(bytes(-length % ALIGNMENT))
    return length


def sealed(content: bytes, key: bytes | None) -> bytes:
    """Returns the content, encrypted as MindSpore does it where there is a key."""
    if key is None:
        return content
    from mindspore._c_expression import _encrypt  # what mindspore.export itself calls; it is not public

    return _encrypt(content, len(content), key, len(key), manifests.AES_GCM)


def report(out: Path, manifest: Manifest, say: Callable[[str], None]) -> None:
    """Says what was written, and that it was not run."""
    total = sum(file.bytes for file in manifest.files.values())
    say(f"export: '{out}', {total / 1e6:,.1f} MB, copied tensor by tensor; the files were not run and compared")
