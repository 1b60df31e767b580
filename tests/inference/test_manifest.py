"""A directory is what its manifest says, or one line says what is not. No MindSpore here."""

import hashlib
import json
import shutil

import pytest

from switchyard.errors import UserError
from switchyard.inference import manifest as manifests
from switchyard.inference.manifest import File, Manifest

PARITY = {
    "max_abs_difference": 1e-6,
    "prefill_max_abs_difference": 1e-6,
    "decode_max_abs_difference": 1e-7,
    "bound": 1e-4,
    "prefill_positions": 3,
    "decode_positions": 12,
    "not_reached": [[1, 3, "decode"]],
}
FIGURES = {
    "vocab_size": 9,
    "num_layers": 2,
    "hidden_size": 16,
    "num_heads": 4,
    "n_kv_heads": 2,
    "head_size": 4,
    "expert_num": 4,
    "num_experts_chosen": 2,
    "moe_layers": [1],
    "parameters": 1000,
    "compute_dtype": "float32",
}


@pytest.fixture
def directory(tmp_path):
    """Three files of rubbish and a manifest that fits them."""
    folder = tmp_path / "out"
    (folder / "decode_variables").mkdir(parents=True)
    (folder / "prefill.mindir").write_bytes(b"prefill" * 99)
    (folder / "decode_graph.mindir").write_bytes(b"decode" * 9)
    (folder / "decode_variables" / "data_0").write_bytes(b"weights" * 9)
    manifest = Manifest(
        graphs={"prefill": "prefill.mindir", "decode": "decode_graph.mindir"},
        encryption=None,
        model=FIGURES,
        limits={"max_length": 24, "prompt_multiple": 8, "dynamic": ["batch"]},
        parity=PARITY,
        source={"checkpoint": "runs/a", "step": 1, "mindspore": "2.9.0", "switchyard": "0"},
        files=manifests.fingerprints(folder),
    ).signed()
    (folder / manifests.MANIFEST).write_text(manifest.model_dump_json(indent=1))
    return folder


def check(directory):
    manifests.verify(directory, manifests.read(directory))


def test_a_whole_directory(directory):
    manifest = manifests.read(directory)
    check(directory)
    assert set(manifest.files) == {"prefill.mindir", "decode_graph.mindir", "decode_variables/data_0"}
    expected = File(bytes=7 * 99, sha256=hashlib.sha256(b"prefill" * 99).hexdigest())
    assert manifest.files["prefill.mindir"] == expected
    assert manifest.parity.not_reached == ((1, 3, "decode"),)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def _flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def _edit(key, value):
    def edit(path):
        tree = json.loads(path.read_text())
        tree[key] = value
        path.write_text(json.dumps(tree))

    return edit


def _drop(key):
    def drop(path):
        tree = json.loads(path.read_text())
        del tree[key]
        path.write_text(json.dumps(tree))

    return drop


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("prefill.mindir", _cut, "has 688 bytes instead of 693: it is truncated or altered"),
        ("prefill.mindir", _flip, "was altered"),
        ("prefill.mindir", lambda path: path.unlink(), "is missing"),
        ("decode_variables/data_0", _flip, "data_0' was altered"),
        ("decode_variables/data_0", lambda path: shutil.rmtree(path.parent), "data_0' is missing"),
        ("manifest.json", _cut, "is truncated or altered"),
        ("manifest.json", lambda path: path.unlink(), "holds no manifest.json"),
        ("manifest.json", lambda path: path.write_text(""), "is truncated or altered"),
        ("manifest.json", lambda path: path.write_bytes(b"\xff\xfe{"), "is truncated or altered"),
        ("manifest.json", lambda path: path.write_text("[]"), "is not a switchyard export"),
        ("manifest.json", lambda path: path.write_text('{"format": "other"}'), "is not a switchyard export"),
        ("manifest.json", _edit("version", 1), "has format version 1"),
        ("manifest.json", _edit("encryption", "AES-GCM"), "its sha256 differs"),
        (
            "manifest.json",
            _edit("limits", {"max_length": 99, "prompt_multiple": 8, "dynamic": []}),
            "sha256 differs",
        ),
        ("manifest.json", _edit("extra", 1), "is truncated or altered"),
        ("manifest.json", _drop("files"), "is truncated or altered"),
    ],
)
def test_damage_is_one_line(directory, name, harm, said):
    harm(directory / name)
    with pytest.raises(UserError, match=said) as caught:
        check(directory)
    assert str(caught.value).startswith("--model: '") and "\n" not in str(caught.value)


def test_not_a_directory(tmp_path):
    with pytest.raises(UserError, match=r"^--model: '.*none' does not exist; give the folder"):
        manifests.read(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        manifests.read(tmp_path / "file")


@pytest.mark.parametrize("size", [16, 24, 32])
def test_keys(tmp_path, size):
    (tmp_path / "key").write_bytes(bytes(range(size)))
    assert manifests.read_key(tmp_path / "key") == bytes(range(size))


@pytest.mark.parametrize("size", [0, 15, 17, 33, 64])
def test_keys_of_a_wrong_size(tmp_path, size):
    """A hexadecimal key of 64 letters, or one with a line end behind, is not one of 32 bytes."""
    (tmp_path / "key").write_bytes(b"a" * size)
    with pytest.raises(UserError, match=f"^--key-file: '.*key' has {size} bytes; AES-GCM takes 16, 24 or 32 raw bytes"):
        manifests.read_key(tmp_path / "key")
    with pytest.raises(UserError, match=r"^export.key_file: '.*none': No such file"):
        manifests.read_key(tmp_path / "none", "export.key_file")
