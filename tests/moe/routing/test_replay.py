"""Record and replay: files, refusals, forced choices with live gates, and whole runs."""

import hashlib
import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from oracles.tiny import tiny_config
from oracles.tiny_run import losses_of, run_config, write_text
from safetensors.numpy import load, save

from switchyard.errors import UserError
from switchyard.models import create_model
from switchyard.moe.routing import create_router, known_routers
from switchyard.moe.routing.replay import Recorder, Replayer, manifest_of, read, subject
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.noise import NoiseSlices
from switchyard.training.evaluate import evaluate
from switchyard.training.loop import train

MOE = {"expert_num": 4, "router": "top_k", "num_experts_chosen": 2, "layers": [1]}


def _config(**sections):
    sections["model"] = {"num_layers": 2} | sections.get("model", {})
    sections["moe"] = MOE | sections.get("moe", {})
    return run_config(**sections)


def _choices(seed=0):
    """Of one step: A = 1, M = 1, N = 64, K = 2."""
    return np.random.default_rng(seed).integers(0, 4, (1, 1, 64, 2)).astype(np.int32)


TOKENS = np.arange(64, dtype=np.int32).reshape(1, 4, 16)


def _recorded(folder, config=None, kind="training") -> str:
    path = str(folder / "choices.safetensors")
    recorder = Recorder(path, config or _config(), kind)
    recorder.add(3, TOKENS, _choices(3))
    recorder.add(1, TOKENS + 1, _choices(1)[0])  # without the axis of micro-batches
    recorder.save()
    return path


def test_what_is_recorded_comes_back(tmp_path):
    replayer = Replayer(_recorded(tmp_path), _config(), "training")
    np.testing.assert_array_equal(replayer.at(1, TOKENS + 1), _choices(1))
    np.testing.assert_array_equal(replayer.at(3, TOKENS), _choices(3))
    np.testing.assert_array_equal(replayer.at(0, TOKENS), np.full((1, 1, 64, 2), -1))  # unset: the router decides
    assert {path.name for path in tmp_path.iterdir()} == {"choices.safetensors"}


def test_a_resumed_run_goes_on_in_its_file(tmp_path):
    """After two steps: what came later is chosen anew."""
    recorder = Recorder(_recorded(tmp_path), _config(), "training", start=2)
    recorder.add(2, TOKENS, _choices(2))
    recorder.save()
    held = read(recorder.path, recorder.subject, "moe.record")
    np.testing.assert_array_equal(held["steps"], [1, 2])
    np.testing.assert_array_equal(held["experts"], np.stack([_choices(1), _choices(2)]))


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("layers", {"moe": {"layers": [0, 1]}}),
        ("experts", {"moe": {"expert_num": 8}}),
        ("choices", {"moe": {"num_experts_chosen": 1}}),
        ("batch", {"data": {"batch_size": 8}}),
        ("micro_batches", {"train": {"gradient_accumulation_steps": 2}}),
        ("model", {"model": {"hidden_size": 32}}),
    ],
)
def test_a_file_of_another_model_or_batch_is_refused_by_name(name, sections, tmp_path):
    path = _recorded(tmp_path)
    with pytest.raises(UserError, match=rf"^moe\.replay: {path}; recorded with {name} .+, this run has .+") as caught:
        Replayer(path, _config(**sections), "training")
    assert "\n" not in str(caught.value)


def test_evaluation_and_training_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="recorded with kind evaluation, this run has training"):
        Replayer(_recorded(tmp_path, kind="evaluation"), _config(), "training")


@pytest.mark.parametrize(
    "sections",
    [{"moe": {"router": "cosine"}}, {"model": {"compute_dtype": "float16"}}, {"schedule": {"learning_rate": 0.5}}],
)
def test_router_precision_and_rate_may_differ(sections, tmp_path):
    Replayer(_recorded(tmp_path), _config(**sections), "training")


def test_other_tokens_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"^moe\.replay: .*; step 3 was recorded on other tokens"):
        Replayer(_recorded(tmp_path), _config(), "training").at(3, TOKENS + 5)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _as_version_1(path, manifest=None):
    """The same record as earlier versions wrote it: the manifest in a file of its own."""
    arrays = load(path.read_bytes())
    data = save(arrays)
    path.write_bytes(data)
    own = {"format_version": 1, "sha256": hashlib.sha256(data).hexdigest(), **subject(_config(), "training")}
    manifest_of(path).write_text(json.dumps(own) if manifest is None else manifest)


