"""Checkpoints across layouts: every rank writes its slices, every reader gets its own, whatever the writer was."""

import dataclasses
import json

import numpy as np
import pytest
from oracles.tiny_checkpoint import arrays_of, config_of, content_of, save_whole, shapes_of, slice_by_hand, state_of
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from switchyard import cli
from switchyard.checkpoint import manifest, tensors
from switchyard.checkpoint import reshard as recut
from switchyard.checkpoint import store as checkpoint
from switchyard.checkpoint import writer as sharded
from switchyard.checkpoint.store import DamagedError
from switchyard.distributed.placement import ParallelDims
from switchyard.errors import UserError

LAYOUTS = {
    "dp4": {"data_parallel": 4},
    "ep4": {"data_parallel": 4, "expert_parallel": 4},
    "dp8 ep4": {"data_parallel": 8, "expert_parallel": 4},
    "tp4": {"model_parallel": 4},
    "pp2": {"pipeline_stage": 2, "micro_batch_num": 2},
    "dp4 ep2 tp2": {"data_parallel": 4, "expert_parallel": 2, "model_parallel": 2},
    "zero1 dp8 ep2": {"data_parallel": 8, "expert_parallel": 2, "optimizer_shard": 1},
    "zero3 dp4 tp2": {"data_parallel": 4, "model_parallel": 2, "optimizer_shard": 3},
    "all": {
        "data_parallel": 4,
        "expert_parallel": 2,
        "model_parallel": 2,
        "pipeline_stage": 2,
        "optimizer_shard": 1,
        "micro_batch_num": 2,
    },
}


def _degrees(parallel: dict) -> ParallelDims:
    return ParallelDims.of(config_of(**parallel).parallel)


def _expected(whole: dict, parallel: dict, rank: int) -> dict:
    slices = {name: slice_by_hand(name, array, parallel, rank) for name, array in whole.items()}
    return {name: array for name, array in slices.items() if array is not None}


def _assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def _save_cut(run, parallel: dict, step: int = 3, whole_arrays: bool = False, skip: tuple = ()):
    """A checkpoint that every rank has written for itself; (directory, weights, optimizer)."""
    config, shapes = config_of(**parallel), shapes_of()
    weights, optimizer = arrays_of(shapes)
    checkpoint.begin(run, step)
    for rank in range(_degrees(parallel).devices):
        if rank in skip:
            continue
        mine = (weights, optimizer)
        if not whole_arrays:
            mine = (_expected(weights, parallel, rank), _expected(optimizer, parallel, rank))
        checkpoint.save_shard(run, config, step, rank, *mine, shapes)
    return checkpoint.finish(run, config, "{}", state_of(step), wait=0), weights, optimizer


def _to(parallel: dict) -> str:
    return json.dumps(parallel)


@pytest.mark.parametrize("parallel", LAYOUTS.values(), ids=LAYOUTS)
def test_what_all_ranks_save_is_whole_again(tmp_path, parallel):
    path, weights, optimizer = _save_cut(tmp_path, parallel)
    held = checkpoint.read(path)
    _assert_equal(held.weights, weights)
    _assert_equal(held.optimizer, optimizer)
    assert held.state == state_of(3) and held.config == config_of(**parallel) and held.step == 3
    assert not list(tmp_path.glob("checkpoints/.*")) and not list(path.glob(".*"))  # no note, no temporary directory


@pytest.mark.parametrize("parallel", LAYOUTS.values(), ids=LAYOUTS)
def test_each_rank_reads_its_slices_whoever_wrote(tmp_path, parallel):
    """From one device, and from ranks that were cut otherwise."""
    one, weights, optimizer = save_whole(tmp_path / "one")
    other, _, _ = _save_cut(tmp_path / "other", LAYOUTS["dp8 ep4"])
    degrees = _degrees(parallel)
    for path in (one, other):
        for rank in range(degrees.devices):
            held = checkpoint.read(path, degrees=degrees, rank=rank)
            _assert_equal(held.weights, _expected(weights, parallel, rank))
            _assert_equal(held.optimizer, _expected(optimizer, parallel, rank))
    assert checkpoint.read(other, with_optimizer=False, degrees=degrees, rank=0).optimizer == {}


