"""Exports in folders with a space, accents and signs, under a narrow umask, killed, or with a stranger's files."""

import hashlib
import json
import os
import stat

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles.tiny_export import quiet, save_export, save_run

from switchyard.errors import UserError
from switchyard.inference import manifest as manifests
from switchyard.inference.export import export
from switchyard.inference.generate import generate
from switchyard.inference.mindir import open_model
from switchyard.training.evaluate import evaluate

ODD = "My Prójects (1)"


@pytest.fixture
def narrow_umask():
    before = os.umask(0o077)
    yield
    os.umask(before)


def modes_of(folder):
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}


def test_eval_export_and_infer_from_an_odd_folder(tmp_path, graph, monkeypatch, narrow_umask):
    """Weights over MindSpore's limit, which go to files beside the graph, and a key; others may read none of it."""
    import mindspore.train.serialization as serialization

    place = tmp_path / ODD / "a+b,c=d~"
    place.mkdir(parents=True)
    (place / "key").write_bytes(b"a key of sixteen")
    monkeypatch.chdir(place)
    run, _ = save_run(place, moe={})
    assert evaluate(run, say=quiet).loss > 0
    monkeypatch.setattr(serialization, "TOTAL_SAVE", 0)
    export(run, "exportación (2)", key_file="key", say=quiet)
    assert (place / "exportación (2)" / "prefill_variables" / "data_0").is_file()
    assert not [mode for mode in modes_of(place / "exportación (2)").values() if mode & 0o077]
    found, _ = generate(open_model("exportación (2)", "key", say=quiet), ["jump"], 3)
    assert len(found[0].text) == 3
    assert sorted(path.name for path in place.iterdir()) == ["exportación (2)", "key", "runs", "text.txt"]


def test_a_key_that_others_can_read_gets_a_warning(tmp_path):
    key, said = tmp_path / "key", []
    key.write_bytes(b"a key of sixteen")
    for mode in (0o600, 0o640, 0o604):
        key.chmod(mode)
        manifests.read_key(key, say=said.append)
    assert len(said) == 2 and said[0].startswith(f"warning: --key-file: '{key}' can be read by other users (mode 640)")


