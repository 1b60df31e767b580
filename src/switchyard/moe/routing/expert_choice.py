"""Routing in which experts choose rows: expert choice, and mixture of depths, where one expert does.

Legend: G groups, N rows of a group, E experts, C rows that an expert takes, D width, S rows of a sequence, H hidden.
"""

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.config.router_options import DepthsOptions
from switchyard.distributed.mesh import CompiledMesh, first
from switchyard.moe.dispatch.capacity import capacity
from switchyard.moe.routing.base import LinearRouter, RouterSetting, register, to_float32
from switchyard.moe.routing.losses import sum_over_rows
from switchyard.nn.masks import keep_where
from switchyard.nn.softmax import log_sigmoid

NOBODY = -1e30  # the score of a padded row: taken only where no real row is left


@ops.constexpr
def capacities(rows: int, experts: int, choices: int, factor: float) -> Tensor:
    """Returns the capacity of a list of 0, 1, .. `rows` real rows: [N + 1] int32. A constant of the compiled graph."""
    each = [capacity(real, experts, choices, factor) for real in range(rows + 1)]
    return Tensor(np.array(each, np.int32))


class TopRows(nn.Cell):
    """Finds the best rows of each list, as many as the capacity of its real rows.

    Args:
        experts, choices, factor: of `capacity`. C is that of N rows, the size of the arrays; of n real rows among them
            only the slots below capacity(n) are filled, so that padding changes nothing.
    """

    def __init__(self, experts: int, choices: int):
        super().__init__()
        self.experts, self.choices = experts, choices
        self.top, self.take, self.is_finite = ops.TopK(sorted=True), ops.Gather(), ops.IsFinite()

    def construct(self, scores: Tensor, valid: Tensor, factor: float):
        """Takes scores and valid [L, N] -> (rows [L, C] int32, filled [L, C] of 1 and 0)."""
        rows = scores.shape[1]
        scores = ops.stop_gradient(scores)
        known = ops.logical_and(valid > 0, self.is_finite(scores))  # NaN comes last, in whatever order TopK has it
        others = ops.where(valid > 0, ops.full_like(scores, 0.5 * NOBODY), ops.full_like(scores, NOBODY))
        best = ops.where(known, scores, others)
        _, taken = self.top(best, capacity(rows, self.experts, self.choices, factor))  # [L, C]
        each = capacities(rows, self.experts, self.choices, factor)  # [N + 1]
        room = self.take(each, valid.sum(1, keepdims=True).astype(mstype.int32), 0)  # [L, 1]
        rank = ops.expand_dims(ops.arange(taken.shape[1]), 0)  # [1, C]
        return taken, (rank < room).astype(mstype.float32)


def chosen_rows(rows: Tensor, filled: Tensor, count: int) -> Tensor:
    """Marks of what experts took: rows and filled [G, E, C] -> [G, N, E] of 1 and 0."""
    groups, experts, _ = rows.shape
    lists = ops.arange(groups * experts).reshape(groups, experts, 1)
    index = (lists * count + rows).astype(mstype.int32).reshape(-1)  # [G * E * C]
    marks = ops.unsorted_segment_sum(filled.reshape(-1), index, groups * experts * count)
    return ops.stop_gradient(marks.reshape(groups, experts, count).transpose(0, 2, 1))


@register("expert_choice")
class ExpertChoice(LinearRouter):
    """Expert choice (arXiv 2202.09368): every expert takes the C rows that suit it best.

    C = N * K * capacity_factor / E, K the mean number of experts of a row: a row may get more, or none. N counts the
    real rows of the group, whatever padding stands beside them. Load is balanced by construction. Whether a row is
    taken depends on all rows of its group, later ones too. At evaluation
    `eval_capacity_factor` rules, or where it is null the factor of training: nothing is dropless here.
    """

    paper = "arXiv 2202.09368"
    form = "expert_choice"
    causal, batch_independent = False, False
    losses = ("z", "importance", "mutual_information")

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        moe = setting.moe
        self.train_factor, self.eval_factor = moe.capacity_factor, moe.eval_capacity_factor or moe.capacity_factor
        self.softmax, self.top = ops.Softmax(-1), TopRows(self.expert_num, self.choices)

    def train_slots(self, count: int) -> int:
        """Returns C, the tokens that an expert takes of a group of `count`, in training."""
        return capacity(count, self.expert_num, self.choices, self.train_factor)

    def eval_slots(self, count: int) -> int:
        """Returns C at evaluation."""
        return capacity(count, self.expert_num, self.choices, self.eval_factor)

    def route(self, scores: tuple, context: dict) -> dict:
        """See Router.route."""
        logits = scores[0]  # [G, N, E]
        groups, count, _ = logits.shape
        factor = self.train_factor if self.training else self.eval_factor
        probabilities = self.softmax(logits)  # S of the paper
        wanted = probabilities.transpose(0, 2, 1).reshape(-1, count)  # [G * E, N]
        valid = ops.tile(ops.expand_dims(context["valid"], 1), (1, self.expert_num, 1)).reshape(-1, count)
        taken, filled = self.top(wanted, valid, factor)  # its I, [G * E, C]
        gates = keep_where(ops.gather_elements(wanted, 1, taken), filled)  # its G
        shape = (groups, self.expert_num, taken.shape[1])
        taken, filled = taken.reshape(shape), filled.reshape(shape)
        return {
            "token_index": taken,
            "slot_mask": filled,
            "gates": gates.reshape(shape),
            "probabilities": probabilities,
            "logits": logits,
            "importance": probabilities,
            "expert_mask": chosen_rows(taken, filled, count),
        }