@pytest.mark.parametrize("second", ["dp4 ep2 tp2", "zero1 dp8 ep2"])
@pytest.mark.parametrize("first", LAYOUTS)
def test_round_trips_are_equal_bit_for_bit(tmp_path, first, second):
    """One device -> first -> second -> one device: the same files, moments and counters too."""
    start, *_ = save_whole(tmp_path)
    path = start
    for index, layout in enumerate((LAYOUTS[first], LAYOUTS[second], {})):
        out = tmp_path / f"cut{index}"
        _, config = recut.convert(path, _to(layout), out)
        assert config.parallel == config_of(**layout).parallel == checkpoint.read(out).config.parallel
        path = out
    assert content_of(path) == content_of(start)
    for name in ("state.json", "tokenizer.json"):
        assert (path / name).read_bytes() == (start / name).read_bytes()


def test_routing_groups_stay_where_they_can(tmp_path):
    """8 groups of 8 data slices are 8 on one device and on 4; the one group of one device cannot be cut in 4."""
    path, *_ = _save_cut(tmp_path, LAYOUTS["dp8 ep4"])
    for index, (layout, groups, written) in enumerate(
        [({}, 8, 8), (LAYOUTS["dp4"], 8, 8), (LAYOUTS["dp8 ep4"], 8, None)]
    ):
        _, config = recut.convert(path, _to(layout), tmp_path / str(index))
        assert (config.groups, config.moe.groups) == (groups, written)
    one, *_ = save_whole(tmp_path / "one")
    assert recut.convert(one, _to(LAYOUTS["dp4"]), tmp_path / "four")[1].groups == 4


def test_converted_is_what_the_ranks_would_have_written(tmp_path):
    one, *_ = save_whole(tmp_path / "one")
    for name in ("dp8 ep4", "all"):
        saved, *_ = _save_cut(tmp_path / name, LAYOUTS[name])
        recut.convert(one, _to(LAYOUTS[name]), tmp_path / f"converted {name}")
        for file in saved.iterdir():
            assert (tmp_path / f"converted {name}" / file.name).read_bytes() == file.read_bytes(), file.name


def test_replicas_write_nothing(tmp_path):
    """Hand-typed: which ranks have files, and which tensors the second of them holds."""
    ranks = {"dp4": [0], "ep4": [0, 1, 2, 3], "dp8 ep4": [0, 1, 2, 3], "tp4": [0, 1, 2, 3], "pp2": [0, 1]}
    for name, writers in ranks.items():
        path, *_ = _save_cut(tmp_path / name, LAYOUTS[name])
        devices = _degrees(LAYOUTS[name]).devices
        files = {f"{kind}-{rank:05d}-of-{devices:05d}.safetensors" for rank in writers for kind in manifest.KINDS}
        assert set(content_of(path)) == files
    second = load_file(tmp_path / "ep4/checkpoints/step-00000003/weights-00001-of-00004.safetensors")
    assert {name: array.shape for name, array in second.items()} == {
        f"layers.{layer}.feed_forward.experts.{name}": shape
        for layer in (1, 3)
        for name, shape in (("w_in", (2, 8, 16)), ("w_out", (2, 16, 8)))
    }
    listed = manifest.read_manifest(tmp_path / "ep4/checkpoints/step-00000003")
    slices = listed.files["weights-00001-of-00004.safetensors"]["slices"]
    assert slices["layers.1.feed_forward.experts.w_in"] == {"offsets": [2, 0, 0], "shape": [2, 8, 16]}
    assert listed.degrees == ParallelDims(data_parallel=4, expert_parallel=4)


def test_whole_arrays_are_cut_when_they_are_saved(tmp_path):
    """A rank that has gathered a tensor may hand over all of it, if it says its shape."""
    slices, *_ = _save_cut(tmp_path / "slices", LAYOUTS["all"])
    whole, *_ = _save_cut(tmp_path / "whole", LAYOUTS["all"], whole_arrays=True)
    assert content_of(slices) == content_of(whole)