@pytest.mark.long
def test_an_interrupted_export_leaves_the_earlier_one_alone(tmp_path, graph, monkeypatch):
    out = save_export(tmp_path, moe={})
    before = (out / "manifest.json").read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("switchyard.inference.export.compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "runs" / "tiny", out, say=quiet)
    assert (out / "manifest.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs", "text.txt"]


def test_a_replacement_that_was_killed_half_way_is_read_and_ended(exported, tmp_path):
    """Where the system cannot exchange names, the earlier export may stand under another name."""
    from shutil import copytree

    from switchyard import files

    copytree(exported, tmp_path / f"{files.OLD}out")
    model = open_model(tmp_path / "out", say=quiet)
    assert model.max_length == 24
    files.settle(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_checkpoint_of_somebody_else_imports_nothing(tmp_path, monkeypatch):
    from switchyard.checkpoint import store as checkpoint
    from switchyard.config.router_options import RouterChoice

    run, config = save_run(tmp_path, moe={})
    held = checkpoint.read(run)
    moe = config.moe.model_copy(update={"router": RouterChoice("stranger.Mine"), "expert_num": 4})
    theirs = config.model_copy(update={"moe": moe})
    checkpoint.save(run, theirs, held.tokenizer_json, held.weights, held.optimizer, held.state | {"step": 2})
    (tmp_path / "stranger.py").write_text("raise SystemExit('ran')")
    monkeypatch.chdir(tmp_path)
    for attempt in (
        lambda **given: evaluate(run, say=quiet, **given),
        lambda **given: export(run, "out", say=quiet, **given),
    ):
        with pytest.raises(UserError, match=r"asks to import and run '.*stranger.py'.*--trust-code"):
            attempt()
        with pytest.raises(UserError, match="fails while it is imported: SystemExit: ran"):
            attempt(trust_code=True)


def resign(folder, tree):
    """Writes a manifest whose checksum is right, whatever it holds."""
    content = {key: value for key, value in tree.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(content | {"sha256": digest}))


@pytest.fixture(scope="module")
def rubbish(tmp_path_factory):
    """A folder with the files of an export, whose graphs MindSpore never sees, and its manifest's tree."""
    folder = tmp_path_factory.mktemp("rubbish")
    for name in ("prefill.mindir", "decode.mindir", "tokenizer.json"):
        (folder / name).write_text(name)
    figures = dict.fromkeys(("num_layers", "num_heads", "n_kv_heads", "head_size", "expert_num", "parameters"), 1)
    figures |= {
        "vocab_size": 3,
        "hidden_size": 4,
        "num_experts_chosen": 1,
        "moe_layers": [],
        "compute_dtype": "float32",
    }
    made = manifests.Manifest(
        graphs={"prefill": "prefill.mindir", "decode": "decode.mindir"},
        encryption=None,
        model=figures,
        limits={"max_length": 8, "prompt_multiple": 1, "dynamic": []},
        parity=None,
        source={"checkpoint": "a", "step": 1, "mindspore": "2.9.0", "switchyard": "0"},
        files=manifests.fingerprints(folder),
    ).signed()
    return folder, json.loads(made.model_dump_json())


VALUES = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        2**31,
        10**30,
        1.5,
        float("nan"),
        float("inf"),
        "",
        "/etc/passwd",
        "../x",
        "a/b/c",
        "\ud800",
        [],
        {},
    ]
)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=4), VALUES, st.booleans())
def test_a_resigned_manifest_is_read_or_refused_in_one_line(rubbish, path, value, rename):
    folder, tree = rubbish[0], json.loads(json.dumps(rubbish[1]))
    node = tree
    for step in path:
        key = sorted(node)[step % len(node)]
        if not isinstance(node[key], dict) or not node[key] or step == path[-1]:
            break
        node = node[key]
    if rename:
        node[str(value)] = node.pop(key)
    else:
        node[key] = value
    resign(folder, tree)
    try:
        manifests.verify(folder, manifests.read(folder))
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", ".hidden", "a b", "x\n"])
def test_names_that_lead_elsewhere_are_refused(rubbish, name):
    folder, tree = rubbish[0], json.loads(json.dumps(rubbish[1]))
    tree["files"][name] = tree["files"]["prefill.mindir"]
    resign(folder, tree)
    with pytest.raises(UserError, match="truncated or altered"):
        manifests.read(folder)
    tree = json.loads(json.dumps(rubbish[1]))
    tree["graphs"]["prefill"] = name
    resign(folder, tree)
    with pytest.raises(UserError, match="truncated or altered"):
        manifests.read(folder)


@pytest.mark.parametrize("kind", ["fifo", "link", "sparse"])
def test_files_that_are_not_what_the_manifest_says_are_not_read(rubbish, tmp_path, kind):
    from shutil import copytree

    folder = copytree(rubbish[0], tmp_path / "out")
    resign(folder, rubbish[1])
    path = folder / "prefill.mindir"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/dev/zero")
    else:
        with open(path, "wb") as file:
            file.truncate(1 << 42)
    with pytest.raises(
        UserError, match=r"prefill.mindir' (is not a regular|is a link that leads|has 4398046511104 bytes)"
    ):
        manifests.verify(folder, manifests.read(folder))


def test_graphs_that_do_not_fit_the_manifest_are_one_line(exported, tmp_path, graph):
    from shutil import copytree

    folder = copytree(exported, tmp_path / "out")
    tree = json.loads((folder / "manifest.json").read_text())
    tree["model"]["head_size"] += 1
    resign(folder, tree)
    with pytest.raises(UserError, match=r"'prefill' does not fit manifest\.json"):
        open_model(folder, say=quiet).prefill([np.array([1, 2])])
