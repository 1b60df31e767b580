"""Which runs a sweep has, what they are called, and what is refused before the first of them starts."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles.tiny_run import run_config

from switchyard.errors import UserError
from switchyard.sweep.plan import Axis, check_same, name_of, parse_axes, plan, result_of, split


@pytest.fixture
def path(tmp_path):
    """A configuration whose runs go to tmp_path/runs."""
    file = tmp_path / "tiny.yaml"
    file.write_text(run_config(tmp_path, moe={"expert_num": 4}).to_yaml())
    return file


def names(path, *over, overrides=(), out=None):
    return [run.name for run in plan(path, parse_axes(over), overrides, out)]


def test_every_combination_is_a_run_the_last_key_fastest(path):
    assert names(path, "moe.expert_num=2,8", "train.seed=1,2") == [
        "expert_num-2_seed-1",
        "expert_num-2_seed-2",
        "expert_num-8_seed-1",
        "expert_num-8_seed-2",
    ]


def test_a_run_has_its_values_and_its_folder(path, tmp_path):
    runs = plan(path, parse_axes(["moe.expert_num=2,8", "train.steps=3"]), ["schedule.warmup_steps=1"], None)
    assert [run.config.moe.expert_num for run in runs] == [2, 8]
    assert {(run.config.train.steps, run.config.schedule.warmup_steps) for run in runs} == {(3, 1)}
    assert runs[0].folder == tmp_path / "runs" / "tiny-sweep" / "expert_num-2"
    assert runs[0].values == {"moe.expert_num": "2", "train.steps": "3"}
    assert plan(path, parse_axes(["train.seed=1"]), [], str(tmp_path / "o"))[0].folder == tmp_path / "o" / "seed-1"


def test_commas_in_brackets_and_quotes_belong_to_a_value():
    assert split("[0, 1],[1]") == ["[0, 1]", "[1]"]
    assert split("{name: gshard, second_expert: sampling},switch") == [
        "{name: gshard, second_expert: sampling}",
        "switch",
    ]
    assert split("'a,b',\"c,d\",e") == ["'a,b'", '"c,d"', "e"]


@given(st.lists(st.text("ab 1.[]{}", min_size=1).map(str.strip).filter(bool), min_size=1))
def test_splitting_loses_no_character(parts):
    text = ",".join(parts)
    assert ",".join(split(text)).replace(" ", "") == text.replace(" ", "")


def test_names_are_folders_and_differ():
    """A key that ends as another keeps its section; what a name cannot hold is told apart by a checksum."""
    axes = [
        Axis("model.type", ("a", "b")),
        Axis("optimizer.type", ("x",) * 2),
        Axis("moe.router", ("switch", "{a: 1}")),
    ]
    values = {"model.type": "a", "optimizer.type": "x", "moe.router": "switch"}
    assert name_of(values, axes) == "model.type-a_optimizer.type-x_router-switch"
    odd = [name_of({"data.path": text}, [Axis("data.path", ("a", "b"))]) for text in ("a/b", "a b", "../..", "é", "-")]
    assert len(set(odd)) == 5 and all(name.startswith("path-") and "/" not in name for name in odd)
    long = name_of({"data.path": "x" * 300}, [Axis("data.path", ("a", "b"))])
    assert len(long) < 120


@pytest.mark.parametrize(
    ("over", "line"),
    [
        (["moe.expert_num"], r"^--over: 'moe\.expert_num'; write section\.key=VALUE,VALUE"),
        (["expert_num=2"], r"^--over: 'expert_num=2'; write"),
        (["moe.expert_num=2,,8"], r"^--over: .*; write"),
        (["moe.expert_num=2,8,2"], r"^--over: moe\.expert_num; the value '2' stands twice$"),
        (["train.seed=1", "train.seed=2"], r"^--over: train\.seed; given twice"),
        (["train.name=a,b"], r"^--over: train\.name; the sweep names its runs itself: use --out DIR"),
        (["moe.expert_num=2,x"], r"^--over: moe\.expert_num=x: moe\.expert_num: 'x'; "),
        (["moe.expert_nun=2"], r"moe\.expert_nun: unknown key; did you mean 'expert_num'"),
        (["parallel.data_parallel=1,2"], r"^--over: parallel\.data_parallel=2: "),
        (["train.seed=" + ",".join(map(str, range(1001)))], r"^--over: 1,001 combinations; at most 1,000$"),
    ],
)
def test_what_is_refused(path, over, line):
    with pytest.raises(UserError, match=line):
        names(path, *over)


def test_a_name_among_the_shared_keys_is_refused(path):
    with pytest.raises(UserError, match=r"^train\.output_dir: the sweep names its runs itself; use --out"):
        names(path, "train.seed=1,2", overrides=["train.output_dir=x"])


def test_a_finished_run_is_known_by_its_steps(path):
    (run,) = plan(path, parse_axes(["train.steps=3"]), [], None)
    assert result_of(run) is None
    run.folder.mkdir(parents=True)
    for steps, finished in ((2, False), (3, True), (4, False)):
        (run.folder / "result.json").write_text(json.dumps({"steps": steps}))
        assert (result_of(run) is not None) == finished
    (run.folder / "result.json").write_text("[")
    assert result_of(run) is None


def test_a_folder_of_another_configuration_is_refused(path):
    """Keys that do not change what is measured may differ."""
    (run,) = plan(path, parse_axes(["train.seed=3"]), ["moe.capacity_factor=2.0", "train.log_every=7"], None)
    check_same(run)
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(run.config.to_yaml())
    check_same(plan(path, parse_axes(["train.seed=3"]), ["moe.capacity_factor=2.0"], None)[0])
    with pytest.raises(
        UserError, match=r"^--out: '.*tiny-sweep'; its run seed-3 was trained with moe\.capacity_factor=2"
    ):
        check_same(plan(path, parse_axes(["train.seed=3"]), [], None)[0])