def test_shapes_are_told_from_the_slices_without_zero(tmp_path):
    parallel = LAYOUTS["dp4 ep2 tp2"]
    weights, optimizer = arrays_of(shapes_of())
    checkpoint.begin(tmp_path, 3)
    for rank in range(8):
        mine = (_expected(weights, parallel, rank), _expected(optimizer, parallel, rank))
        checkpoint.save_shard(tmp_path, config_of(**parallel), 3, rank, *mine)
    path = checkpoint.finish(tmp_path, config_of(**parallel), "{}", state_of(3), wait=0)
    _assert_equal(checkpoint.read(path).weights, weights)
    zero = config_of(**LAYOUTS["zero1 dp8 ep2"])
    with pytest.raises(UserError, match=r"optimizer_shard: 1; the full shape of 'embedding.table' is needed"):
        checkpoint.save_shard(tmp_path, zero, 4, 0, weights, optimizer)


def test_files_are_those_of_the_library(tmp_path):
    """Of one device: byte for byte what safetensors writes, every type among them; any part reads alike."""
    random = np.random.default_rng(0)
    arrays = {f"{code}.x": (random.random((5, 3)) * 9).astype(code) for code in tensors.TYPES.values()}
    arrays |= {"scalar": np.array(3, np.int32), "empty": np.zeros((0, 2), np.float32), 'quoted "é"': np.ones(2)}
    entries = {name: tensors.Entry(tensors.type_of(array), array.shape) for name, array in arrays.items()}
    printed = tensors.write_file(tmp_path / "own", entries, lambda name, box: arrays[name][box])
    save_file(arrays, tmp_path / "library")
    assert (tmp_path / "own").read_bytes() == (tmp_path / "library").read_bytes()
    assert printed == manifest.fingerprint(tmp_path / "library")
    header = tensors.read_header(tmp_path / "library")
    with safe_open(tmp_path / "library", "np") as library:
        assert set(header) == set(library.keys())
        for name in arrays:
            part = tuple(slice(size // 3, size) for size in arrays[name].shape)
            out = np.empty(tensors.size_of(part), arrays[name].dtype)
            tensors.read_part(tmp_path / "library", header[name], part, out)
            np.testing.assert_array_equal(out, library.get_tensor(name)[part])


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (1, 1, 9), (2, 3, 4), (0, 3), (1, 6, 1)])
def test_pieces_are_all_of_an_array_in_the_order_of_its_bytes(shape):
    array = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    for limit in (4, 8, 20, 1000):
        boxes = list(tensors.pieces(tensors.full_box(shape), 4, limit))
        assert b"".join(array[box].tobytes() for box in boxes) == array.tobytes()
        assert max(array[box].nbytes for box in boxes) <= limit


def test_a_checkpoint_of_one_device_is_as_it_always_was(tmp_path):
    """Its manifest says nothing of degrees, and one that the library alone has written is read."""
    path, weights, optimizer = save_whole(tmp_path)
    content = json.loads((path / "manifest.json").read_text())
    assert content["version"] == 1 and set(content) == {"format", "version", "step", "files", "sha256"}
    assert set(content["files"]) == set(checkpoint.FILES)
    assert all(set(fields) == {"sha256", "bytes"} for fields in content["files"].values())
    save_file(weights, path / "weights.safetensors")  # the same bytes
    save_file(optimizer, path / "optimizer.safetensors")
    _assert_equal(checkpoint.read(path).optimizer, optimizer)


