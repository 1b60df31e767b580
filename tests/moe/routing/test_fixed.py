"""Routers that are not learned, and the gates by task: hand-typed tables, ids and choices."""

import numpy as np
import pytest
from mindspore import Tensor
from mindspore import dtype as mstype
from oracles.tiny import tiny_config

from switchyard.errors import UserError
from switchyard.moe.routing import create_router
from switchyard.moe.routing.fixed import balance_tables, table_by_counts
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.noise import NoiseSlices

VOCABULARY = 10


def _router(name, seed=0, choices=1, **moe):
    config = tiny_config(width=3, router=name, num_experts_chosen=choices, **moe)
    slices = NoiseSlices()
    router = create_router(config, InitialWeights(seed), slices, VOCABULARY, has_tasks=True)
    return router.set_train(False)


def _route(router, tokens=((0, 1, 2),), tasks=((0, 0, 0),), valid=((1, 1, 1),), rows=None, noise=None):
    """Routing of three rows, as arrays."""
    context = {
        "valid": Tensor(np.array(valid, np.float32)),
        "token_ids": Tensor(np.array(tokens, np.int32)),
        "task_ids": Tensor(np.array(tasks, np.int32)),
        "noise": None if noise is None else Tensor(np.array(noise, np.float32)),
    }
    rows = np.ones((1, 3, 3)) if rows is None else rows
    return {name: value.asnumpy() for name, value in router(Tensor(np.array(rows, np.float32)), context).items()}


