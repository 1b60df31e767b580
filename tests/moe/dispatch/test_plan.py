"""Plans: hand-typed scenarios of a few tokens, the laws that hold for any routing, and the drop-rate law."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mindspore import Tensor
from mindspore import dtype as mstype
from oracles.capacity_law import drop_rate, slots

from switchyard.moe.dispatch import plan
from switchyard.moe.dispatch.onehot import OneHotPlan
from switchyard.moe.dispatch.plan import BlockPlan, CapacityPlan, block_size, capacity

NOWHERE = 3  # with three experts, expert 3 is where padding goes


def _read(plan: dict) -> dict[str, np.ndarray]:
    """A Plan with -1 where a slot is empty or a choice has no slot."""
    plan = {name: value.asnumpy() for name, value in plan.items()}
    slots, choices = plan["dispatch_index"].shape[1], plan["combine_index"].shape[1]
    np.testing.assert_array_equal(plan["kept_mask"], plan["combine_index"] < slots)
    return {
        "slots": np.where(plan["dispatch_index"] < choices, plan["dispatch_index"], -1),
        "combine_index": np.where(plan["kept_mask"] > 0, plan["combine_index"], -1),
        "block_expert": plan.get("block_expert"),
    }


def _capacity_plan(experts, gates, factor, order, of=3):
    experts, gates = np.array(experts, np.int32), np.array(gates, np.float32)
    cell = CapacityPlan(of, experts.shape[-1], factor, order)
    return _read(cell(Tensor(experts[None]), Tensor(gates[None])))


def _block_plan(experts, block, of=3):
    experts = np.array(experts, np.int32)
    return _read(BlockPlan(of, experts.shape[-1], block)(Tensor(experts[None]), Tensor(np.ones(experts.shape)[None])))


# Three tokens, three experts. Choices are numbered n * K + k; slots are listed expert by expert, -1 = empty.


def test_capacity_one_choice_by_position(pynative):
    """Tokens 0 and 1 want expert 0, which has one slot: token 0 stands first and gets it."""
    plan = _capacity_plan([[0], [0], [2]], [[0.5], [0.9], [0.7]], 1.0, "position")
    np.testing.assert_array_equal(plan["slots"], [[0, -1, 2]])
    np.testing.assert_array_equal(plan["combine_index"], [[0, -1, 2]])


def test_capacity_one_choice_by_probability(pynative):
    """The same, but token 1 is surer: it gets the slot."""
    plan = _capacity_plan([[0], [0], [2]], [[0.5], [0.9], [0.7]], 1.0, "probability")
    np.testing.assert_array_equal(plan["slots"], [[1, -1, 2]])
    np.testing.assert_array_equal(plan["combine_index"], [[-1, 0, 2]])


@pytest.mark.parametrize(
    ("factor", "order", "slot_list", "combine_index"),
    [
        # One slot each. First choices: 0 and 2 sit, 4 finds expert 1 full. Second choices: only 5 finds room.
        (0.5, "position", [0, 2, 5], [0, -1, 1, -1, -1, 2]),
        # By gate: 4 (.8) takes expert 1, 0 (.6) takes expert 0, 2, 3 and 1 come too late, 5 (.1) is alone.
        (0.5, "probability", [0, 4, 5], [0, -1, -1, -1, 1, 2]),
        # Two slots each. Expert 1 is wanted by first choices 2 and 4 and by second choice 1, which loses.
        (1.0, "position", [0, 3, 2, 4, 5, -1], [0, -1, 2, 1, 3, 4]),
        (1.0, "probability", [0, 3, 4, 2, 5, -1], [0, -1, 3, 1, 2, 4]),
        # Three slots each: C = N, nobody loses.
        (2.0, "position", [0, 3, -1, 2, 4, 1, 5, -1, -1], [0, 5, 3, 1, 4, 6]),
        (9.0, "position", [0, 3, -1, 2, 4, 1, 5, -1, -1], [0, 5, 3, 1, 4, 6]),
    ],
)
def test_capacity_two_choices(factor, order, slot_list, combine_index, pynative):
    experts = [[0, 1], [1, 0], [1, 2]]
    gates = [[0.6, 0.3], [0.5, 0.4], [0.8, 0.1]]
    plan = _capacity_plan(experts, gates, factor, order)
    np.testing.assert_array_equal(plan["slots"], [slot_list])
    np.testing.assert_array_equal(plan["combine_index"], [combine_index])


@pytest.mark.parametrize("order", ["position", "token", "probability", "batch_priority"])
def test_integer_sort_keys_give_the_plan_of_float32_ones(order, monkeypatch, pynative):
    rng = np.random.default_rng(1)
    experts, gates = rng.integers(0, 4, (16, 2)), rng.random((16, 2))
    usual = _capacity_plan(experts, gates, 0.5, order)
    monkeypatch.setattr(plan, "EXACT_FLOAT", 1)  # every key is beyond
    assert plan.key_type(2) == mstype.int32
    for name, array in _capacity_plan(experts, gates, 0.5, order).items():
        np.testing.assert_array_equal(array, usual[name])


def test_keys_that_float32_does_not_hold_are_sorted(pynative):
    """(7000 + 1) experts * 2400 choices is above 2^24; neighbours of the last experts would be one number."""
    experts = np.array([6999 - np.arange(2400) % 7]).T
    found = _capacity_plan(experts, np.ones(experts.shape), 7000.0, "position", 7000)["slots"][0].reshape(7000, -1)
    for expert in range(6993, 7000):
        np.testing.assert_array_equal(found[expert][found[expert] >= 0], np.flatnonzero(experts[:, 0] == expert))


@pytest.mark.parametrize("order", ["position", "probability"])
def test_capacity_padding_takes_no_slot(order, pynative):
    """Token 0 is padding: expert 0's only slot is left to token 1."""
    plan = _capacity_plan([[NOWHERE], [0], [0]], [[0.0], [0.9], [0.8]], 1.0, order)
    np.testing.assert_array_equal(plan["slots"], [[1, -1, -1]])
    np.testing.assert_array_equal(plan["combine_index"], [[-1, 0, -1]])


