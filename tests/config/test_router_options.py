"""Options of routers: written as they should be, as they were, by overrides, and wrong."""

import copy
import pickle

import pytest
import yaml

from switchyard.config import build, notes
from switchyard.config.old_keys import LATER, MOVED
from switchyard.config.router_options import OPTIONS, RouterChoice, readers
from switchyard.errors import UserError
from switchyard.moe.routing import known_routers

CHANGED = {  # option -> (a value that is not the default, what it asks for besides)
    "norm_topk_prob": (False, {}),
    "hash_table": ("random", {}),
    "random_draw": ("step", {}),
    "consistency_loss_factor": (0.5, {"random_draw": "step"}),
    "second_expert": ("sampling", {}),
    "second_expert_threshold": (0.5, {"second_expert": "threshold"}),
    "topk_bias_update_rate": (0.0, {}),
    "topk_group": (2, {"n_group": 4}),
    "routed_scaling_factor": (2.0, {}),
    "sinkhorn_iterations": (3, {}),
    "n_group": (4, {"topk_group": 2}),
    "task_num": (3, {}),
    "task_experts": ([[0, 3]], {}),
    "slots_per_expert": (3, {}),
}
SIGMOID = {"name": "sigmoid", "n_group": 4, "topk_group": 2}
CASES = [(name, option) for option in CHANGED for name in readers(option) if option not in LATER.get(name, ())]


def _moe(router: str) -> dict:
    one = router in ("switch", "hash", "random", "random_in_group")
    return {"expert_num": 8, "num_experts_chosen": 1 if one else 2}


def _written(config):
    return config.moe.router.written()


def test_every_key_that_moved_is_an_option_of_a_router():
    assert {option for _, option in CASES} == set(MOVED) == set(CHANGED)
    for option, default in MOVED.items():
        assert {OPTIONS[name].model_fields[option].default for name in readers(option)} == {default}


def test_every_shipped_router_has_the_options_class_that_the_configuration_checks():
    assert {name: router.Options for name, router in known_routers().items()} == dict(sorted(OPTIONS.items()))


@pytest.mark.parametrize(("router", "option"), CASES)
def test_the_old_form_means_the_new_form(router, option):
    value, beside = CHANGED[option]
    options = {"n_group": 2} if router == "two_level" else {}
    options |= {key: given for key, given in beside.items() if key in OPTIONS[router].model_fields} | {option: value}
    new = build({"moe": {**_moe(router), "router": {"name": router, **options}}})
    assert new.moe.router.given()[option] == value
    moe = {**_moe(router), "router": router}
    overrides = [f"{key}={yaml.safe_dump(given, default_flow_style=True)}" for key, given in options.items()]
    overrides = [text.removesuffix("\n").removesuffix("\n...") for text in overrides]
    for old in (
        build({"moe": {**moe, **options}}),
        build({"moe": {**moe, **options}}, inherited=True),
        build({"moe": moe}, [f"moe.{text}" for text in overrides]),
        build({"moe": _moe(router)}, [*(f"moe.router.{text}" for text in overrides), f"moe.router={router}"]),
        build(yaml.safe_load(new.to_yaml())),
    ):
        assert old == new and old.to_yaml() == new.to_yaml()


def test_the_old_form_is_told_with_the_new_one():
    moe = {"router": "gshard", "expert_num": 4, "num_experts_chosen": 2}
    line = (
        "note: moe.second_expert: the next release reads router options in moe.router only: "
        "moe.router={name: gshard, second_expert: sampling}"
    )
    override = ["moe.second_expert=sampling"]
    assert notes(build({"moe": moe}, override), (), "CPU") == [line]
    assert notes(build({"moe": moe | {"second_expert": "sampling"}}), (), "CPU") == [line]
    assert notes(build({"moe": moe | {"second_expert": "all"}}, override, inherited=True), (), "CPU") == [line]
    assert notes(build({"moe": moe | {"second_expert": "sampling"}}, inherited=True), (), "CPU") == []


