"""Scores batches: the program of evaluation.

Legend: B batch, S sequence, N = B * S tokens, V vocabulary, M conditional layers, E experts, G routing groups.
"""

from collections.abc import Callable

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.config import Config
from switchyard.distributed.mesh import LOCAL, LocalMesh, first
from switchyard.nn.cross_entropy import TokenLosses
from switchyard.nn.masks import keep_where, learned


class EvalStep(nn.Cell):
    """Scores one batch, without dropout, jitter or the capacity of training.

    Args:
        model: see training.loss.TrainLoss.
        mesh: the devices.
        ignores: whether labels below 0, which are not scored, may occur.
    """

    def __init__(self, model: nn.Cell, mesh: LocalMesh = LOCAL, ignores: bool = False):
        super().__init__(auto_prefix=False)
        self.model, self.token_losses, self.ignores = model, TokenLosses(), ignores
        self.classifies = getattr(model, "classifies", False)
        self.argmax = ops.Argmax(axis=-1, output_type=mstype.int32)
        self.no_noise = Tensor(np.zeros((1, 1, 1), np.float32))
        self.total, self.local_scores = mesh.total(), self.scores
        self.everywhere, self.choices_everywhere = mesh.everywhere(2), mesh.everywhere(2)
        self.local_groups = self.sum_groups
        self.shard(mesh)

    def construct(self, tokens: Tensor, labels: Tensor, valid: Tensor, replay: Tensor = None):
        """Returns (scores [B, 3] of all devices: sum of losses, valid tokens, right answers; statistics
        [M * (6 + 2 E)]; choices [N, M * K]) of tokens, labels [B, S] int32, valid [B, S] float32 and replay [M, N, K]
        int32, see models.Decoder."""
        if replay is None:
            logits, stats, choices = self.model(tokens, valid, self.no_noise)  # [N, V]
        else:
            logits, stats, choices = self.model(tokens, valid, self.no_noise, replay)
        scores = self.everywhere(self.local_scores(logits, labels, valid))
        if len(stats) == 0:
            return scores, (), ()
        if len(choices) > 0:
            choices = self.choices_everywhere(choices)
        return scores, self.total(self.local_groups(stats)), choices

    def scores(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """Scores the sequences of one device: [B, 3]."""
        if self.ignores:
            labels, valid = ops.maximum(labels, 0), learned(valid, labels)
        losses = self.token_losses(logits, labels.reshape(-1)).reshape(valid.shape)  # [N] -> [B, S]
        right = ops.zeros_like(valid)
        if self.classifies:
            right = (self.argmax(logits) == labels.reshape(-1)).astype(mstype.float32).reshape(valid.shape)
        return ops.stack((keep_where(losses, valid).sum(1), valid.sum(1), (right * valid).sum(1)), 1)

    def sum_groups(self, stats: Tensor) -> Tensor:
        """Sums statistics over the groups of one device: [G, X] -> [1, X]."""
        return stats.sum(0, keepdims=True)

    def shard(self, mesh: LocalMesh) -> None:
        """Shards sequences by data shards; scores are gathered, statistics summed."""
        pair, data = mesh.layout("data", None), mesh.degrees.data_parallel

        def scored(logits, labels, valid):
            return [labels[0], 3]

        def summed(stats):
            return [data, stats[1]]

        self.local_scores = mesh.local(self.scores, (pair, pair, pair), (pair,), scored, first)
        self.local_groups = mesh.local(self.sum_groups, (pair,), (pair,), summed, first)


def eval_program(model: nn.Cell, config: Config, mesh: LocalMesh) -> Callable:
    """Returns the program that scores batches with the weights where they lie."""
    data, graph = config.parallel.data_parallel, EvalStep(model, mesh, config.ignores_labels)
    graph.set_train(False)
    return mesh.program(graph, ((data, 1), (data, 1), (data, 1)))  # of a cluster, where nothing is replayed