def test_capacity_equal_gates_go_by_position(pynative):
    plan = _capacity_plan([[1], [1], [1]], [[0.5], [0.5], [0.5]], 2.0, "probability")
    np.testing.assert_array_equal(plan["slots"], [[-1, -1, 0, 1, -1, -1]])


def test_capacity_groups_fill_their_own_slots(pynative):
    """Two groups want the same expert: each has its slot of it."""
    experts = np.array([[[0], [1], [1]], [[0], [0], [2]]], np.int32)
    plan = _read(CapacityPlan(3, 1, 1.0, "position")(Tensor(experts), Tensor(np.ones((2, 3, 1), np.float32))))
    np.testing.assert_array_equal(plan["slots"], [[0, 1, -1], [0, -1, 2]])
    np.testing.assert_array_equal(plan["combine_index"], [[0, 1, -1], [0, -1, 2]])


def test_blocks_of_two(pynative):
    """Expert 0 has one row, 1 has three, 2 has one: 1, 2 and 1 blocks, and two blocks more than this routing needs."""
    plan = _block_plan([[1], [0], [1], [1], [2]], 2)
    np.testing.assert_array_equal(plan["block_expert"], [[0, 1, 1, 2, 2, 2]])
    np.testing.assert_array_equal(plan["slots"], [[1, -1, 0, 2, 3, -1, 4, -1, -1, -1, -1, -1]])
    np.testing.assert_array_equal(plan["combine_index"], [[2, 0, 3, 4, 6]])


def test_blocks_balanced(pynative):
    plan = _block_plan([[2], [1], [0], [0], [1], [2]], 2)
    np.testing.assert_array_equal(plan["block_expert"], [[0, 1, 2, 2, 2, 2]])
    np.testing.assert_array_equal(plan["slots"], [[2, 3, 1, 4, 0, 5, -1, -1, -1, -1, -1, -1]])
    np.testing.assert_array_equal(plan["combine_index"], [[4, 2, 0, 1, 3, 5]])