def test_a_rank_that_did_not_save_is_named(tmp_path):
    with pytest.raises(UserError, match=r"missing shards of ranks 2, 5 after 0 s: the checkpoint was not written"):
        _save_cut(tmp_path, LAYOUTS["dp8 ep4"], skip=(2, 5))
    assert checkpoint.listed(tmp_path) == []
    path, *_ = _save_cut(tmp_path, LAYOUTS["dp8 ep4"])  # clears what was left
    assert checkpoint.listed(tmp_path) == [path] and len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_slices_of_another_layout_or_shape_are_refused(tmp_path):
    parallel, shapes = LAYOUTS["ep4"], shapes_of()
    weights, optimizer = arrays_of(shapes)
    checkpoint.begin(tmp_path, 3)
    for rank in range(4):
        layout = {"data_parallel": 4, "expert_parallel": 2} if rank == 1 else parallel
        checkpoint.save_shard(tmp_path, config_of(**layout), 3, rank, weights, optimizer, shapes)
    with pytest.raises(UserError, match=r"unexpected shards of rank 1: sharded by .*'expert_parallel': 2"):
        checkpoint.finish(tmp_path, config_of(**parallel), "{}", state_of(3), wait=0)
    wrong = weights | {"norm.weight": np.zeros(9, np.float32)}
    with pytest.raises(UserError, match=r"shard of 'norm.weight': \(9,\); rank 1 of 4 holds \(8,\) of \(8,\)"):
        checkpoint.save_shard(tmp_path, config_of(**parallel), 3, 1, wrong, optimizer, shapes)
    checkpoint.save_shard(tmp_path, config_of(**parallel), 3, 1, weights, optimizer, shapes | {"norm.weight": (8,)})
    other = {name: array for name, array in weights.items() if "w_out" not in name}
    checkpoint.save_shard(tmp_path, config_of(**parallel), 3, 2, other, optimizer, shapes)
    with pytest.raises(UserError, match=r"missing shard of 'layers.1.feed_forward.experts.w_out': .* 768 of its 1,024"):
        checkpoint.finish(tmp_path, config_of(**parallel), "{}", state_of(3), wait=0)
    assert checkpoint.listed(tmp_path) == []


NAME, FILE = "layers.1.feed_forward.experts.w_in", "weights-00001-of-00004.safetensors"


def _change_manifest(path, change) -> None:
    """Writes the manifest anew, checksum and all, after `change(files, tensors)`."""
    held = manifest.read_manifest(path)
    files = json.loads(json.dumps(held.files))
    change(files, held.tensors)
    manifest.write_manifest(dataclasses.replace(held, files=files))


def _drop(files, known):
    del files[FILE]["slices"][NAME]


def _double(files, known):
    files[FILE]["slices"][NAME]["offsets"] = [1, 0, 0]


def _outside(files, known):
    files[FILE]["slices"][NAME]["offsets"] = [7, 0, 0]


def _unknown(files, known):
    files[FILE]["slices"]["layers.9.w"] = files[FILE]["slices"][NAME]


def _unheld(files, known):
    known["weights"]["layers.9.w"] = tensors.Entry("F32", (2, 2))


def _foreign_rank(files, known):
    files["weights-00004-of-00004.safetensors"] = files[FILE]


@pytest.mark.parametrize(
    "change, text",
    [
        (_drop, f"missing shard of '{NAME}': the files hold 768 of its 1,024 elements (8, 8, 16)"),
        (_double, f"duplicate shard of '{NAME}' in {FILE}: [1:3, 0:8, 0:16] is stored twice"),
        (_outside, f"unexpected shard of '{NAME}' in {FILE}: [7:9, 0:8, 0:16] of a tensor (8, 8, 16)"),
        (_unknown, f"unexpected shard of 'layers.9.w' in {FILE}: the checkpoint has no such tensor"),
        (_unheld, "missing shard of 'layers.9.w': no file contains any part of it"),
        (
            _foreign_rank,
            "unexpected shards in weights-00004-of-00004.safetensors: the checkpoint was written by 4 devices",
        ),
    ],
)
def test_missing_doubled_and_foreign_slices_are_named(tmp_path, change, text):
    path, *_ = _save_cut(tmp_path, LAYOUTS["ep4"])
    _change_manifest(path, change)
    for attempt in (lambda: checkpoint.read(path), lambda: recut.convert(path, "{}", tmp_path / "out")):
        with pytest.raises(DamagedError) as caught:
            attempt()
        assert text in str(caught.value) and "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_files_that_are_lost_altered_or_too_many_are_named(tmp_path):
    table = [
        (lambda path: (path / FILE).unlink(), f"{FILE} is missing"),
        (lambda path: (path / FILE).write_bytes((path / FILE).read_bytes()[:-1]), f"{FILE} has .* it is truncated"),
        (lambda path: (path / FILE).write_bytes(b"x" + (path / FILE).read_bytes()[1:]), f"{FILE} was altered"),
        (
            lambda path: (path / "weights-00009-of-00016.safetensors").touch(),
            "unexpected shards in weights-00009-of-00016.safetensors: manifest.json does not list the file",
        ),
    ]
    for index, (damage, text) in enumerate(table):
        path, *_ = _save_cut(tmp_path / str(index), LAYOUTS["ep4"])
        damage(path)
        with pytest.raises(DamagedError, match=text):
            checkpoint.read(path)


