"""Writes the graphs of generation as MindIR files, with their weights."""

from pathlib import Path

import mindspore as ms
from mindspore import nn

from switchyard import files
from switchyard.distributed.expert_shard import ExpertShard
from switchyard.inference.manifest import AES_GCM, DECODE, DECODE_BATCH, DECODE_ONE, ENCODER, PREFILL
from switchyard.models import Seq2Seq
from switchyard.models.decode import Decode, has_heavy_experts, has_plain_experts
from switchyard.models.generation import Prefill, cast_products, has_separate_experts
from switchyard.models.seq2seq_generation import Begin, Continue, Encode

PARTS = 4  # of the queries of a prompt, see models.generation


def graphs_of(
    model: nn.Cell, max_length: int, block: int, shard: ExpertShard | None = None, copies: bool = True
) -> dict[str, tuple]:
    """Returns graph -> (its cell, inputs to compile it by); the cells read the layers of the model.

    Args:
        model: a Decoder or Seq2Seq; the weights of its matrix products take the compute dtype.
        max_length: of the export.
        block: rows of an expert's block in prefill.
        shard: the experts that this process of a job holds; None: all.
        copies: whether a graph may hold copies of weights in another form, see models.decode.
    """
    cast_products(model)
    tokens, row = _anything(None, None), _anything(None)
    layers = model.decoder.layers if isinstance(model, Seq2Seq) else model.layers
    caches = [_anything(None, model.kv_heads, None, model.head_size, dtype=model.dtype)] * (2 * len(layers))
    if isinstance(model, Seq2Seq):
        seen = _anything(len(layers), None, model.kv_heads, None, model.head_size, dtype=model.dtype)
        memory = (seen, seen, row)
        return {
            ENCODER: (Encode(model, max_length, block, shard), tokens, row),
            PREFILL: (Begin(model, max_length, block, shard), tokens, row, *memory),
            DECODE: (Continue(model, max_length, shard), row, row, *memory, *caches),
        }
    graphs = {
        PREFILL: (Prefill(model, max_length, block, shard, PARTS, copies), tokens, row),
        DECODE: (Decode(model, max_length, shard=shard, copies=copies), row, row, *caches),
    }
    if model.moe_layers and copies and shard is None and has_plain_experts(model):
        graphs[DECODE_BATCH] = (Decode(model, max_length, every_expert=True), row, row, *caches)
        if has_heavy_experts(model):
            one = ms.Tensor([0], ms.int32)
            cache = _anything(1, model.kv_heads, None, model.head_size, dtype=model.dtype)
            graphs[DECODE_ONE] = (Decode(model, max_length, one_row=True), one, one, *[cache] * (2 * len(layers)))
    return graphs


def of_one_shape(model: nn.Cell, shard: ExpertShard | None = None) -> tuple[str, ...]:
    """Returns the graphs of which a loaded one serves one shape, see models.single_experts."""
    if isinstance(model, Seq2Seq) or shard is not None:
        return ()
    found = (PREFILL,) if has_separate_experts(model) else ()
    return (*found, DECODE_BATCH, DECODE_ONE) if has_heavy_experts(model) else found


def _anything(*shape: int | None, dtype=ms.int32) -> ms.Tensor:
    """Returns an input of a graph; None: an axis of any size."""
    return ms.Tensor(shape=list(shape), dtype=dtype)


def write_graphs(
    model: nn.Cell,
    directory: Path,
    max_length: int,
    block: int,
    key: bytes | None,
    shard: ExpertShard | None = None,
) -> dict[str, str]:
    """Writes all graphs with their weights; returns graph -> the file name that MindSpore chose."""
    graphs = graphs_of(model, max_length, block, shard)
    with files.plain_path(directory) as name:
        for graph, (cell, *inputs) in graphs.items():
            write_graph(cell, Path(name) / graph, key, *inputs)
    files.follow_umask(directory)  # MindSpore gives modes of its own
    return {graph: _written_name(directory, graph) for graph in graphs}


def write_graph(cell: nn.Cell, path: Path, key: bytes | None, *inputs: ms.Tensor, **options) -> None:
    """Writes one graph, encrypted where there is a key; options are those of `mindspore.export`."""
    options |= {"enc_key": key, "enc_mode": AES_GCM} if key else {}
    cell.set_train(False)
    ms.export(cell, *inputs, file_name=str(path), file_format="MINDIR", **options)


def _written_name(directory: Path, graph: str) -> str:
    """Returns NAME.mindir, or NAME_graph.mindir beside NAME_variables where the weights exceed 1 GB."""
    names = [name for name in (f"{graph}.mindir", f"{graph}_graph.mindir") if (directory / name).exists()]
    return names[0]
