"""A graph of somebody else reads no file elsewhere and runs no code; messages are written byte by byte here."""

import pytest

from switchyard.errors import UserError
from switchyard.inference.graph_files import check_graph, is_in, texts

GRAPH, NODE, PARAMETER, PRIMITIVES, PREPROCESSOR = 7, 1, 3, 12, 9  # numbers of fields in MindSpore's message
OP_TYPE, ATTRIBUTE, TENSOR, EXTERNAL, LOCATION, RAW = 4, 5, 6, 12, 1, 9


def field(number: int, content: bytes | str) -> bytes:
    """A field of bytes: its number and kind, its length, its content; lengths below 16384."""
    content = content.encode() if isinstance(content, str) else content
    length = bytes([len(content)]) if len(content) < 128 else bytes([len(content) & 127 | 128, len(content) >> 7])
    return bytes([number << 3 | 2]) + length + content


def placed(location: str) -> bytes:
    """A tensor whose numbers lie in a file."""
    return field(EXTERNAL, field(LOCATION, location) + bytes([2 << 3, 64]) + bytes([3 << 3, 8]))


def write(tmp_path, *parts: bytes, name="prefill_graph.mindir"):
    (tmp_path / name).write_bytes(field(1, "0.1.0") + b"".join(parts))
    return tmp_path / name


def test_weights_beside_the_graph(tmp_path):
    graph = field(
        GRAPH, field(NODE, field(OP_TYPE, "REF::MatMul:1")) + field(PARAMETER, placed("prefill_variables/data_0"))
    )
    check_graph(write(tmp_path, graph, field(PRIMITIVES, field(1, "MatMul:1") + field(2, "MatMul"))))
    check_graph(write(tmp_path, field(GRAPH, field(PARAMETER, field(RAW, bytes(300)))), name="decode.mindir"))


@pytest.mark.parametrize(
    "location",
    [
        "../secret",
        "/etc/passwd",
        "prefill_variables/../../secret",
        "prefill_variables/..",
        "decode_variables/data_0",
        "prefill_variables",
        "",
    ],
)
@pytest.mark.parametrize("where", ["parameter", "constant"])
def test_weights_elsewhere(location, where, tmp_path):
    constant = field(NODE, field(ATTRIBUTE, field(TENSOR, placed(location))))
    part = field(PARAMETER, placed(location)) if where == "parameter" else constant
    with pytest.raises(
        UserError, match=r"reads weights from .*, which is not in 'prefill_variables': do not use"
    ) as caught:
        check_graph(write(tmp_path, field(GRAPH, part)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["PyExecute", "PyFunc", "Custom", "CustomAdd", "TensorDump", "ScalarSummary", "Print"])
def test_operators_that_run_code_or_write_files(name, tmp_path):
    for parts in (
        [field(GRAPH, field(NODE, field(OP_TYPE, f"REF::{name}:3")))],
        [field(GRAPH, b""), field(PRIMITIVES, field(1, "Add:3") + field(2, name))],
        [field(8, field(NODE, field(OP_TYPE, name)))],  # a function of the graph
    ):
        with pytest.raises(UserError, match="may run code or write files: do not use this export"):
            check_graph(write(tmp_path, *parts))


def test_a_graph_that_preprocesses_data(tmp_path):
    with pytest.raises(UserError, match="preprocesses data, which may run code or write files"):
        check_graph(write(tmp_path, field(PREPROCESSOR, field(1, "x"))))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a graph",
        field(GRAPH, b"abc")[:-1],  # cut
        field(GRAPH, field(NODE, b"")[:1]),  # a length that is missing
        b"\xff" * 20,
        bytes([GRAPH << 3 | 2]) + b"\xff\xff\xff\xff\x7f" + b"abc",
        field(GRAPH, bytes([NODE << 3 | 3])),  # a kind that MindSpore does not write
    ],
)
def test_a_file_that_is_no_graph(content, tmp_path):
    path = tmp_path / "decode.mindir"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"MindSpore cannot load '.*decode.mindir': it is no graph; export the check"):
        check_graph(path)


def test_a_graph_within_a_graph_without_end(tmp_path):
    """Deep messages end in one line, not in a traceback."""
    inner = b""
    for _ in range(900):
        inner = field(ATTRIBUTE, field(7, field(NODE, inner)))
    with pytest.raises(UserError, match="it is no graph"):
        check_graph(write(tmp_path, field(GRAPH, field(NODE, inner))))


def test_the_export_itself_passes(exported):
    from mindspore.train.mind_ir_pb2 import ModelProto

    for name in ("prefill", "decode"):
        check_graph(exported / f"{name}.mindir")
    content = (exported / "decode.mindir").read_bytes()
    found = set(texts(memoryview(content), 0, len(content), ModelProto.DESCRIPTOR))
    assert ("PrimitiveProto.op_type", "MatMul") in found
    assert is_in("decode_variables", "decode_variables/data_0")