def test_a_rank_reads_only_the_files_with_its_slices(tmp_path):
    """What is damaged elsewhere does not stop it: files are verified by those who read them."""
    path, weights, _ = _save_cut(tmp_path, LAYOUTS["ep4"])
    (path / FILE).write_bytes(b"")
    degrees = _degrees(LAYOUTS["ep4"])
    _assert_equal(checkpoint.read(path, degrees=degrees, rank=3).weights, _expected(weights, LAYOUTS["ep4"], 3))
    with pytest.raises(DamagedError, match=FILE):
        checkpoint.read(path, degrees=degrees, rank=1)


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    path, *_ = save_whole(tmp_path / "run")
    place = tmp_path / "new" / "cut"
    with pytest.raises(UserError, match=r"experts.w_in: \(8, 8, 16\); model_parallel \(3\) must|model_parallel: 3"):
        recut.convert(path, "{model_parallel: 3}", place)

    def full(folder, degrees, layers, rank, *rest):
        if rank == 2:
            raise OSError(28, "No space left on device", str(folder))
        return sharded.write_shards(folder, degrees, layers, rank, *rest)

    monkeypatch.setattr(recut, "write_shards", full)
    with pytest.raises(OSError, match="No space"):
        recut.convert(path, _to(LAYOUTS["ep4"]), place)
    assert not place.exists() and list(place.parent.iterdir()) == []


def test_the_command(tmp_path, capsys):
    run, cut, back = tmp_path / "run", tmp_path / "cut", tmp_path / "back"
    path, *_ = save_whole(run)
    command = ["convert", str(run), "--to", "{data_parallel: 8, expert_parallel: 4}", "--out", str(cut)]
    assert cli.run(checkpoint.main, command) == 0
    printed = capsys.readouterr().out
    assert f"checkpoint: '{cut}' for 8 device(s)" in printed
    assert "routing groups: 8 from now on instead of 1; each group has its own capacity" in printed
    assert checkpoint.read(cut).config.parallel.expert_parallel == 4
    assert cli.run(checkpoint.main, ["convert", str(cut), "--to", "{}", "--out", str(back)]) == 0
    assert content_of(back) == content_of(path)
    table = [
        (["convert", str(run), "--to", "{}", "--out", str(cut)], f"--out: '{cut}' already exists"),
        (["convert", str(run), "--to", "8", "--out", str(tmp_path / "x")], "--to: '8'; give degrees as YAML"),
        (["convert", str(run), "--to", "{dp: 8}", "--out", str(tmp_path / "x")], "parallel.dp: unknown key"),
        (
            ["convert", str(run), "--to", "{data_parallel: 1, expert_parallel: 2}", "--out", "x"],
            "parallel.expert_parallel: 2; must",
        ),
        (["convert", str(tmp_path / "no"), "--to", "{}", "--out", "x"], "does not exist"),
        (["convert", str(run)], "required: --to, --out"),
    ]
    for arguments, text in table:
        assert cli.run(checkpoint.main, arguments) == 2
        assert text in capsys.readouterr().err
