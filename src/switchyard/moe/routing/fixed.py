"""Routing that is not learned: by token id, by task, by hyperplanes, or by chance.

A table of choices is drawn by the seed when the model is built and kept as a parameter that is never trained, so it
stands in checkpoints and exports. A choice has the gate 1, or 1 / K each where a row has K.

Legend: G groups, N rows of a group, E experts, K choices of a row, D width, V vocabulary, T tasks, B bits.
"""

import heapq
from collections.abc import Callable

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.moe.routing.base import Router, RouterSetting, register, replay_choices
from switchyard.nn.initializers import InitialWeights


def constant(values: np.ndarray, name: str) -> Parameter:
    """A table that is saved and exported and never trained."""
    return Parameter(Tensor(values), name=name, requires_grad=False)


def balanced_table(size: int, experts: int, random: InitialWeights) -> np.ndarray:
    """An expert for each of `size` ids, every expert as often as any other (one more at most): [size] int32."""
    return (random.permutation(size) % experts).astype(np.int32)


def table_by_counts(counts: np.ndarray, experts: int, shuffled: np.ndarray) -> np.ndarray:
    """Ids shared out so that every expert gets about as many occurrences: counts [V] -> [V] int32.

    The ids go, the most frequent first, to the expert that has the fewest occurrences so far, of several such to
    the one with the fewest ids. Ids of one count come in the order of `shuffled`, a permutation of all ids.
    """
    table = np.zeros(len(counts), np.int32)
    emptiest = [(0, 0, expert) for expert in range(experts)]  # (occurrences, ids, expert), a heap
    for token in shuffled[np.argsort(-counts[shuffled], kind="stable")]:
        load, ids, expert = emptiest[0]
        table[token] = expert
        heapq.heapreplace(emptiest, (load + int(counts[token]), ids + 1, expert))
    return table


def balance_tables(model: nn.Cell, token_counts: Callable[[], np.ndarray]) -> None:
    """Balances the hash tables of a new model by its training text; a trained one brings its tables along.

    Args:
        model: its routers `hash` with `moe.hash_table` balanced get a table each, others are left alone.
        token_counts: how often each id occurs, [V]; asked only where it is needed.
    """
    routers = [cell for _, cell in model.cells_and_names() if isinstance(cell, Hash) and cell.balanced]
    if routers:
        counts = token_counts()
        for router in routers:
            router.balance(counts)


class Assign(nn.Cell):
    """Choices without probabilities -> Routing: the distribution is what was chosen, the logits are zero."""

    def __init__(self, experts: int, choices: int):
        super().__init__()
        self.expert_num, self.share = experts, 1.0 / choices
        self.one_hot = ops.OneHot()
        self.on, self.off = Tensor(1.0, mstype.float32), Tensor(0.0, mstype.float32)

    def construct(self, experts: Tensor, valid: Tensor) -> dict:
        """Experts [G, N, K] int32 and valid [G, N] -> Routing of form "token_choice"."""
        valid = ops.expand_dims(valid, -1)  # [G, N, 1]
        picked = self.one_hot(experts, self.expert_num, self.on, self.off).sum(2)  # [G, N, K, E] -> [G, N, E]
        probabilities = picked * self.share
        experts = ops.where(valid > 0, experts, ops.full_like(experts, self.expert_num))  # E is nowhere
        return {
            "expert_index": experts,
            "gates": ops.ones_like(experts).astype(mstype.float32) * self.share * valid,
            "probabilities": probabilities,
            "logits": ops.zeros_like(probabilities),
            "importance": probabilities,
            "expert_mask": picked * valid,
        }


class FixedRouter(Router):
    """Base of what is not learned: a subclass says which experts, `pick(rows, context) -> [G, N, K] int32`."""

    learnable = False
    losses = ()

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        self.assign = Assign(self.expert_num, self.choices)
        self.take = ops.Gather()

    def construct(self, rows: Tensor, context: dict) -> dict:
        """See Router.construct."""
        experts = self.pick(rows, context)
        if "replay" in context:
            experts = replay_choices(experts, context["replay"], self.expert_num)
        return self.assign(experts, context["valid"])

    def pick(self, rows: Tensor, context: dict) -> Tensor:
        """The experts of each row [G, N, K] int32, those of padded rows included."""
        raise NotImplementedError


@register("hash")
class Hash(FixedRouter):
    """Hash layers (arXiv 2106.04426): the token's id alone decides, K = 1.

    `moe.hash_table` random: each id goes to an expert at random, as with a hash function. balanced: ids are shared out
    by how often they occur in the training text, the most frequent first to the emptiest expert (the paper's balanced
    assignment). A layer does not know the text: until `balance` every expert has as many ids as any other. One id that
    occurs more often than 1 / E of the text leaves its expert overfull.
    """

    paper = "arXiv 2106.04426"
    unit = "token"
    needs = ("token_ids",)

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        size, random = setting.vocab_size, setting.random
        self.balanced, self.shuffled = setting.moe.hash_table == "balanced", None
        if self.balanced:
            self.shuffled = random.permutation(size)
            table = (self.shuffled % self.expert_num).astype(np.int32)
        else:
            table = random.integers(0, self.expert_num, size).astype(np.int32)
        self.table = constant(table, "table")  # [V]

    def balance(self, counts: np.ndarray) -> None:
        """A table by the occurrences of each id in the training text, counts [V]."""
        self.table.set_data(Tensor(table_by_counts(counts, self.expert_num, self.shuffled)))

    def pick(self, rows: Tensor, context: dict) -> Tensor:
        """By table of the token: [G, N, 1] int32."""
        return ops.expand_dims(self.take(self.table, context["token_ids"], 0), -1)  # [G, N, 1]


