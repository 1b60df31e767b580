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

from switchyard.config.router_options import HashOptions, OneCell, RandomInGroupOptions, RandomOptions, TaskOptions
from switchyard.distributed.mesh import CompiledMesh, first
from switchyard.moe.routing.base import Router, RouterSetting, register, replay_choices, to_float32
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.noise import NoiseSlice


def constant(values: np.ndarray, name: str) -> Parameter:
    """Makes a table that is saved and exported and never trained."""
    return Parameter(Tensor(values), name=name, requires_grad=False)


def balanced_table(size: int, experts: int, random: InitialWeights) -> np.ndarray:
    """Draws an expert for each of `size` ids, every expert as often as any other (one more at most): [size]."""
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
        model: its routers `hash` with `hash_table` balanced get a table each, others are left alone.
        token_counts: how often each id occurs, [V]; asked only where it is needed.
    """
    routers = [cell for _, cell in model.cells_and_names() if isinstance(cell, Hash) and cell.balanced]
    if routers:
        counts = token_counts()
        for router in routers:
            router.balance(counts)


class Assign(nn.Cell):
    """Makes a Routing of choices without probabilities: the distribution is what was chosen, the logits are zero."""

    def __init__(self, experts: int, choices: int):
        super().__init__()
        self.expert_num, self.share = experts, 1.0 / choices
        self.one_hot = ops.OneHot()
        self.on, self.off = Tensor(1.0, mstype.float32), Tensor(0.0, mstype.float32)

    def construct(self, experts: Tensor, valid: Tensor) -> dict:
        """Takes experts [G, N, K] int32 and valid [G, N], returns a Routing of form "token_choice"."""
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
    """Base of what is not learned: `scores` is the choice itself, experts [N, K] int32."""

    learnable = False
    losses = ()

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        self.assign = Assign(self.expert_num, self.choices)
        self.take = ops.Gather()

    def route(self, scores: tuple, context: dict) -> dict:
        """See Router.route."""
        experts = self.pick(scores[0], context)
        if "replay" in context:
            experts = replay_choices(experts, context["replay"], self.expert_num)
        return self.assign(experts, context["valid"])

    def pick(self, scores: Tensor, context: dict) -> Tensor:
        """Returns the experts of each row [G, N, K] int32, those of padded rows included, of what `scores` returned."""
        return scores


def place_look_up(router: Router, mesh: CompiledMesh, ids: int, axes: int = 1) -> None:
    """Shards `look_up` of a router: a table of so many axes is full everywhere, ids [N] and choices are sharded."""
    choices = router.choices

    def shape(table, *ids):
        return [ids[0][0], choices]

    inputs = (mesh.layout(*(None,) * axes), *(mesh.layout("data"),) * ids)
    router.local_look_up = mesh.local(router.look_up, inputs, (mesh.layout("data", None),), shape, first)


class TableRouter(FixedRouter):
    """Base of a table of experts: a subclass has `table`, and `look_up` where the table is not [V] by token id."""

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        self.local_look_up = self.look_up

    def scores(self, tokens: Tensor, token_ids: Tensor, task_ids: Tensor) -> tuple:
        """See Router.scores: experts [N, 1] int32."""
        return (self.local_look_up(self.table, token_ids),)

    def look_up(self, table: Tensor, ids: Tensor) -> Tensor:
        """Looks ids [N] up in a table [V]: experts [N, 1] int32."""
        return ops.expand_dims(self.take(table, ids, 0), -1)

    def shard(self, mesh: CompiledMesh) -> None:
        """Leaves the table full everywhere, shards ids."""
        place_look_up(self, mesh, 1)


@register("hash")
class Hash(TableRouter):
    """Hash layers (arXiv 2106.04426): the token's id alone decides, K = 1.

    `hash_table` random: each id goes to an expert at random, as with a hash function. balanced: ids are shared out
    by how often they occur in the training text, the most frequent first to the emptiest expert (the paper's balanced
    assignment). A layer does not know the text: until `balance` every expert has as many ids as any other. One id that
    occurs more often than 1 / E of the text leaves its expert overfull.
    """

    paper = "arXiv 2106.04426"
    Options = HashOptions
    unit = "token"
    needs = ("token_ids",)

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        size, random = setting.vocab_size, setting.random
        self.balanced, self.shuffled = setting.options.hash_table == "balanced", None
        if self.balanced:
            self.shuffled = random.permutation(size)
            table = (self.shuffled % self.expert_num).astype(np.int32)
        else:
            table = random.integers(0, self.expert_num, size).astype(np.int32)
        self.table = constant(table, "table")  # [V]

    def balance(self, counts: np.ndarray) -> None:
        """Makes a table by the occurrences of each id in the training text, counts [V]."""
        self.table.set_data(Tensor(table_by_counts(counts, self.expert_num, self.shuffled)))


@register("lsh")
class HyperplaneHash(FixedRouter):
    """Locality-sensitive hashing (sign of random projections, STOC 2002; as in Reformer, arXiv 2001.04451): K = 1.

    log2 E random hyperplanes through the origin cut the space into E cells, an expert for each: rows that point the
    same way share an expert. Bit i of the expert's number is 1 where x . h_i > 0.
    """

    paper = "STOC 2002 (Charikar), arXiv 2001.04451"
    Options = OneCell

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        bits = self.expert_num.bit_length() - 1  # log2 E
        shape = (setting.width, max(bits, 1))  # [D, B]
        self.planes = setting.random.normal(1.0, shape, "planes", requires_grad=False)
        self.place = Tensor(2 ** np.arange(max(bits, 1)) % self.expert_num, mstype.int32)  # one expert: always 0
        self.product = ops.MatMul()

    def scores(self, tokens: Tensor, token_ids: Tensor, task_ids: Tensor) -> tuple:
        """See Router.scores: x . h of each hyperplane [N, B]."""
        return (self.product(to_float32(tokens), self.planes),)

    def pick(self, scores: Tensor, context: dict) -> Tensor:
        """Chooses by the cell that the row lies in: [G, N, 1] int32."""
        experts = ((scores > 0).astype(mstype.int32) * self.place).sum(-1, keepdims=True)
        return ops.stop_gradient(experts.astype(mstype.int32))

    def shard(self, mesh: CompiledMesh) -> None:
        """Shards tokens, leaves the hyperplanes full everywhere."""
        self.product.shard((mesh.layout("data", None), mesh.layout(None, None)), (mesh.layout("data", None),))


@register("random")
class Random(TableRouter):
    """An expert at random, K = 1: by a table fixed for each token id, or drawn anew at each step.

    `random_draw` step: every row draws its expert from the step's noise, and at evaluation the table decides (THOR,
    arXiv 2110.04260; its consistency loss is `consistency_loss_factor`).
    """

    paper = "arXiv 2110.04260"
    Options = RandomOptions
    unit = "token"
    needs = ("token_ids",)

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        table = setting.random.integers(0, self.expert_num, setting.vocab_size).astype(np.int32)
        self.table = constant(table, "table")  # [V]
        self.drawn = setting.options.random_draw == "step"
        self.slice = NoiseSlice(setting.slices, self.drawn)

    def pick(self, scores: Tensor, context: dict) -> Tensor:
        """Chooses by table of the token, or by lot: [G, N, 1] int32."""
        if not (self.training and self.drawn):
            return scores
        uniform = self.slice(context["noise"])[:, 0].reshape(scores.shape)  # [G, N, 1]
        experts = ops.floor(uniform * self.expert_num).astype(mstype.int32)
        return ops.minimum(experts, self.expert_num - 1)  # a float32 product may round up to E


@register("random_in_group")
class RandomInGroup(TableRouter):
    """Random routed experts (PanGu-Sigma, arXiv 2303.10845): a group by domain, chance inside.

    The experts stand in `n_group` groups of E / n_group, one beside the other. A row's task id names its group
    (modulo their number); inside, a table fixed by token id decides. K = 1.
    """

    paper = "arXiv 2303.10845"
    Options = RandomInGroupOptions
    unit = "token"
    needs = ("token_ids", "task_ids")

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        self.group_num, size = setting.options.n_group, setting.vocab_size
        inside = self.expert_num // self.group_num
        tables = [balanced_table(size, inside, setting.random) + group * inside for group in range(self.group_num)]
        self.table = constant(np.concatenate(tables).astype(np.int32), "table")  # [n_group * V]
        self.vocab_size = size

    def scores(self, tokens: Tensor, token_ids: Tensor, task_ids: Tensor) -> tuple:
        """See Router.scores: experts [N, 1] int32."""
        return (self.local_look_up(self.table, token_ids, task_ids),)

    def look_up(self, table: Tensor, token_ids: Tensor, task_ids: Tensor) -> Tensor:
        """Looks tokens up in a table [n_group * V] inside the group of the task: ids [N] twice -> experts [N, 1]."""
        group = task_ids % self.group_num  # [N]
        return ops.expand_dims(self.take(table, group * self.vocab_size + token_ids, 0), -1)

    def shard(self, mesh: CompiledMesh) -> None:
        """Leaves the table full everywhere, shards ids."""
        place_look_up(self, mesh, 2)


@register("task")
class Task(TableRouter):
    """Experts by task: the task's id names its K experts, whose outputs are averaged.

    `task_experts` lists them; null gives task t the K experts from t * K on, in turn, so that tasks share experts
    only where there are too few. Task-level routing (arXiv 2110.03742) with a table in place of a gate.
    """

    paper = "arXiv 2110.03742"
    Options = TaskOptions
    unit = "task"
    needs = ("task_ids",)

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        sets = setting.options.task_experts
        if sets is None:
            turn = np.arange(setting.options.task_num * self.choices).reshape(-1, self.choices)
            sets = turn % self.expert_num
        self.table = constant(np.array(sets, np.int32), "table")  # [T, K]

    def scores(self, tokens: Tensor, token_ids: Tensor, task_ids: Tensor) -> tuple:
        """See Router.scores: experts [N, K] int32."""
        return (self.local_look_up(self.table, task_ids),)

    def look_up(self, table: Tensor, ids: Tensor) -> Tensor:
        """Looks task ids [N] up in a table [T, K]: experts [N, K] int32."""
        return self.take(table, ids, 0)

    def shard(self, mesh: CompiledMesh) -> None:
        """Leaves the table full everywhere, shards ids."""
        place_look_up(self, mesh, 1, axes=2)