def test_a_checkpoint_with_every_key_in_the_old_form_is_read_without_a_word():
    config = build({"moe": {"expert_num": 4, "router": "hash", **MOVED}}, inherited=True)
    assert config == build({"moe": {"expert_num": 4, "router": "hash"}})
    assert notes(config, (), "CPU") == []


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("moe.router=sigmoid", SIGMOID),
        ("moe.router=two_level", {"name": "two_level"}),
        ("moe.router.topk_group=1", SIGMOID | {"topk_group": 1}),
        ("moe.n_group=2", SIGMOID | {"n_group": 2}),
        ("moe.router={name: sigmoid, n_group: 2}", {"name": "sigmoid", "n_group": 2}),
        ("moe.router={name: two_level, n_group: 2}", {"name": "two_level", "n_group": 2}),
    ],
)
def test_an_override_of_the_router(override, wanted):
    moe = {"expert_num": 8, "num_experts_chosen": 2}
    if wanted == {"name": "two_level"}:  # which asks for groups: those of sigmoid are gone
        with pytest.raises(UserError, match=r"^moe\.router\.n_group: 1; two_level needs 2 or more"):
            build({"moe": moe | {"router": SIGMOID}}, [override])
        return
    assert build({"moe": moe | {"router": SIGMOID}}, [override]) == build({"moe": moe | {"router": wanted}})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["moe.router.n_grup=2"],
            "moe.router.n_grup: 2; unknown option of moe.router 'sigmoid'; did you mean 'n_group'?",
        ),
        (["moe.router.zeal=2"], "moe.router.zeal: 2; unknown option of moe.router 'sigmoid'; its options: norm"),
        (
            ["moe.router.slots_per_expert=2"],
            "moe.router.slots_per_expert: 2; moe.router 'sigmoid' has no such option: take one of soft",
        ),
        (["moe.router.n_group=many"], "moe.router.n_group: 'many'; input should be a valid integer"),
        (["moe.router.n_group=true"], "moe.router.n_group: True; input should not be true or false"),
        (["moe.router.n_group=0"], "moe.router.n_group: 0; input should be greater than or equal to 1"),
        (["moe.n_group=0"], "moe.router.n_group: 0; input should be greater than or equal to 1"),
        (["moe.router.n_group=3"], "moe.router.n_group: 3; must divide the experts (8)"),
        (["moe.router.n_group=.nan"], "moe.router.n_group: nan; input should be a finite number"),
        (["moe.router={n_group: 2}"], "moe.router: {'n_group': 2}; input should be a valid string, or a mapping such"),
        (["moe.router=7"], "moe.router: 7; input should be a valid string, or a mapping such"),
        (["moe.router=[a]"], "moe.router: ['a']; input should be a valid string, or a mapping such"),
        (
            ["moe.router.n_group=2", "moe.n_group=4"],
            "moe.n_group: 4; moe.router.n_group is 2: leave moe.n_group out",
        ),
        (
            ["moe.router={name: sigmoid, n_group: 2}", "moe.n_group=4"],
            "moe.n_group: 4; moe.router.n_group is 2: leave moe.n_group out",
        ),
    ],
)
def test_a_wrong_option_is_one_line(overrides, message):
    moe = {"expert_num": 8, "num_experts_chosen": 2, "router": "sigmoid"}
    with pytest.raises(UserError) as caught:
        build({"moe": moe}, overrides)
    assert str(caught.value).startswith(message) and str(caught.value).isprintable()


def test_a_file_that_says_both_forms_must_say_the_same():
    moe = {"expert_num": 8, "num_experts_chosen": 2, "router": SIGMOID}
    assert build({"moe": moe | {"n_group": 4}}) == build({"moe": moe})
    with pytest.raises(UserError, match=r"^moe\.n_group: 2; moe\.router\.n_group is 4: leave moe\.n_group out"):
        build({"moe": moe | {"n_group": 2}})


def test_building_leaves_the_caller_s_tree_as_it_was():
    tree = {"moe": {"expert_num": 8, "num_experts_chosen": 2, "router": dict(SIGMOID), "n_group": 4}}
    before = copy.deepcopy(tree)
    build(tree, ["moe.router.topk_group=1"])
    assert tree == before


def test_a_choice_is_its_name_and_its_options():
    one = build({"moe": {"expert_num": 8, "num_experts_chosen": 2, "router": SIGMOID}}).moe.router
    assert one == "sigmoid" and f"{one}" == "sigmoid" and {"sigmoid": 3}[one] == 3
    assert one != RouterChoice("sigmoid", OPTIONS["sigmoid"]()) and one != RouterChoice("sigmoid")
    for twin in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert twin == one and twin.options == one.options


def test_a_resumed_run_may_change_the_options_that_it_may_always_change():
    from switchyard.training.resume import changed_keys, check_resumable

    moe = {"expert_num": 8, "num_experts_chosen": 2}
    old = build({"moe": {**moe, "router": "sigmoid", "n_group": 4, "topk_group": 2, **{"hash_table": "balanced"}}})
    check_resumable(old, build({"moe": moe | {"router": SIGMOID}}))
    slower = build({"moe": moe | {"router": SIGMOID | {"topk_bias_update_rate": 0.5}}})
    check_resumable(old, slower)
    assert changed_keys(old, slower) == {"moe.router.topk_bias_update_rate": (0.001, 0.5)}
    for router, said in (
        (SIGMOID | {"n_group": 2}, r"^moe\.router\.n_group: 2; the run was trained with 4"),
        ("top_k", r"^moe\.router: top_k; the run was trained with sigmoid"),
    ):
        with pytest.raises(UserError, match=said):
            check_resumable(old, build({"moe": moe | {"router": router}}))