def _with_manifest(path, text):
    path.write_bytes(save(load(path.read_bytes()), {"switchyard": text}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_cut, "damaged"),
        (_flip, "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(save({"weight": np.zeros(3)})), "holds no manifest"),
        (lambda path: _with_manifest(path, "{"), "damaged"),
        (lambda path: _with_manifest(path, "[]"), "another format"),
        (lambda path: _with_manifest(path, '{"format_version": 99}'), "another format"),
        (lambda path: _as_version_1(path, "{"), "is no manifest"),
        (lambda path: _as_version_1(path, '{"format_version": 2}'), "another format"),
        (lambda path: _as_version_1(path, '{"format_version": 1}'), "damaged"),
    ],
)
def test_a_damaged_record_is_one_line(harm, message, tmp_path):
    path = _recorded(tmp_path)
    harm(Path(path))
    with pytest.raises(UserError, match=rf"^moe\.replay: {path}; .*{message}") as caught:
        Replayer(path, _config(), "training")
    assert "\n" not in str(caught.value)


def test_a_record_of_two_files_is_read_and_becomes_one(tmp_path):
    path = Path(_recorded(tmp_path))
    _as_version_1(path)
    np.testing.assert_array_equal(Replayer(str(path), _config(), "training").at(3, TOKENS), _choices(3))
    Recorder(str(path), _config(), "training", start=4).save()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    np.testing.assert_array_equal(Replayer(str(path), _config(), "training").at(3, TOKENS), _choices(3))


def test_a_run_takes_up_its_own_record_and_no_other(tmp_path):
    """Also one from before its first checkpoint, and after its folder was moved."""
    path = _recorded(tmp_path)
    assert not Recorder(path, _config(), "training", start=0, resume=True).rows
    assert list(Recorder(path, _config(), "training", start=2, resume=True).rows) == [1]
    Recorder(path, _config(train={"output_dir": "moved"}), "training", start=2, resume=True)
    (tmp_path / "there" / "tiny").mkdir(parents=True)
    there = _config(train={"output_dir": str(tmp_path / "there")})
    other = str(tmp_path / "other.safetensors")
    recorder = Recorder(other, there, "training")
    recorder.add(0, TOKENS, _choices(0))
    recorder.save()
    for config in (_config(), _config(train={"name": "b"})):
        for start in (0, 2):
            with pytest.raises(UserError, match=rf"^moe\.record: {other}; was recorded by run '.*there/tiny': choose"):
                Recorder(other, config, "training", start=start, resume=True)


def test_a_record_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    path = Path(_recorded(tmp_path))
    before = path.read_bytes()
    recorder = Recorder(str(path), _config(), "training", start=4)
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=rf"^'{path}': No space left on device; free some space"):
        recorder.save()
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [path.name]


def test_nothing_is_overwritten(tmp_path):
    path = _recorded(tmp_path)
    with pytest.raises(UserError, match=rf"^moe\.record: {path}; the file exists"):
        Recorder(path, _config(), "training")
    with pytest.raises(UserError, match=r"^moe\.record: .*; the folder '.*nowhere' does not exist"):
        Recorder(str(tmp_path / "nowhere" / "a"), _config(), "training")


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"record": "a", "replay": "a"}, "moe.record: a; must not be the file that moe.replay reads"),
        (
            {"replay": "a", "router": "gshard", "num_experts_chosen": 2, "second_expert": "sampling"},
            "moe.replay: a; a se",
        ),
    ],
)
def test_keys_that_do_not_fit(moe, message):
    with pytest.raises(UserError, match=f"^{message}"):
        tiny_config(**moe)


# Forced choices --------------------------------------------------------------------------------------------------

PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.25, 0.5, 0.25]], np.float32)


def _gates(replay, choices=2, valid=(1, 1, 1), **moe):
    config = tiny_config(width=3, expert_num=3, num_experts_chosen=choices, **moe)
    router = create_router(config, InitialWeights(0))
    router.weight.set_data(Tensor(np.eye(3, dtype=np.float32)))
    context = {"valid": Tensor(np.array([valid], np.float32)), "replay": Tensor(np.array([replay], np.int32))}
    routing = router(Tensor(np.log(PROBABILITIES)[None]), context)
    return {name: part.asnumpy()[0] for name, part in routing.items()}


def test_gates_of_forced_choices_are_live(pynative):
    """Row 0 is forced to its two least probable experts, row 1 has an unset entry and chooses, row 2 is padding."""
    routing = _gates([[2, 1], [0, -1], [0, 1]], valid=(1, 1, 0))
    np.testing.assert_array_equal(routing["expert_index"], [[2, 1], [2, 1], [3, 3]])
    np.testing.assert_allclose(routing["gates"], [[1 / 3, 2 / 3], [2 / 3, 1 / 3], [0, 0]], atol=1e-6)
    np.testing.assert_array_equal(routing["expert_mask"], [[0, 1, 1], [0, 1, 1], [0, 0, 0]])
    np.testing.assert_allclose(routing["probabilities"], PROBABILITIES, atol=1e-6)


def test_a_single_forced_gate_is_its_probability(pynative):
    routing = _gates([[1], [0], [3]], choices=1, router="switch")  # 3 = E is no expert: unset
    np.testing.assert_array_equal(routing["expert_index"], [[1], [0], [1]])
    np.testing.assert_allclose(routing["gates"], [[0.2], [0.1], [0.5]], atol=1e-6)


