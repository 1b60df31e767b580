"""`--init`: a new run starts from the weights and the tokenizer of another, with other data."""

import shutil

import pytest
from oracles.tiny_run import losses_of, run_config, write_text

from switchyard.checkpoint import store as checkpoint
from switchyard.config import build
from switchyard.data import Tokenizer
from switchyard.errors import UserError
from switchyard.training.initial import check_fits, is_the_same, read_initial
from switchyard.training.loop import train

MOE = {"expert_num": 4, "router": "top_k", "num_experts_chosen": 2}
PYNATIVE, SHORT = {"mode": "pynative"}, {"val_fraction": 0.01}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a text of characters, a run that has read it, and another text of fewer characters."""
    path = tmp_path_factory.mktemp("initial")
    write_text(path)
    (path / "new.txt").write_text("over the gates jump 7 sheep\n" * 200, encoding="utf-8")
    (path / "foreign.txt").write_text("Ω over the gates\n" * 200, encoding="utf-8")
    train(run_config(path, moe=MOE, data=SHORT, train={"name": "source", "steps": 1}, context=PYNATIVE))
    return path


def tuned(folder, name: str, text: str = "new.txt", **train_keys):
    """A run on another text; nobody says which tokenizer."""
    data = SHORT | {"path": str(folder / text), "tokenizer": "byte"}
    keys = {"name": name, "steps": 2} | train_keys
    return run_config(folder, moe=MOE, data=data, train=keys, context=PYNATIVE)


def test_weights_and_tokenizer_are_taken_over_and_the_optimizer_begins_anew(folder, capsys):
    source = checkpoint.read(folder / "runs" / "source")
    train(tuned(folder, "tuned"), init=folder / "runs" / "source")
    first, last = (checkpoint.read(path) for path in checkpoint.listed(folder / "runs" / "tuned"))
    assert (first.step, last.step) == (0, 2)
    assert {n: v.tobytes() for n, v in first.weights.items()} == {n: v.tobytes() for n, v in source.weights.items()}
    assert all(not value.any() for name, value in first.optimizer.items() if name.startswith("moment"))
    assert last.tokenizer_json == source.tokenizer_json and last.config.data.tokenizer == "char"
    assert last.state["init"] == {"checkpoint": source.path.as_posix(), "step": 1}
    assert f"init: weights and tokenizer of '{source.path}' (step 1)" in capsys.readouterr().out


def test_a_run_that_was_stopped_goes_on_without_the_source(folder):
    """Bit for bit, from the step 0 that holds the weights it began with, and with the tokenizer of its own."""
    whole, part = folder / "runs" / "tuned", folder / "runs" / "stopped"
    shutil.copytree(checkpoint.listed(whole)[0], part / "checkpoints" / "step-00000000")
    train(tuned(folder, "stopped"), resume=True)
    assert losses_of(part) == losses_of(whole) and len(losses_of(part)) == 2


def test_weights_without_an_optimizer_are_not_resumed(folder):
    """An import is where a run starts from, and no run."""
    held, run = checkpoint.read(folder / "runs" / "source"), folder / "runs" / "bare"
    checkpoint.save(run, tuned(folder, "bare"), held.tokenizer_json, held.weights, {}, {"step": 0})
    with pytest.raises(UserError, match=r"^--resume: '.*' holds no state of an optimizer .* with --init .*bare$"):
        train(tuned(folder, "bare"), resume=True)


def test_a_character_that_the_source_does_not_know_is_refused(folder):
    with pytest.raises(UserError, match=r"foreign\.txt.*'Ω' \(U\+03A9\) at position 0 is not in the vocabulary"):
        train(tuned(folder, "foreign", "foreign.txt"), init=folder / "runs" / "source")
    assert not (folder / "runs" / "foreign").exists()


def test_it_excludes_resume(folder):
    with pytest.raises(UserError, match=r"^--init: 'x'; --resume goes on from the weights of the run itself"):
        train(tuned(folder, "tuned"), resume=True, init="x")


def test_a_source_that_is_none_is_refused(folder):
    with pytest.raises(UserError, match=r"^--init: checkpoint '.*nowhere': does not exist"):
        read_initial(folder / "nowhere", tuned(folder, "other"))


@pytest.mark.parametrize(
    "section, key, now, before",
    [
        ("model", "hidden_size", 32, 16),
        ("model", "tie_word_embeddings", False, "true"),
        ("moe", "expert_num", 8, 4),
        ("moe", "moe_intermediate_size", 48, 64),
        ("moe", "shared_expert_num", 1, 0),
    ],
)
def test_other_shapes_are_refused_by_key(section, key, now, before):
    old, new = run_config(moe=MOE), run_config(moe=MOE, **({"model": {key: now}} if section == "model" else {}))
    if section == "moe":
        new = run_config(moe=MOE | {key: now})
    with pytest.raises(UserError, match=rf"^--init: {section}\.{key}: .*; the weights of 'runs/x' have {before}: "):
        check_fits(new, old, "runs/x")


def test_what_means_the_same_fits():
    """null and the value that it stands for; a dense width that no layer reads."""
    check_fits(run_config(model={"intermediate_size": 64, "n_kv_heads": 2}), run_config(), "x")
    check_fits(run_config(moe=MOE | {"layers": [0]}), run_config(moe=MOE), "x")
    check_fits(run_config(moe=MOE | {"router": "switch", "num_experts_chosen": 1}), run_config(moe=MOE), "x")


def test_a_dense_source_of_experts_names_the_command_that_makes_them():
    with pytest.raises(UserError, match=r"moe\.expert_num: 4; .*switchyard\.interop\.upcycle"):
        check_fits(run_config(moe=MOE), run_config(), "runs/dense")


def test_keys_that_change_what_the_weights_compute_are_said(folder, capsys):
    config = tuned(folder, "other")
    read_initial(
        folder / "runs" / "source", build(config.model_dump() | {"model": config.model.model_dump() | {"theta": 5e5}})
    )
    assert "init: model.theta: 10000.0 -> 500000.0\n" in capsys.readouterr().out


def test_a_copy_of_the_same_tokenizer_is_no_change_to_tell(tmp_path):
    known = Tokenizer.from_json('{"kind": "char", "characters": "ab", "separated": false}')
    (tmp_path / "same.json").write_text(known.to_json())
    (tmp_path / "other.json").write_text('{"kind": "byte"}')
    found = [is_the_same(str(tmp_path / name), known) for name in ("same.json", "other.json", "gone.json")]
    assert found == [True, False, False] and not is_the_same("char", known)
