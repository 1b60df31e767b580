"""Keys that nothing reads: the tables against what routers, paths and networks do, and what is refused or told."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor, ops
from mindspore import dtype as mstype
from oracles.tiny import tiny_config
from oracles.tiny_run import run_config, write_text

from switchyard.config import Config, Section, build, load, notes, notes_of_checkpoint, unread_keys
from switchyard.config import unread as tables
from switchyard.config.router_options import OPTIONS
from switchyard.distributed.mesh import LOCAL
from switchyard.errors import UserError
from switchyard.moe.dispatch.dispatchers import create_dispatcher
from switchyard.moe.experts import FeedForwardExperts
from switchyard.moe.routing import create_router, known_routers
from switchyard.nn.fused import NONE
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.noise import NoiseSlices
from switchyard.training.loop import train

SECTIONS = {outer.annotation: name for name, outer in Config.model_fields.items()}
ALL_KEYS = {f"{name}.{key}" for section, name in SECTIONS.items() for key in section.model_fields}
CONFIGS = sorted((Path(__file__).parents[2] / "config").glob("*.yaml"))


@contextlib.contextmanager
def recorded(monkeypatch):
    """Collects the keys that are read of any configuration meanwhile, as section.key."""
    found, usual = set(), Section.__getattribute__

    def look(self, name):
        if type(self) in SECTIONS and name in type(self).model_fields:
            found.add(f"{SECTIONS[type(self)]}.{name}")
        return usual(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Section, "__getattribute__", look)
        yield found


# The tables against the classes


def test_routers_are_grouped_as_their_classes_say():
    routers = known_routers()
    assert set(tables.ROUTERS) == set(routers)
    assert set(tables.BY_ROW) == {name for name, router in routers.items() if router.form == "token_choice"}
    later = {name for name, router in routers.items() if (router.eval_form or router.form) == "token_choice"}
    assert set(tables.BY_ROW_AT_EVALUATION) == later
    for key, loss in (("aux_loss_factor", "switch"), ("z_loss_factor", "z")):
        assert set(tables.ROUTER_KEYS[key]) == {name for name, router in routers.items() if loss in router.losses}


EXPERTS, WIDTH, IDS = 8, 6, 4
CHANGED = {
    "norm_topk_prob": False,
    "routed_scaling_factor": 2.0,
    "second_expert": "threshold",
    "second_expert_threshold": 0.45,
    "topk_bias_update_rate": 0.9,
    "n_group": 4,
    "topk_group": 2,
    "sinkhorn_iterations": 1,
    "hash_table": "random",
    "random_draw": "step",
    "task_num": 3,
    "task_experts": [[3, 5], [6, 1]],
    "slots_per_expert": 3,
}
ONE = ("switch", "hash", "lsh", "random", "random_in_group", "mixture_of_depths", "base", "tree")
USUAL = {"two_level": {"n_group": 2}, "mixture_of_depths": {"expert_num": 1, "capacity_factor": 0.5}}
BESIDE = {  # what a key needs to be seen
    ("sigmoid", "topk_group"): {"n_group": 4},
    ("top_k", "topk_group"): {"n_group": 4},
    ("two_level", "topk_group"): {"n_group": 4},
    ("gshard", "second_expert_threshold"): {"second_expert": "threshold"},
    ("task", "task_experts"): {"task_num": 2},
}


def _behaviour(name: str, **moe) -> list[np.ndarray]:
    """All that a router decides in two training passes and one of evaluation, and its parameters."""
    moe = {"expert_num": EXPERTS, "num_experts_chosen": 1 if name in ONE else 2, "task_num": 2} | moe
    given = {"name": name} | {key: moe.pop(key) for key in list(moe) if key in OPTIONS[name].model_fields}
    config, random = tiny_config(width=WIDTH, router=given, **moe), InitialWeights(0)
    slices = NoiseSlices()
    router = create_router(config, random, slices, vocab_size=IDS, has_tasks=True)
    for parameter in router.trainable_params():
        parameter.set_data(Tensor(np.random.default_rng(1).normal(0, 0.8, parameter.shape).astype(np.float32)))
    random = np.random.default_rng(2)
    context = {
        "valid": Tensor(np.ones((1, 12), np.float32)),
        "noise": Tensor(random.random((max(slices.count, 1), 12, WIDTH)).astype(np.float32)),
        "token_ids": Tensor(random.integers(0, IDS, (1, 12)).astype(np.int32)),
        "task_ids": Tensor(random.integers(0, 2, (1, 12)).astype(np.int32)),
    }
    rows, found = Tensor(random.normal(0, 1, (1, 12, WIDTH)).astype(np.float32)), []
    for training in (True, True, False):
        routing = router.set_train(training)(rows, context)
        found += [routing[key].asnumpy() for key in sorted(routing)]
        if training and router.state():  # a bias moves between steps
            router.update(routing["expert_mask"].asnumpy().sum((0, 1)))
    return found + [parameter.asnumpy() for parameter in router.get_parameters()]


def _alike(one: list, other: list) -> bool:
    return all(a.shape == b.shape and np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", list(known_routers()))
def test_every_option_of_a_router_has_an_effect(name, pynative):
    usual, options = USUAL.get(name, {}), OPTIONS[name].model_fields
    for key in options.keys() - {"consistency_loss_factor"}:  # a weight of the loss
        beside = {**usual, **BESIDE.get((name, key), {})}
        assert not _alike(_behaviour(name, **beside), _behaviour(name, **{**beside, key: CHANGED[key]})), key


@pytest.mark.parametrize("name", list(known_routers()))
def test_the_blind_routers_are_those_that_look_at_no_row(name, pynative):
    config = tiny_config(
        width=WIDTH,
        router=name,
        num_experts_chosen=2 if name == "gshard" else 1,
        **{"task_num": 2, **USUAL.get(name, {})},
    )
    router = create_router(config, InitialWeights(0), NoiseSlices(), vocab_size=IDS, has_tasks=True)
    for parameter in router.trainable_params():
        parameter.set_data(Tensor(np.random.default_rng(1).normal(0, 0.8, parameter.shape).astype(np.float32)))
    ids = ops.zeros((1, 12), ops.ones(1).dtype).astype("int32")
    context = {"valid": Tensor(np.ones((1, 12), np.float32)), "noise": None, "token_ids": ids, "task_ids": ids}
    found = []
    for seed in range(2):
        rows = Tensor(np.random.default_rng(seed).normal(0, 1, (1, 12, WIDTH)).astype(np.float32))
        routing = router.set_train(False)(rows, context)
        found.append([routing[key].asnumpy() for key in sorted(routing)])
    assert _alike(*found) == (name in tables.BLIND)


SLOT_KEYS = {
    f"moe.{key}" for key in ("capacity_factor", "drop_order", "min_capacity", "reroute", "eval_capacity_factor")
}
SLOT_KEYS |= {"moe.dropless_block_size"}


@pytest.mark.parametrize("name", ["switch", "expert_choice", "mixture_of_depths", "tree", "dense", "merged", "soft"])
@pytest.mark.parametrize("eval_factor", [None, 2.0])
@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
def test_slots_and_blocks_are_read_as_the_table_says(name, eval_factor, dispatch, monkeypatch):
    if dispatch != "capacity" and name != "switch":
        return  # refused when the layer is built
    moe = {"dispatch": dispatch, "eval_capacity_factor": eval_factor, **USUAL.get(name, {})}
    config = tiny_config(router=name, **moe)
    experts = FeedForwardExperts(config.moe.expert_num, WIDTH, 5, "relu", (0.1, 0.1), InitialWeights(0), mstype.float32)
    with recorded(monkeypatch) as found:
        router = create_router(config, InitialWeights(0), NoiseSlices())
        for training in (True, False):
            create_dispatcher(router, config, training, experts, NONE, LOCAL)
    apart = {"moe.dropless_block_size"}  # an export has blocks even where evaluation here has slots
    if name == "tree":
        apart.add("moe.capacity_factor")  # looked at for a training that has no slots
    assert (SLOT_KEYS - found) - apart == (SLOT_KEYS & unread_keys(config)) - apart


# The tables against whole runs

NOT_ASKED = {
    "optimizer.type",  # there is one
    "train.log_every",  # asked from the second step on
    "train.keep_every_steps",  # asked, as the next, where a checkpoint may be removed
    "train.keep_every_hours",
    "data.accept_changed",  # asked by --resume where the data differ
    "parallel.expert_parallel",  # laws hold it to the other degrees
    "export.key_file",
    "export.max_length",
    "moe.use_shared_expert_gating",  # a law asks for shared experts
    "model.dropout",  # a law keeps it from networks of images
}
NETWORKS = {
    "decoder": {"moe": {"expert_num": 4}},
    "dense decoder": {},
    "vision": {"model": {"type": "vision", "num_layers": 2, "hidden_size": 8}, "moe": {"expert_num": 4, "layers": [1]}},
    "cascade": {"model": {"type": "cascade"}, "cascade": {"stages": [2, 3]}},
}


@pytest.mark.parametrize("network", NETWORKS)
def test_a_run_reads_every_key_that_the_tables_do_not_name(network, tmp_path, monkeypatch):
    """Otherwise a key would be ignored without a word."""
    write_text(tmp_path)
    sections = {"model": {}, "data": {}, **NETWORKS[network]}
    if "type" in sections["model"]:
        sections["data"] = {"path": None, "tokenizer": "byte", "batch_size": 400}
    sections |= {"train": {"steps": 1, "eval_batches": 1}, "schedule": {"warmup_steps": 0}}
    config = run_config(tmp_path, context={"mode": "pynative", "device_target": "CPU"}, **sections)
    with recorded(monkeypatch) as found:
        train(config)
    assert ALL_KEYS - found - unread_keys(config) <= NOT_ASKED


# What is said


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        (
            ["moe.router=top_k", "moe.n_group=4", "moe.topk_group=2"],
            "moe.n_group: 4; moe.router 'top_k' did not read it there: write moe.router.n_group, or leave it out",
        ),
        (
            ["moe.router=gshard", "moe.num_experts_chosen=2", "moe.n_group=4"],
            "moe.n_group: 4; moe.router 'gshard' has no such option: take one of top_k, sigmoid, two_level,",
        ),
        (
            ["moe.slots_per_expert=2"],
            "moe.slots_per_expert: 2; moe.router 'switch' has no such option: take one of soft",
        ),
        (["moe.router=hash", "moe.jitter=0.1"], "moe.jitter: 0.1; moe.router 'hash' does not read it: take none of"),
        (["moe.slice_length=4"], "moe.slice_length: 4; only moe.granularity 'slice' reads it"),
        (["moe.expert_num=1", "moe.record=a"], "moe.record: 'a'; no layer is conditional"),
        (["moe.layers=[]", "moe.replay=a"], "moe.replay: 'a'; no layer is conditional"),
        (
            ["moe.router=gshard", "moe.num_experts_chosen=2", "moe.norm_topk_prob=false"],
            "moe.norm_topk_prob: False; moe.router 'gshard' has no such option: take one of top_k, cosine,",
        ),
        (
            ["moe.router=gshard", "moe.num_experts_chosen=2", "moe.router.second_expert_threshold=0.5"],
            "moe.router.second_expert_threshold: 0.5; moe.router.second_expert 'threshold' reads it",
        ),
    ],
)
def test_what_would_change_the_mathematics_is_refused(overrides, answer):
    with pytest.raises(UserError) as caught:
        build({"moe": {"expert_num": 8}}, overrides)
    assert str(caught.value).startswith(answer)


@pytest.mark.parametrize(
    "overrides",
    [
        ["moe.router=hash", "moe.aux_loss_factor=0", "moe.z_loss_factor=0"],
        ["moe.router=my.own.Router", "moe.router.n_group=4", "moe.jitter=0.1"],
        ["moe.router=sigmoid", "moe.num_experts_chosen=2", "moe.router.n_group=4", "moe.router.topk_group=2"],
    ],
)
def test_what_is_read_or_holds_anyway_is_neither_refused_nor_told(overrides):
    assert notes(build({"moe": {"expert_num": 8}}, overrides), overrides, "CPU") == []


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["moe.expert_num=1", "moe.capacity_factor=2"], "moe.capacity_factor 2.0 (no layer is conditional"),
        (["moe.dispatch=dropless", "moe.drop_order=random"], "moe.drop_order random (moe.dispatch 'dropless' drops no"),
        (
            ["moe.router=hash", "moe.aux_loss_factor=0.5"],
            "moe.aux_loss_factor 0.5 (moe.router 'hash' has no such loss)",
        ),
        (
            ["vision.classes=3", "cascade.threshold=0.5"],
            "vision.classes 3, cascade.threshold 0.5 (model.type",
        ),
        (["model.position=learned", "model.theta=5"], "model.theta 5.0 (only model.position 'rotary' reads it)"),
        (["schedule.type=constant", "schedule.lr_end=0"], "schedule.lr_end 0.0 (schedule.type 'constant'"),
        (["train.init_loss_scale=8"], "train.init_loss_scale 8.0 (only model.compute_dtype 'float16' reads it)"),
        (
            ["parallel.comm_fusion={allreduce: auto}"],
            "parallel.comm_fusion {'allreduce': 'auto'} (the job runs on one device",
        ),
        (
            ["model.type=vision", "context.fused_operators=false"],
            "context.fused_operators False (only networks of text",
        ),
        (["model.type=vision", "model.num_heads=2"], "model.num_heads 2 (model.type 'vision' does not use it)"),
        (
            ["model.type=cascade", "moe.expert_num=1", "model.norm=layernorm"],
            "model.norm layernorm (model.type 'cascade'",
        ),
    ],
)
def test_what_a_shared_file_may_carry_is_told_in_one_line(overrides, told):
    (line,) = notes(build({"moe": {"expert_num": 8}}, overrides), overrides, "CPU")
    assert line.startswith("note: keys without effect here: ") and told in line and line.isprintable()


def test_an_override_that_another_replaces_is_told():
    overrides = ["train.steps=5", "train.seed=3", "train.steps=7", "train.seed=3"]
    assert notes(build({}, overrides), overrides, "CPU") == [
        "note: override train.steps is given 2 times; the last value is used: 7"
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_carry_nothing_without_effect(path):
    config = load(path)
    target = config.context.device_target
    assert notes(config, (), "CPU" if target == "auto" else target) == []


def test_evaluation_and_export_tell_what_only_training_reads():
    overrides = ["train.steps=5", "data.batch_size=8", "export.max_length=9", "optimizer.beta1=0.5", "moe.jitter=0.5"]
    config = build({"moe": {"expert_num": 4}}, overrides)
    wanted = "train.steps 5, export.max_length 9, optimizer.beta1 0.5, moe.jitter 0.5 (an evaluation does not read it)"
    assert notes_of_checkpoint(config, overrides) == [f"note: keys without effect here: {wanted}"]
    wanted = "train.steps 5, optimizer.beta1 0.5, moe.jitter 0.5 (an export does not read it)"
    assert notes_of_checkpoint(config, overrides, exports=True) == [f"note: keys without effect here: {wanted}"]
    assert notes_of_checkpoint(config, ["data.batch_size=8", "moe.eval_capacity_factor=2"]) == []


def test_a_checkpoint_of_earlier_times_is_read():
    """Its file may hold keys that had no effect; an override that names one is refused as everywhere."""
    tree = {"moe": {"router": "top_k", "expert_num": 8, "n_group": 4}}
    config = build(tree, ["train.steps=5"], inherited=True)
    assert notes(config, (), "CPU") == [] == notes_of_checkpoint(config)
    with pytest.raises(UserError, match=r"^moe\.n_group: 2; moe\.router 'top_k' did not read it there"):
        build(tree, ["moe.n_group=2"], inherited=True)


def test_a_run_that_had_a_key_without_effect_resumes_without_it():
    from switchyard.training.resume import check_resumable

    old = build({"moe": {"router": "top_k", "expert_num": 8, "n_group": 4}}, inherited=True)
    check_resumable(old, build({"moe": {"router": "top_k", "expert_num": 8}}))
    with pytest.raises(UserError, match=r"^moe\.expert_num: 4"):
        check_resumable(old, build({"moe": {"router": "top_k", "expert_num": 4}}))
