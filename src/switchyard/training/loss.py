"""Computes the loss that training minimises, and the figures of a step, on any mesh.

Legend: B batch, S sequence, N = B * S tokens, D width, V vocabulary, M conditional layers, E experts, J noise slices,
G routing groups, K choices of a token, W = 2 + M * (6 + 2 E) figures.
"""

import math

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.config import Config
from switchyard.distributed.mesh import LOCAL, LocalMesh, first
from switchyard.moe import metrics
from switchyard.moe.routing.base import find_router
from switchyard.moe.statistics import weighted_losses
from switchyard.nn.cross_entropy import TokenLosses
from switchyard.nn.masks import keep_where, learned
from switchyard.training.teacher import SoftLoss

LOSS, CROSS_ENTROPY, STATISTICS = 0, 1, 2  # where the figures begin


class TrainLoss(nn.Cell):
    """Computes the loss and the figures of one micro-batch.

    loss = factor * (mean over valid tokens of the cross-entropy
                     + moe.aux_loss_factor * sum over layers of the balance loss
                     + moe.z_loss_factor * sum over layers of the z-loss
                     + sum over layers of the auxiliary losses of moe.losses, weighted)

    With moe.consistency_loss_factor the model reads the batch twice, each time with noise of its own and so with other
    random experts; the cross-entropy is the mean of both and factor * symmetric KL of their outputs is added (THOR,
    arXiv 2110.04260, halved). The statistics are those of the first pass.

    With a teacher the cross-entropy counts 1 - soft_weight, and soft_weight that with the teacher's probabilities
    (arXiv 2101.03961, section 4.2), see training.teacher.

    Args:
        model: (tokens [B, S], valid [B, S], noise) -> (logits [N, V] float32, statistics, choices), see models.Decoder.
            A network that reads images has [B, C, H, W] in the place of tokens and T tasks in that of S, see
            models.Vision.
        config: the factors are read.
        mesh: the devices; two sums cross them, of the valid tokens and of all figures.
        teacher: (tokens, valid) -> logits [N, V], where train.distill names one.
    """

    def __init__(self, model: nn.Cell, config: Config, mesh: LocalMesh = LOCAL, teacher: nn.Cell | None = None):
        super().__init__(auto_prefix=False)
        moe, self.layers = config.moe, len(config.moe_layers)
        self.model, self.token_losses = model, TokenLosses()
        self.exits = getattr(model, "exits", 1)
        self.balance_factor, self.z_factor = moe.aux_loss_factor, z_loss_factor(config)
        self.consistency = moe.consistency_loss_factor if self.layers else 0.0
        self.teacher, distill = teacher, config.train.distill
        if teacher is not None:
            self.soft_weight, self.soft_losses = distill.soft_weight, SoftLoss(distill.temperature)
        self.window, self.units, self.columns = config.row_tokens, config.units, metrics.width(moe.expert_num)
        self.width, self.stacked = figures_num(config), len(config.stacks) > 1
        self.log_softmax, self.total, self.total_counts = ops.LogSoftmax(-1), mesh.total(), mesh.total()
        self.ignores = config.ignores_labels  # a label below 0 is not learned
        self.own = None  # 1 in the place of this device's data shard [data_parallel, 1], where choices are recorded
        if moe.record is not None and self.layers:
            self.own = Tensor(np.eye(mesh.degrees.data_parallel, dtype=np.float32)[:, mesh.data_shard() :][:, :1])
        self.local_counts, self.local_part = self.counts, self.part
        self.local_second, self.places = self.second_half, places(config)
        self.shard(mesh)

    def construct(self, tokens: Tensor, labels: Tensor, valid: Tensor, noise: Tensor, factor: Tensor, replay=None):
        """Returns figures [W] of all devices, with moe.record [W + N * M * K], of tokens, labels [B, S] int32, valid
        [B, S] float32, noise [max(J, 1), N, D], factor [1, 1] of the loss and replay [M, N, K] int32; see
        models.Decoder.

        The first figure is the loss times the factor, the only one that carries a gradient; the second the
        cross-entropy; then come the router statistics, summed over groups, see moe.metrics, and recorded choices, by
        token and layer. They are one tensor because the parallel compiler differentiates a cell with one result only.
        No operator reads the figures behind their sum over the devices: on GPU it could race with that sum.
        """
        logits, stats, choices = self.read(tokens, valid, noise, replay)  # [N, V], [G, M * (6 + 2 E)], [N, M * K]
        other = logits
        if self.consistency > 0:
            other, _, _ = self.read(tokens, valid, self.local_second(noise), replay)  # [N, V]
        if self.teacher is not None:
            other = self.teacher(tokens, valid)  # [N, V]
        return self.figures(logits, other, labels, valid, factor, stats, choices)

    def read(self, tokens: Tensor, valid: Tensor, noise: Tensor, replay: Tensor):
        """Runs the model on a batch; only a run that forces choices hands it some."""
        if replay is None:
            return self.model(tokens, valid, noise)
        return self.model(tokens, valid, noise, replay)

    def figures(self, logits: Tensor, other: Tensor, labels, valid, factor, stats, choices=()) -> Tensor:
        """Sums figures over the devices: logits [N, V] of one pass and of the other (or of the teacher), labels and
        valid [B, S] -> [W]."""
        routed, counted = (), (valid,)
        if self.layers > 0 and self.stacked:
            counted = (valid, ops.stop_gradient(stats))
        if self.ignores:
            counted = (valid, labels)
        counts = self.total_counts(self.local_counts(*counted))  # [2]
        if self.layers > 0:
            routed = (stats,) if self.own is None else (stats, choices)
        return self.total(self.local_part(logits, other, labels, valid, counts, factor, *routed))

    # ---- local to one device
    def second_half(self, noise: Tensor) -> Tensor:
        """Returns the noise of the second pass: [J, N, D] -> [J / 2, N, D]."""
        return noise[noise.shape[0] // 2 :]

    def counts(self, valid: Tensor, stats: Tensor = None) -> Tensor:
        """Counts the valid predictions and the real routed tokens of a device: valid [B, S] -> [1, 2].

        The stacks of an encoder-decoder have different tokens: statistics [G, M * (6 + 2 E)] -> [1, 1 + M], the tokens
        of each layer.
        """
        if stats is not None:
            tokens = stats.sum(0).reshape(self.layers, self.columns)[:, metrics.TOKENS]  # [M]
            return ops.concat((valid.sum().reshape(1), tokens)).reshape(1, -1)
        routed = valid.reshape(-1)[:: self.window].sum() * self.units
        return ops.stack((valid.sum(), routed)).reshape(1, 2)

    def learned_counts(self, valid: Tensor, labels: Tensor) -> Tensor:
        """Counts as `counts`, of labels [B, S] those that are learned: valid [B, S] -> [1, 2]."""
        return ops.stack((learned(valid, labels).sum(), self.counts(valid)[0, 1])).reshape(1, 2)

    def part(self, logits, other, labels, valid, counts, factor, *routed) -> Tensor:
        """Computes what a device adds to the figures: [1, W], or at its micro-batch's place in [1, A * W]; counts [2]
        of all devices, factor [1, 1] or [1, A], routed: statistics [G, M * (6 + 2 E)] where there are conditional
        layers, then choices [N, M * K] where they are recorded."""
        labels, weights = labels.reshape(-1), valid.reshape(-1)  # [N] each
        if self.ignores:
            labels, weights = ops.maximum(labels, 0), learned(weights, labels)
        if self.exits > 1:  # of a cascade: the mean over all exits (BranchyNet, arXiv 1709.01686, section III-B)
            labels, weights = ops.tile(labels, (self.exits,)), ops.tile(weights, (self.exits,))
        tokens = ops.maximum(counts[0] * self.exits, 1.0)
        losses = self.token_losses(logits, labels)  # [N]
        if self.consistency > 0:
            losses = (losses + self.token_losses(other, labels)) / 2
        loss = keep_where(losses, weights).sum() / tokens
        total, summed = loss, ()
        if self.teacher is not None:
            soft = keep_where(self.soft_losses(logits, other), weights).sum() / tokens
            total = (1.0 - self.soft_weight) * loss + self.soft_weight * soft
        if len(routed) > 0:
            layers = routed[0].sum(0).reshape(self.layers, self.columns)
            routed_rows = counts[1:].reshape(-1, 1) if self.stacked else counts[1]  # [M, 1] or []
            total, summed = total + self.auxiliary(layers, routed_rows), (ops.stop_gradient(layers).reshape(-1),)
        if self.own is not None:
            chosen = routed[1].reshape(1, -1).astype(mstype.float32)  # exact: numbers of experts are small
            summed = (*summed, (self.own * chosen).reshape(-1))  # [data_parallel * N * M * K], 0 for other devices
        if self.consistency > 0:
            apart = keep_where(self.divergence(logits, other), weights).sum() / tokens
            total = total + self.consistency * apart
        scaled = (total * factor.sum()).reshape(1)
        return self.placed(ops.concat((scaled, ops.stop_gradient(loss).reshape(1), *summed)).reshape(1, -1), factor)

    def auxiliary(self, layers: Tensor, count: Tensor) -> Tensor:
        """Weighs the losses that statistics [M, 6 + 2 E] carry, of `count` real tokens of all devices, [] or [M, 1]."""
        return weighted_losses(layers, count, self.balance_factor, self.z_factor)

    def divergence(self, one: Tensor, other: Tensor) -> Tensor:
        """Computes (KL(p || q) + KL(q || p)) / 2 of the distributions of two logits [N, V] -> [N]."""
        one, other = self.log_softmax(one), self.log_softmax(other)
        return ((ops.exp(one) - ops.exp(other)) * (one - other)).sum(-1) / 2

    def placed(self, figures: Tensor, factor: Tensor) -> Tensor:
        """Puts figures [1, W] of a pipeline at the place of the factor [1, A] that is not 0: [1, A * W]."""
        if self.places == 1:
            return figures
        place = ops.stop_gradient((factor != 0).astype(mstype.float32)).reshape(-1, 1)  # [A, 1]
        return (place * figures).reshape(1, -1)

    def shard(self, mesh: LocalMesh) -> None:
        """Shards tokens by data shards, over which the figures are summed."""
        data, pair, full = mesh.degrees.data_parallel, mesh.layout("data", None), mesh.layout(None, None)
        width = self.places * self.width

        def half(noise):
            return [noise[0] // 2, *noise[1:]]

        def counted(valid, *stats):
            return [data, 1 + (self.layers if stats else 1)]

        def summed(*shapes):
            return [data, width + (0 if self.own is None else math.prod(shapes[-1]))]

        routed = () if not self.layers else (pair,) if self.own is None else (pair, pair)
        inputs = (pair, pair, pair, pair, mesh.layout(None), full, *routed)
        self.local_second = mesh.local(self.second_half, (mesh.noise,), (mesh.noise,), half, first)
        of_counts = (pair, pair) if self.stacked and self.layers else (pair,)
        self.local_counts = mesh.local(self.counts, of_counts, (pair,), counted, first)
        if self.ignores:
            self.local_counts = mesh.local(self.learned_counts, (pair, pair), (pair,), lambda *_: [data, 2], first)
        self.local_part = mesh.local(self.part, inputs, (pair,), summed, type_of_valid)


def type_of_valid(logits, other, labels, valid, *rest):
    """Returns the type of figures, float32: logits may be narrower."""
    return valid


def figures_num(config: Config) -> int:
    """Returns the number W of figures of a micro-batch, without recorded choices."""
    return STATISTICS + len(config.moe_layers) * metrics.width(config.moe.expert_num)


def places(config: Config) -> int:
    """Returns how many micro-batches one call returns figures of: all of a pipeline, else one."""
    return config.parallel.micro_batch_num if config.parallel.pipeline_stage > 1 else 1


def z_loss_factor(config: Config) -> float:
    """Returns moe.z_loss_factor, or 0 where the router gives no z-loss."""
    return config.moe.z_loss_factor if z_loss_given(config) else 0.0


def name_figures(figures: np.ndarray, config: Config, shares: np.ndarray) -> dict:
    """Returns the metrics of a step: {loss, balance_loss, z_loss, routers: {...} of moe.metrics, {} when dense}.

    Args:
        figures: of each micro-batch, [A, W].
        config: layers, experts.
        shares: of each micro-batch in the valid tokens of the step, [A]; means count by them.
    """
    experts, rows = config.moe.expert_num, np.asarray(figures, np.float64)
    balance, z = shares @ [metrics.loss_metrics(row[STATISTICS:], experts) for row in rows]
    parts = [metrics.metrics(row[STATISTICS:], experts) for row in rows]
    weights = {name: np.ones(len(shares)) if name in metrics.SUMS else shares for name in parts[0]}
    return {
        "loss": float(shares @ rows[:, CROSS_ENTROPY]),
        "balance_loss": float(balance),
        "z_loss": float(z) if z_loss_given(config) else 0.0,
        "routers": {name: sum(w * part[name] for w, part in zip(weights[name], parts)) for name in parts[0]},
    }


def z_loss_given(config: Config) -> bool:
    """Returns whether the router gives a z-loss, whatever its factor."""
    return bool(config.moe_layers) and "z" in find_router(config.moe.router).losses