@pytest.mark.parametrize("expert", [0, 1, 2])
def test_blocks_all_on_one_expert(expert, pynative):
    plan = _block_plan([[expert]] * 4, 2)
    np.testing.assert_array_equal(plan["block_expert"], [[expert, expert, 2, 2, 2]])
    np.testing.assert_array_equal(plan["slots"], [[0, 1, 2, 3, -1, -1, -1, -1, -1, -1]])
    np.testing.assert_array_equal(plan["combine_index"], [[0, 1, 2, 3]])


def test_blocks_two_choices_with_padding(pynative):
    """Row 1 is padding: its choices 2 and 3 have no slot, and nobody waits for them."""
    plan = _block_plan([[0, 1], [NOWHERE, NOWHERE], [1, 2]], 2)
    np.testing.assert_array_equal(plan["block_expert"], [[0, 1, 2, 2, 2, 2]])
    np.testing.assert_array_equal(plan["slots"], [[0, -1, 4, 1, 5, -1, -1, -1, -1, -1, -1, -1]])
    np.testing.assert_array_equal(plan["combine_index"], [[0, 3, -1, -1, 2, 4]])


def test_blocks_of_one_are_the_choices(pynative):
    """Nothing is sorted: slot c is choice c, and the block's expert is the choice's."""
    plan = _block_plan([[2, 0], [NOWHERE, NOWHERE], [1, 2]], 1)
    np.testing.assert_array_equal(plan["slots"], [[0, 1, -1, -1, 4, 5]])
    np.testing.assert_array_equal(plan["combine_index"], [[0, 1, -1, -1, 4, 5]])
    np.testing.assert_array_equal(plan["block_expert"][0, [0, 1, 4, 5]], [2, 0, 1, 2])
    assert plan["block_expert"].max() < 3  # a legal expert even for padding


@pytest.mark.parametrize(
    ("rows", "experts", "choices", "factor", "slots_wanted"),
    [
        (1024, 8, 1, 1.25, 160),
        (1024, 8, 2, 1.0, 256),
        (100, 10, 1, 1.1, 11),  # 100 * 1.1 / 10 is 11.000000000000002 in floating point
        (3, 8, 1, 1.0, 1),  # never none
        (3, 8, 1, 1e-9, 1),
        (6, 4, 2, 99.0, 6),  # never more than rows: a row chooses an expert once
        (9, 4, 3, 0.6, 5),
    ],
)
def test_capacity_formula(rows, experts, choices, factor, slots_wanted):
    assert capacity(rows, experts, choices, factor) == slots_wanted


@given(
    rows=st.integers(1, 5000),
    experts=st.integers(1, 300),
    choices=st.integers(1, 4),
    hundredths=st.integers(1, 400),
)
def test_capacity_is_the_exact_ceiling(rows, experts, choices, hundredths):
    wanted = min(rows, slots(rows * choices, experts, hundredths / 100))
    assert capacity(rows, experts, choices, hundredths / 100) == wanted


@given(rows=st.integers(1, 10**6), experts=st.integers(1, 512), choices=st.integers(1, 8))
def test_block_size_is_a_power_of_two_in_range(rows, experts, choices):
    block = block_size(rows, experts, choices)
    assert block & (block - 1) == 0 and 1 <= block <= 128
    assert (block == 1) == (rows * choices <= experts)


class _Plans:
    """Plans of one shape, so that kernels are made once and only the contents vary."""

    groups, rows, experts, choices, block = 2, 10, 4, 2, 4

    def __init__(self):
        self.capacity = {
            order: CapacityPlan(self.experts, self.choices, 0.8, order) for order in ("position", "probability")
        }
        self.one_hot = {
            order: OneHotPlan(self.experts, self.choices, 0.8, order) for order in ("position", "probability")
        }
        self.blocks = BlockPlan(self.experts, self.choices, self.block)
        self.slots = capacity(self.rows, self.experts, self.choices, 0.8)


@pytest.fixture(scope="module")
def plans():
    return _Plans()