def _replaying():
    for name, router in known_routers().items():
        if router.form == "token_choice" and not router.eval_form:
            yield name


@pytest.mark.parametrize("name", list(_replaying()))
def test_every_router_that_chooses_can_be_forced(name, graph):
    """Compiled: not to the best expert but to the next; the gate is above zero, and its gradient moves weights."""
    choices = 2 if name in ("gshard", "multi_gate") else 1
    config = tiny_config(router=name, num_experts_chosen=choices, task_num=2, n_group=2)
    random = np.random.default_rng(0)
    router = create_router(config, InitialWeights(0), NoiseSlices(), vocab_size=5, has_tasks=True).set_train(False)
    rows = Tensor(random.normal(0, 1, (1, 6, 6)).astype(np.float32))
    ids = Tensor(random.integers(0, 2, (1, 6)).astype(np.int32))
    context = {"valid": Tensor(np.ones((1, 6), np.float32)), "token_ids": ids, "task_ids": ids, "noise": None}
    ms.set_context(mode=1)
    order = np.argsort(-router(rows, context)["probabilities"].asnumpy(), -1).astype(np.int32)
    ms.set_context(mode=0)
    replay = Tensor(order[..., 1 : 1 + choices])
    weights = ms.ParameterTuple(router.trainable_params())

    def gates(rows):
        routing = router(rows, {**context, "replay": replay})
        return (routing["gates"] ** 2).sum(), routing["gates"], routing["expert_index"]

    if not known_routers()[name].learnable:
        _, found, experts = gates(rows)
    else:
        (_, found, experts), (_, gradients) = ms.value_and_grad(gates, 0, weights, has_aux=True)(rows)
        assert any(np.abs(gradient.asnumpy()).max() > 1e-4 for gradient in gradients)
    np.testing.assert_array_equal(experts.asnumpy(), replay.asnumpy())
    assert (found.asnumpy() > 0).all()


@pytest.mark.parametrize("name", ["dense", "tree", "mixture_of_depths"])
def test_routers_without_choices_are_refused(name, tmp_path):
    moe = {"router": name, "num_experts_chosen": 1, "record": str(tmp_path / "a"), "capacity_factor": 0.5}
    config = _config(moe=moe | ({"expert_num": 1} if name == "mixture_of_depths" else {}))
    with pytest.raises(UserError, match=rf"^moe\.record: .*; router '{name}' does not choose experts row by row"):
        create_model(config, 17)


# Whole runs ------------------------------------------------------------------------------------------------------


def _run(folder, name, **sections):
    sections["train"] = {"name": name, "steps": 4, "gradient_accumulation_steps": 2} | sections.get("train", {})
    sections["model"] = {"num_layers": 2} | sections.get("model", {})
    sections["moe"] = MOE | {"expert_num": 4} | sections.get("moe", {})
    config = run_config(folder, **sections, context={"mode": "pynative"})
    train(config)
    return config, folder / "runs" / name


@pytest.mark.long
def test_a_run_repeats_the_choices_of_another(tmp_path, graph):
    """Two micro-batches a step. Replayed by itself a run's losses are the same; another router takes its choices."""
    write_text(tmp_path)
    one, two = str(tmp_path / "one.safetensors"), str(tmp_path / "two.safetensors")
    config, run = _run(tmp_path, "one", moe={"record": one})
    _, same = _run(tmp_path, "same", moe={"replay": one})
    assert losses_of(run) == losses_of(same)
    _run(tmp_path, "other", moe={"router": "cosine", "replay": one, "record": two})
    first, second = (Replayer(path, config, "training") for path in (one, two))
    assert first.experts.shape == (4, 2, 1, 64, 2)  # R, A, M, N, K
    np.testing.assert_array_equal(first.experts, second.experts)
    assert first.experts.min() == 0 and first.experts.max() == 3
    with pytest.raises(UserError, match="recorded on other tokens"):
        _run(tmp_path, "seed", moe={"replay": one}, train={"seed": 2})


@pytest.mark.slow
def test_an_evaluation_is_recorded_and_replayed(tmp_path, graph):
    write_text(tmp_path)
    path = str(tmp_path / "choices.safetensors")
    _, run = _run(tmp_path, "one", train={"gradient_accumulation_steps": 1})
    quiet = {"say": lambda line: None}
    found = evaluate(run, [f"moe.record={path}"], **quiet)
    again = evaluate(run, [f"moe.replay={path}"], **quiet)
    assert again.loss == pytest.approx(found.loss, abs=1e-6)
    assert [layer["load"] for layer in again.layers] == [layer["load"] for layer in found.layers]
    half = evaluate(run, [f"moe.replay={path}", "model.compute_dtype=float16"], **quiet)
    assert half.layers[0]["load"] == found.layers[0]["load"]
    with pytest.raises(UserError, match=r"^moe\.replay: .*; recorded with batch \[4, 16\], this run has \[2, 16\]"):
        evaluate(run, [f"moe.replay={path}", "data.batch_size=2"], **quiet)
