"""An export that is copied tensor by tensor holds the bytes of one that was made in memory."""

import mindspore as ms
import numpy as np
import pytest
from oracles.tiny_export import quiet, save_run

from switchyard.checkpoint import store as checkpoint
from switchyard.errors import UserError
from switchyard.inference import export_streamed as streaming
from switchyard.inference import manifest as manifests
from switchyard.inference.export import export
from switchyard.inference.mindir import load_graph, open_model


def tensors_of(folder, graph):
    """Name of a parameter of a graph's file -> its bytes, in the file or beside it."""
    message = _message(folder / manifests.read(folder).graphs[graph])
    found = {}
    for parameter in message.graph.parameter:
        where, content = parameter.external_data, parameter.raw_data
        if where.location:
            beside = (folder / where.location).read_bytes()
            assert where.offset % 64 == 0 and beside[:64] == b"\1" + bytes(63)
            content = beside[where.offset : where.offset + where.length]
        found[parameter.name.partition(":")[2]] = content
    return found


def _message(path):
    from mindspore.train.mind_ir_pb2 import ModelProto

    message = ModelProto()
    message.ParseFromString(path.read_bytes())
    return message


def test_the_bytes_are_those_of_an_export_in_memory(exported, tmp_path, graph, monkeypatch):
    """Files of about 4 kB in the place of 1 GB: several beside each graph."""
    monkeypatch.setattr(streaming, "LARGEST_FILE", 4096)
    lines = []
    run = exported.parent / "runs" / "tiny"
    manifest = streaming.export_streamed(run, tmp_path / "out", ["export.max_length=24"], say=lines.append)
    assert manifest.parity is None and lines[-1].endswith("the files were not run and compared")
    whole = manifests.read(exported)
    limits = whole.limits.model_copy(update={"one_shape": ()})  # weights that are copied lie as the checkpoint has them
    assert (manifest.model, manifest.limits, manifest.source) == (whole.model, limits, whole.source)
    manifests.verify(tmp_path / "out", manifests.read(tmp_path / "out"))
    assert {"decode_variables/data_0", "decode_variables/data_1", "decode_graph.mindir"} <= set(manifest.files)
    wanted = with_experts_together(tensors_of(exported, "prefill"))  # both graphs read the weights of the model
    assert len(wanted) > 10 and all(tensors_of(tmp_path / "out", name) == wanted for name in manifest.graphs)


def with_experts_together(tensors):
    """The four experts of both layers, which an export in memory writes one by one, in the order of their numbers."""
    found = {name: content for name, content in tensors.items() if not name.startswith("experts.")}
    for layer in (0, 1):
        for matrix in ("w_in", "w_out"):
            each = [tensors[f"experts.{layer}.each.{index}.{matrix}"] for index in range(4)]
            found[f"decoder.layers.{layer}.feed_forward.experts.{matrix}"] = b"".join(each)
    return found


def test_a_tensor_is_copied_in_pieces_of_its_new_type(tmp_path):
    """5 numbers of float32 become 10 bytes of float16, and zeros up to 64."""
    values = np.array([1.0, -2.5, 3.0, 0.1, 65504.0], np.float32)
    run, _ = save_run(tmp_path)
    held = checkpoint.read(run)
    checkpoint.save(run, held.config, held.tokenizer_json, {"a": values}, {"b": values}, held.state | {"step": 2})
    from switchyard.checkpoint.manifest import read_manifest
    from switchyard.checkpoint.reader import Tensors

    written = []
    source = Tensors(read_manifest(checkpoint.resolve(run)), "weights")
    assert streaming.copy_tensor(source, "a", ms.float16, written.append) == 10
    content = b"".join(written)
    assert len(content) == 64 and np.frombuffer(content[:10], np.float16).tolist() == values.astype(np.float16).tolist()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"train": {"lora": {"rank": 2}}},
            r"^--streamed: the checkpoint has adapters \(train.lora\); merge them first",
        ),
        ({"parallel.data_parallel": 2}, "^parallel.data_parallel: 2; this command is one process"),
    ],
)
def test_what_is_not_copied_tensor_by_tensor(changed, says, tmp_path):
    lora = changed.pop("train", None)
    run, _ = save_run(tmp_path, **({"train": lora} if lora else {}))
    with pytest.raises(UserError, match=says):
        streaming.export_streamed(
            run, tmp_path / "out", [f"{key}={value}" for key, value in changed.items()], say=quiet
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_it_answers_as_an_export_in_memory(dtype, tmp_path, graph, monkeypatch):
    """Encrypted: the same logits; the key opens it and no other; the graph that is compiled first is no plaintext."""
    write, seen = streaming.write_graph, []

    def write_and_read(cell, path, *arguments, **options):
        write(cell, path, *arguments, **options)
        seen.append(path.with_name(f"{path.name}.mindir").read_bytes())

    monkeypatch.setattr(streaming, "write_graph", write_and_read)
    run, _ = save_run(tmp_path)
    (tmp_path / "key").write_bytes(b"k" * 32)
    (tmp_path / "other").write_bytes(b"o" * 32)
    keys = ["export.max_length=24", f"model.compute_dtype={dtype}"]
    export(run, tmp_path / "one", keys, say=quiet)
    streaming.export_streamed(run, tmp_path / "out", keys, tmp_path / "key", say=quiet)
    held = [
        path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.suffix in ("", ".mindir") and path.is_file()
    ]
    held += seen
    assert len(seen) == 2 and not any(word in content for content in held for word in (b"MatMul", b"experts"))
    one, other = open_model(tmp_path / "one", say=quiet), open_model(tmp_path / "out", tmp_path / "key", say=quiet)
    prompts = [np.array([1, 2, 3, 4]), np.array([5])]
    wanted, *state = one.prefill(prompts)
    found, *again = other.prefill(prompts)
    assert (wanted == found).all()
    step = np.array([3, 3]), np.array([4, 1])
    logits = [model.decode(*step, *model.grow(*caches, 8))[0] for model, caches in ((one, state), (other, again))]
    np.testing.assert_allclose(*logits, atol=2e-5 if dtype == "float32" else 2e-2)
    with pytest.raises(UserError, match="the key does not decrypt"):
        load_graph(tmp_path / "out" / "decode_graph.mindir", b"o" * 32)