@register("mixture_of_depths")
class MixtureOfDepths(LinearRouter):
    """Mixture of depths (arXiv 2404.02258): one expert, or none, for each row.

    In training the top `moe.capacity_factor` share of the real rows of each sequence, by a score x . w, goes through
    the expert and the others pass by on the residual. Which they are depends on later rows, so a generating model
    cannot ask: a small classifier learns to foretell it from the row alone, through a stopped gradient, and
    decides at evaluation, where the layer is causal.

    The expert's output is multiplied by sigmoid(score), which puts the score on the way of the gradient: without it the
    router would never learn. The paper multiplies by the score itself (eq. 1); a gate between 0 and 1 keeps the scale
    of the output apart from that of the score. The layer here is the feed-forward alone, not attention.
    """

    paper = "arXiv 2404.02258"
    Options = DepthsOptions
    form, eval_form, may_skip_tokens = "expert_choice", "token_choice", True
    score_num = 2
    losses = ()

    def __init__(self, setting: RouterSetting):
        super().__init__(setting)
        random, width, hidden = setting.random, setting.width, max(8, setting.width // 8)
        self.share, self.length = setting.moe.capacity_factor, setting.length

        def weight(name: str, *shape: int) -> Parameter:
            return random.normal(shape[0] ** -0.5, shape, name)

        self.hidden, self.out = weight("hidden", width, hidden), weight("out", hidden, 1)  # [D, H], [H, 1]
        self.bias = Parameter(Tensor(np.zeros((1,), np.float32)), name="bias")
        self.predict_in, self.predict_out, self.relu = ops.MatMul(), ops.MatMul(), ops.ReLU()
        self.sigmoid, self.top = ops.Sigmoid(), TopRows(1, 1)
        self.local_predict = self.predict

    def scores(self, tokens: Tensor, token_ids: Tensor, task_ids: Tensor) -> tuple:
        """See Router.scores: x . w and the classifier's logit, each [N, 1]."""
        return self.logits(tokens), self.local_predict(tokens, self.hidden, self.out, self.bias)

    def route(self, scores: tuple, context: dict) -> dict:
        """See Router.route."""
        score, predicted = scores[0], scores[1].squeeze(-1)  # [G, N, 1], [G, N]
        if self.training:
            routing = self.take(score, context["valid"])
            routing["own_loss"] = self.prediction_loss(predicted, routing["expert_mask"].squeeze(-1), context["valid"])
        else:
            routing = self.let_through(score, predicted, context["valid"])
        probabilities = self.sigmoid(score)
        routing["probabilities"] = probabilities
        routing["logits"] = score
        routing["importance"] = probabilities
        return routing

    def train_slots(self, count: int) -> int:
        """Returns C, the tokens that the expert takes of a group of `count`, in training."""
        length = self.length if self.length is not None and count % self.length == 0 else count
        return count // length * capacity(length, 1, 1, self.share)

    def predict(self, tokens: Tensor, hidden: Tensor, out: Tensor, bias: Tensor) -> Tensor:
        """Tokens [N, D] and the classifier's parameters -> logits [N, 1] of being taken; no gradient for the tokens."""
        inside = self.relu(self.predict_in(to_float32(ops.stop_gradient(tokens)), hidden))  # [N, H]
        return self.predict_out(inside, out) + bias

    def shard(self, mesh: CompiledMesh) -> None:
        """Shards tokens, leaves all parameters full everywhere."""
        super().shard(mesh)
        tokens, full = mesh.layout("data", None), mesh.layout(None, None)

        def shape(tokens, hidden, out, bias):
            return [tokens[0], 1]

        inputs = (tokens, full, full, mesh.layout(None))
        self.local_predict = mesh.local(self.predict, inputs, (tokens,), shape, first)

    def take(self, score: Tensor, valid: Tensor) -> dict:
        """Takes the top rows of each sequence: form "expert_choice" of one expert."""
        groups, count, _ = score.shape
        length = count
        if self.length is not None and count % self.length == 0:
            length = self.length
        scores, real = score.reshape(-1, length), valid.reshape(-1, length)  # [G * N / S, S]
        taken, filled = self.top(scores, real, self.share)
        gates = keep_where(self.sigmoid(ops.gather_elements(scores, 1, taken)), filled)
        first = ops.arange(scores.shape[0]) % (count // length) * length  # of each sequence in its group
        taken = taken + ops.expand_dims(first, 1).astype(mstype.int32)  # numbered in their group
        taken = taken.reshape(groups, 1, -1)  # [G, 1, C]
        filled = filled.reshape(groups, 1, -1)
        chosen = chosen_rows(taken, filled, count)
        return {"token_index": taken, "slot_mask": filled, "gates": gates.reshape(groups, 1, -1), "expert_mask": chosen}

    def let_through(self, score: Tensor, predicted: Tensor, valid: Tensor) -> dict:
        """Chooses the rows that the classifier lets through: form "token_choice", expert 0 or none."""
        works = ops.expand_dims((predicted > 0).astype(mstype.float32) * valid, -1)  # [G, N, 1]
        experts = (1.0 - works).astype(mstype.int32)  # 1 = E is nowhere
        return {"expert_index": experts, "gates": keep_where(self.sigmoid(score), works), "expert_mask": works}

    def prediction_loss(self, predicted: Tensor, taken: Tensor, valid: Tensor) -> Tensor:
        """Returns the binary cross-entropy of the classifier, summed over each group's real rows: [G]."""
        return sum_over_rows(-log_sigmoid(-predicted) - predicted * taken, valid)