@st.composite
def routings(draw):
    """(experts [2, 10, 2], gates): distinct experts of a row, gates with ties, some rows padded."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    skew = draw(st.sampled_from([0.0, 1.0, 5.0]))  # 0: uniform; 5: nearly everyone wants expert 0
    scores = random.gumbel(size=(2, 10, 4)) - skew * np.arange(4)
    experts = np.argsort(-scores, -1)[..., :2].astype(np.int32)
    gates = draw(st.sampled_from([1, 4, 1000])) * random.random((2, 10, 2))
    gates = (np.ceil(gates) / 1000).astype(np.float32)
    padded = random.random((2, 10)) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    experts[padded], gates[padded] = 4, 0
    return experts, gates


def _check_inverse(plan, experts):
    """Slots and choices point at each other, and no choice sits twice."""
    for g in range(len(experts)):
        seated = {choice: slot for slot, choice in enumerate(plan["slots"][g]) if choice >= 0}
        assert len(seated) == (plan["slots"][g] >= 0).sum()
        assert seated == {choice: slot for choice, slot in enumerate(plan["combine_index"][g]) if slot >= 0}


@pytest.mark.parametrize("order", ["position", "probability"])
def test_capacity_plan_laws(order, plans, pynative):
    """Kept = min(count, C) of each expert, in that expert's slots; the same seats as the one-hot form finds."""

    @given(routings())
    def holds(routing):
        experts, gates = routing
        plan = _read(plans.capacity[order](Tensor(experts), Tensor(gates)))
        _check_inverse(plan, experts)
        flat = experts.reshape(2, -1)
        for g in range(2):
            for expert in range(4):
                seats = plan["slots"][g, expert * plans.slots : (expert + 1) * plans.slots]
                asked = (flat[g] == expert).sum()
                assert (seats >= 0).sum() == min(asked, plans.slots)
                assert all(flat[g, choice] == expert for choice in seats if choice >= 0)
        dispatch = plans.one_hot[order](Tensor(experts), Tensor(gates))[0].asnumpy()
        wanted = np.zeros_like(dispatch).reshape(2, 10, -1)
        for g, slot in np.argwhere(plan["slots"] >= 0):
            wanted[g, plan["slots"][g, slot] // 2, slot] = 1
        np.testing.assert_array_equal(dispatch.reshape(2, 10, -1), wanted)

    holds()


def test_block_plan_laws(plans, pynative):
    """Every real choice has a slot, in a block of its expert."""

    @given(routings())
    def holds(routing):
        experts, gates = routing
        plan = _read(plans.blocks(Tensor(experts), Tensor(gates)))
        _check_inverse(plan, experts)
        np.testing.assert_array_equal(plan["combine_index"] >= 0, experts.reshape(2, -1) < 4)
        of_slot = np.repeat(plan["block_expert"], plans.block, 1)
        for g, slot in np.argwhere(plan["slots"] >= 0):
            assert experts.reshape(2, -1)[g, plan["slots"][g, slot]] == of_slot[g, slot]

    holds()


@pytest.mark.parametrize(("experts", "factor"), [(8, 1.0), (8, 1.1), (64, 1.0)])
def test_drop_rate_law(experts, factor, pynative):
    """Uniform random routing of 1024 rows drops what the binomial says: 3.30 %, 0.46 %, 9.84 %."""
    draws = 64
    random = np.random.default_rng(experts)
    choices = random.integers(0, experts, (draws, 1024, 1)).astype(np.int32)
    plan = CapacityPlan(experts, 1, factor, "position")(
        Tensor(choices), Tensor(np.ones(choices.shape, np.float32))
    )  # a draw is a group
    dropped = 1 - plan["kept_mask"].asnumpy().mean(1)  # [draws]
    error = dropped.std(ddof=1) / np.sqrt(draws)
    assert abs(dropped.mean() - drop_rate(1024, experts, factor)) < 4 * error
    assert 0 < error < 0.1 * dropped.mean() + 5e-4  # the test can tell these rates apart