@register("lsh")
class HyperplaneHash(FixedRouter):
    """Locality-sensitive hashing (sign of random projections, STOC 2002; as in Reformer, arXiv 2001.04451): K = 1.

    log2 E random hyperplanes through the origin cut the space into E cells, an expert for each: rows that point the
    same way share an expert. Bit i of the expert's number is 1 where x . h_i > 0.
    """

    paper = "STOC 2002 (Charikar), arXiv 2001.04451"

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        bits = self.expert_num.bit_length() - 1  # log2 E
        shape = (setting.width, max(bits, 1))  # [D, B]
        self.planes = setting.random.normal(1.0, shape, "planes", requires_grad=False)
        self.place = Tensor(2 ** np.arange(max(bits, 1)) % self.expert_num, mstype.int32)  # one expert: always 0
        self.product = ops.MatMul()

    def pick(self, rows: Tensor, context: dict) -> Tensor:
        """By the cell that the row lies in: [G, N, 1] int32."""
        groups, count, width = rows.shape
        sides = self.product(rows.reshape(-1, width).astype(mstype.float32), self.planes)  # [G * N, B]
        experts = ((sides > 0).astype(mstype.int32) * self.place).sum(-1)  # [G * N]
        return ops.stop_gradient(experts.astype(mstype.int32).reshape(groups, count, 1))


@register("random")
class Random(FixedRouter):
    """An expert at random, K = 1: by a table fixed for each token id, or drawn anew at each step.

    `moe.random_draw` step: every row draws its expert from the step's noise, and at evaluation the table decides (THOR,
    arXiv 2110.04260; its consistency loss is `moe.consistency_loss_factor`).
    """

    paper = "arXiv 2110.04260"
    unit = "token"
    needs = ("token_ids",)

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        table = setting.random.integers(0, self.expert_num, setting.vocab_size).astype(np.int32)
        self.table = constant(table, "table")  # [V]
        self.drawn = setting.moe.random_draw == "step"
        self.slice = setting.slices.take(self.drawn)

    def pick(self, rows: Tensor, context: dict) -> Tensor:
        """By table of the token, or drawn: [G, N, 1] int32."""
        ids = context["token_ids"]
        if self.training and self.drawn:
            uniform = context["noise"][self.slice][:, 0].reshape(ids.shape)  # [G, N]
            experts = ops.floor(uniform * self.expert_num).astype(mstype.int32)
            experts = ops.minimum(experts, self.expert_num - 1)  # a float32 product may round up to E
        else:
            experts = self.take(self.table, ids, 0)
        return ops.expand_dims(experts, -1)  # [G, N, 1]


@register("random_in_group")
class RandomInGroup(FixedRouter):
    """Random routed experts (PanGu-Sigma, arXiv 2303.10845): a group by domain, chance inside.

    The experts stand in `moe.n_group` groups of E / n_group, one beside the other. A row's task id names its group
    (modulo their number); inside, a table fixed by token id decides. K = 1.
    """

    paper = "arXiv 2303.10845"
    unit = "token"
    needs = ("token_ids", "task_ids")

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        self.group_num, size = setting.moe.n_group, setting.vocab_size
        inside = self.expert_num // self.group_num
        tables = [balanced_table(size, inside, setting.random) + group * inside for group in range(self.group_num)]
        self.table = constant(np.concatenate(tables).astype(np.int32), "table")  # [n_group * V]
        self.vocab_size = size

    def pick(self, rows: Tensor, context: dict) -> Tensor:
        """By table of the token, inside the group of the task: [G, N, 1] int32."""
        group = context["task_ids"] % self.group_num  # [G, N]
        return ops.expand_dims(self.take(self.table, group * self.vocab_size + context["token_ids"], 0), -1)


@register("task")
class Task(FixedRouter):
    """Experts by task: the task's id names its K experts, whose outputs are averaged.

    `moe.task_experts` lists them; null gives task t the K experts from t * K on, in turn, so that tasks share experts
    only where there are too few. Task-level routing (arXiv 2110.03742) with a table in place of a gate.
    """

    paper = "arXiv 2110.03742"
    unit = "task"
    needs = ("task_ids",)

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        sets = setting.moe.task_experts
        if sets is None:
            turn = np.arange(setting.moe.task_num * self.choices).reshape(-1, self.choices)
            sets = turn % self.expert_num
        self.table = constant(np.array(sets, np.int32), "table")  # [T, K]

    def pick(self, rows: Tensor, context: dict) -> Tensor:
        """The experts of the row's task: [G, N, K] int32."""
        return self.take(self.table, context["task_ids"], 0)  # [G, N, K]
