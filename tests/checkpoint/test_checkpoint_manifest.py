"""A checkpoint of somebody else is read, or refused in one line, whatever its manifest says. No MindSpore here."""

import hashlib
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.tiny_checkpoint import arrays_of, config_of, save_whole, shapes_of, state_of

from switchyard.checkpoint import store as checkpoint
from switchyard.checkpoint.store import DamagedError
from switchyard.errors import UserError

VALUES = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        2**47,
        10**30,
        1.5,
        float("nan"),
        "",
        "x",
        "../x",
        "/dev/zero",
        "\ud800",
        "\n",
        [],
        {},
        [[]],
        [-1],
    ]
)


@pytest.fixture(scope="module", params=["whole", "cut"])
def held(request, tmp_path_factory):
    """(directory, text of its manifest) of a checkpoint of one device, and of one of four."""
    run = tmp_path_factory.mktemp("run")
    if request.param == "whole":
        path, *_ = save_whole(run)
    else:
        config, arrays = config_of(data_parallel=4, expert_parallel=4), arrays_of(shapes_of())
        checkpoint.begin(run, 3)
        for rank in range(4):
            checkpoint.save_shard(run, config, 3, rank, *arrays)
        path = checkpoint.finish(run, config, "{}", state_of(3))
    return path, (path / "manifest.json").read_text()


def resign(path, tree):
    content = {key: value for key, value in tree.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(content | {"sha256": digest}))


def alter(tree, steps, value, rename):
    """Replaces, or renames, the part of a tree that the steps lead to."""
    node = tree
    for place, step in enumerate(steps):
        key = sorted(node)[step % len(node)] if isinstance(node, dict) else step % len(node)
        if place + 1 == len(steps) or not isinstance(node[key], (dict, list)) or not node[key]:
            break
        node = node[key]
    if rename and isinstance(node, dict):
        node[str(value)] = node.pop(key)
    else:
        node[key] = value


def refused_in_one_line(path):
    try:
        checkpoint.read(path)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return True
    return False


@settings(max_examples=60)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=5), VALUES, st.booleans())
def test_a_resigned_manifest_is_read_or_refused_in_one_line(held, steps, value, rename):
    path, text = held
    tree = json.loads(text)
    alter(tree, steps, value, rename)
    resign(path, tree)
    refused_in_one_line(path)
    (path / "manifest.json").write_text(text)


def with_file(path, text, name, content):
    """Writes a file and a manifest that vouches for it."""
    (path / name).write_bytes(content)
    tree = json.loads(text)
    tree["files"][name] |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    resign(path, tree)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=3), VALUES, st.booleans())
def test_a_header_of_tensors_that_lies_is_refused_in_one_line(held, steps, value, rename):
    path, text = held
    name = next(file.name for file in sorted(path.glob("weights*.safetensors")) if file.stat().st_size > 100)
    raw = (path / name).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    alter(header, steps, value, rename)
    changed = json.dumps(header).encode()
    with_file(path, text, name, len(changed).to_bytes(8, "little") + changed + raw[8 + length :])
    refused_in_one_line(path)
    (path / name).write_bytes(raw)
    (path / "manifest.json").write_text(text)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", b'{"step": "3"}'),
        ("state.json", b'{"step": 4}'),
        ("state.json", b'{"step": 3, "step": 3}'),
        ("state.json", b'{"step": 3, "seconds": NaN}'),
        ("state.json", b"[" * 100_000),
        ("state.json", b"\xff"),
        ("config.yaml", b"\xff\xfe"),
        ("config.yaml", b"2020-99-99"),
        ("config.yaml", b"a: !!python/object:os.system {}"),
        ("config.yaml", b"1" * 5000 + b": 2"),
        ("tokenizer.json", b"\xff"),
    ],
)
def test_texts_that_hold_something_else_are_one_line(held, name, content):
    path, text = held
    raw = (path / name).read_bytes()
    with_file(path, text, name, content)
    assert refused_in_one_line(path) or name == "tokenizer.json"
    (path / name).write_bytes(raw)
    (path / "manifest.json").write_text(text)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "weights.safetensors/../x", "weights.pkl"])
def test_names_that_lead_elsewhere_are_refused(held, name):
    path, text = held
    tree = json.loads(text)
    tree["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    resign(path, tree)
    with pytest.raises(DamagedError, match="truncated or altered"):
        checkpoint.read(path)
    (path / "manifest.json").write_text(text)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "sparse"])
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "config.yaml"])
def test_what_is_no_regular_file_is_not_read(tmp_path, name, kind):
    path, *_ = save_whole(tmp_path)
    (path / name).unlink()
    if kind == "fifo":
        os.mkfifo(path / name)
    elif kind == "device":
        (path / name).symlink_to("/dev/zero")
    elif kind == "folder":
        (path / name).mkdir()
    else:
        with open(path / name, "wb") as file:
            file.truncate(1 << 42)
    with pytest.raises(DamagedError, match=name) as caught:
        checkpoint.read(path)
    assert "\n" not in str(caught.value)


def test_the_best_checkpoint_is_one_of_the_run(tmp_path):
    path, *_ = save_whole(tmp_path)
    checkpoint.mark_best(tmp_path, 3, 1.5)
    assert checkpoint.best(tmp_path) == (path, 1.5)
    for text in (
        '{"checkpoint": "../checkpoints/step-00000003", "loss": 1}',
        '{"checkpoint": "step-00000003", "loss": "nan"}',
    ):
        (path.parent / "best.json").write_text(text)
        assert checkpoint.best(tmp_path) is None