def test_hash_looks_the_token_up(pynative):
    """Three tokens, the last of them padding: experts 2 and 0, gate 1, nothing to balance."""
    router = _router("hash")
    router.table.set_data(Tensor([2, 3, 3, 3, 3, 0, 1, 1, 1, 1], mstype.int32))
    routing = _route(router, tokens=[[0, 5, 6]], valid=[[1, 1, 0]])
    np.testing.assert_array_equal(routing["expert_index"], [[[2], [0], [4]]])
    np.testing.assert_array_equal(routing["gates"], [[[1], [1], [0]]])
    np.testing.assert_array_equal(routing["expert_mask"], [[[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]])
    np.testing.assert_array_equal(routing["probabilities"][0, :2], [[0, 0, 1, 0], [1, 0, 0, 0]])
    assert not routing["logits"].any()


def test_balanced_table_gives_every_expert_as_many_ids():
    table = _router("hash", expert_num=4).table.asnumpy()
    assert sorted(np.bincount(table, minlength=4)) == [2, 2, 3, 3]  # 10 ids, 4 experts
    random = np.concatenate([_router("hash", seed, hash_table="random").table.asnumpy() for seed in range(50)])
    assert random.min() == 0 and random.max() == 3


def test_table_by_counts_fills_the_emptiest():
    """By hand, two experts: 9 to the first, 5 and then 4 to the second, 3 to the first of the equal, 1 to the other."""
    table = table_by_counts(np.array([3, 9, 1, 5, 4]), 2, np.arange(5))
    assert table.tolist() == [0, 0, 1, 1, 1] and table.dtype == np.int32


def test_ids_that_never_occur_are_shared_out_too():
    table = table_by_counts(np.array([7, 0, 0, 0, 0, 0, 0]), 2, np.arange(7))
    assert table.tolist() == [0, 1, 1, 1, 1, 1, 1]  # all that is left goes to the emptier
    assert np.bincount(table_by_counts(np.zeros(9, np.int64), 3, np.arange(9))).tolist() == [3, 3, 3]


def test_a_table_by_counts_is_more_even_than_one_by_ids():
    counts = (1e6 / np.arange(1, 257) ** 1.1).astype(np.int64)  # as words of a text
    router = _hash_of(256, "balanced")
    by_ids = np.bincount(router.table.asnumpy(), counts, 4)
    balance_tables(router, lambda: counts)
    by_counts = np.bincount(router.table.asnumpy(), counts, 4)
    assert by_counts.max() / by_counts.mean() < 1.02 < by_ids.max() / by_ids.mean()


def test_a_random_table_is_left_alone_and_counts_nothing():
    router = _hash_of(256, "random")
    before = router.table.asnumpy().copy()
    balance_tables(router, lambda: pytest.fail("nobody asked"))
    np.testing.assert_array_equal(router.table.asnumpy(), before)


def _hash_of(size, table):
    config = tiny_config(width=3, router="hash", hash_table=table)
    return create_router(config, InitialWeights(0), NoiseSlices(), size)


@pytest.mark.parametrize("name", ["hash", "lsh", "random", "random_in_group", "task"])
def test_tables_follow_the_seed_and_are_never_trained(name):
    one, same, other = (_router(name, seed) for seed in (0, 0, 1))
    assert one.trainable_params() == [] and len(list(one.get_parameters())) == 1
    (one,), (same,), (other,) = (list(router.get_parameters()) for router in (one, same, other))
    np.testing.assert_array_equal(one.asnumpy(), same.asnumpy())
    assert name == "task" or np.any(one.asnumpy() != other.asnumpy())


def test_hyperplanes_number_the_cells(pynative):
    """Planes through the axes: bit 0 is x > 0, bit 1 is y > 0."""
    router = _router("lsh")
    router.planes.set_data(Tensor([[1, 0], [0, 1], [0, 0]], mstype.float32))
    rows = [[[1, -1, 9], [-0.1, 3, 9], [2, 2, -9]]]
    np.testing.assert_array_equal(_route(router, rows=rows)["expert_index"], [[[1], [2], [3]]])


def test_hyperplanes_depend_on_direction_alone(pynative):
    router, rows = _router("lsh", expert_num=8), np.random.default_rng(0).normal(0, 1, (1, 50, 3))
    context = {"valid": Tensor(np.ones((1, 50), np.float32))}
    near, far = (router(Tensor((rows * s).astype(np.float32)), context)["expert_index"].asnumpy() for s in (0.01, 100))
    np.testing.assert_array_equal(near, far)
    assert len(np.unique(near)) >= 6


@pytest.mark.parametrize("experts", [3, 6])
@pytest.mark.parametrize("name", ["lsh", "tree"])
def test_cells_are_powers_of_two(name, experts):
    with pytest.raises(UserError, match=rf"^moe\.expert_num: {experts}; moe\.router '{name}' needs a power of two$"):
        tiny_config(router=name, expert_num=experts)


def test_random_is_fixed_for_each_token(pynative):
    router = _router("random")
    first, again = (_route(router.set_train(mode), tokens=[[4, 4, 7]])["expert_index"] for mode in (True, False))
    np.testing.assert_array_equal(first, again)
    assert first[0, 0, 0] == first[0, 1, 0] == router.table.asnumpy()[4]


def test_random_is_drawn_at_each_step_of_training(pynative):
    """Noise 0.30 of 4 experts is expert 1, 0.99 is 3, and 1 - 2^-24 is 3 too; at evaluation the table decides."""
    router = _router("random", random_draw="step").set_train(True)
    noise = np.zeros((1, 3, 3))
    noise[0, :, 0] = [0.30, 0.99, 1 - 2.0**-24]
    np.testing.assert_array_equal(_route(router, noise=noise)["expert_index"], [[[1], [3], [3]]])
    table = router.table.asnumpy()
    np.testing.assert_array_equal(_route(router.set_train(False))["expert_index"][0, :, 0], table[[0, 1, 2]])


def test_random_in_group_stays_in_the_group_of_the_domain(pynative):
    router = _router("random_in_group", expert_num=6, n_group=3)
    tables = router.table.asnumpy().reshape(3, VOCABULARY)
    for group, table in enumerate(tables):
        assert sorted(np.bincount(table, minlength=6)[2 * group : 2 * group + 2]) == [5, 5]
    routing = _route(router, tokens=[[1, 1, 8]], tasks=[[0, 2, 4]])  # domain 4 is group 1
    np.testing.assert_array_equal(routing["expert_index"][0, :, 0], [tables[0, 1], tables[2, 1], tables[1, 8]])


def test_task_names_its_experts(pynative):
    router = _router("task", choices=2, task_num=2, task_experts=[[3, 1], [0, 2]])
    routing = _route(router, tasks=[[1, 0, 0]], valid=[[1, 1, 0]])
    np.testing.assert_array_equal(routing["expert_index"], [[[0, 2], [3, 1], [4, 4]]])
    np.testing.assert_array_equal(routing["gates"], [[[0.5, 0.5], [0.5, 0.5], [0, 0]]])
    np.testing.assert_array_equal(routing["expert_mask"], [[[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]]])


def test_tasks_take_experts_in_turn():
    router = _router("task", choices=2, task_num=3)
    np.testing.assert_array_equal(router.table.asnumpy(), [[0, 1], [2, 3], [0, 1]])


def test_multi_gate_has_a_gate_for_each_task(pynative):
    """Task 0 reads the first two inputs as logits, task 1 the same ones exchanged."""
    router = _router("multi_gate", expert_num=2, choices=2, task_num=2)
    router.weight.set_data(Tensor([[1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0]], mstype.float32))
    rows = [[[np.log(0.8), np.log(0.2), 5]] * 3]
    routing = _route(router, rows=rows, tasks=[[0, 1, 1]], valid=[[1, 1, 0]])
    np.testing.assert_allclose(routing["probabilities"][0, :2], [[0.8, 0.2], [0.2, 0.8]], atol=1e-6)
    np.testing.assert_array_equal(routing["expert_index"], [[[0, 1], [1, 0], [2, 2]]])
    np.testing.assert_allclose(routing["gates"], [[[0.8, 0.2], [0.8, 0.2], [0, 0]]], atol=1e-6)


@pytest.mark.parametrize("name", ["random_in_group", "task", "multi_gate"])
def test_tasks_are_asked_for_in_one_line(name):
    with pytest.raises(UserError, match=rf"^moe\.router: '{name}'; chooses by task id, which this network does not"):
        create_router(tiny_config(router=name), InitialWeights(0), vocab_size=5)


@pytest.mark.parametrize("name", ["hash", "random", "random_in_group"])
def test_tokens_are_asked_for_in_one_line(name):
    with pytest.raises(UserError, match=rf"^moe\.router: '{name}'; chooses by token id, which this network does not"):
        create_router(tiny_config(router=name), InitialWeights(0), has_tasks=True)


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"router": "hash", "num_experts_chosen": 2}, "moe.num_experts_chosen: 2; moe.router 'hash' chooses 1"),
        ({"router": "random_in_group", "n_group": 3}, r"moe.router.n_group: 3; must divide moe.expert_num \(4\)"),
        (
            {"router": "task", "task_num": 2, "task_experts": [[0]]},
            "moe.router.task_experts: .*must name a set for each",
        ),
        ({"router": "task", "task_experts": [[4]]}, "moe.router.task_experts: .*numbered from 0 below"),
        ({"router": "task", "task_experts": [[0, 1]]}, "moe.router.task_experts: .*1.* different experts"),
        (
            {"router": "random", "consistency_loss_factor": 1},
            "moe.router.consistency_loss_factor: 1.0; needs moe.router.random_draw 'step'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(moe, message):
    with pytest.raises(UserError, match=f"^{message}"):
        tiny_config(**moe)
