"""Evaluation on the devices that the training step is cut over: the same weights, where they lie.

Legend: B batch, S sequence, N = B * S tokens, V vocabulary, M conditional layers, E experts.
"""

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.parallel.auto_parallel import AutoParallel

from switchyard.config import Config
from switchyard.distributed.mesh import Mesh, first
from switchyard.distributed.processes import Processes
from switchyard.models import create_model
from switchyard.nn.masks import keep_where
from switchyard.training.parallel_step import ParallelLoss, over_devices, row_means, unpack
from switchyard.training.step import AUDIT_MEANS, AUDIT_SUMS


class ParallelScores(ParallelLoss):
    """tokens, labels [B, S] int32, valid [B, S] float32 -> (scores [B, 2], tallies of all layers, see MoELayer.tally).

    Scores are the sum of losses and the number of valid tokens of each sequence, whole on every device.

    Args:
        model: a Decoder on which `shard` was called, without noise.
        config: its configuration.
        mesh: the devices.
    """

    def construct(self, tokens: Tensor, labels: Tensor, valid: Tensor) -> tuple:
        """See the class."""
        logits, tallies = self.model.spread(tokens, valid, self.no_noise)
        scores = self.everywhere(self.score(logits, labels, valid))
        if self.layers == 0:
            return (scores,)
        return scores, self.total(self.join(tallies), 0)

    def sums(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """Of a data slice: [B, 2]."""
        losses = self.token_losses(logits, labels.reshape(-1)).reshape(valid.shape)  # [N] -> [B, S]
        return ops.stack((keep_where(losses, valid).sum(1), valid.sum(1)), 1)

    def as_it_is(self, scores: Tensor) -> Tensor:
        """[B, 2] -> [B, 2]: what comes in whole, out of slices."""
        return scores * 1.0

    def shard(self, mesh: Mesh) -> None:
        """As ParallelLoss, and one AllGather of the scores."""
        super().shard(mesh)
        rows, whole = mesh.cut("data", None), mesh.cut(None, None)
        self.score = mesh.local(self.sums, (rows, rows, rows), (rows,), scores_shape, first)
        self.everywhere = mesh.local(self.as_it_is, (whole,), (whole,), first, first)


def scores_shape(logits, labels, valid):
    """Shape of the scores [B, 2] at labels [B, S]."""
    return [labels[0], 2]


class ParallelEvalStep:
    """EvalStep's call, for a whole batch, of a model whose weights are cut over devices.

    Experts have the capacity of `evaluation_config`, and rows beyond it are dropped; with dropless dispatch none are.

    Args:
        config: the whole configuration of the training run.
        vocab_size: entries V of the tokenizer.
        trained: the model of the training step, compiled already, whose parameters are read.
        processes: this one and the others.
    """

    scores_whole_batches = True  # its figures are those of all devices

    def __init__(self, config: Config, vocab_size: int, trained: nn.Cell, processes: Processes):
        self.config, self.processes = config, processes
        self.graph = parallel_scores(evaluation_config(config), vocab_size)
        share_parameters(trained, self.graph.network.model)

    def set_train(self, mode: bool) -> None:
        """As of a Cell; its own graph never trains."""

    def __call__(self, tokens: Tensor, labels: Tensor, valid: Tensor) -> tuple:
        """tokens, labels [B, S] int32, valid [B, S] float32 -> (sum of losses [B], valid tokens [B], audit...)."""
        inputs = (self.processes.part(tensor.asnumpy(), 0) for tensor in (tokens, labels, valid))
        scores, *tally = self.graph(*(Tensor(np.ascontiguousarray(array)) for array in inputs))
        scores = scores.asnumpy()  # [B, 2]
        if len(scores) != len(tokens):
            raise RuntimeError(f"evaluation: scores of {len(scores)} of {len(tokens)} sequences came out of the graph")
        found = [scores[:, 0], scores[:, 1]]
        if tally:
            means = row_means(self.config) / max(scores[:, 1].sum(), 1.0) + 1.0 - row_means(self.config)
            layers = (tally[0].asnumpy().reshape(-1, len(means)) * means).reshape(-1)
            figures = unpack(np.concatenate((np.zeros(2, np.float32), layers)), self.config)
            found += [figures["audit"][name] for name in (*AUDIT_SUMS, *AUDIT_MEANS)]
        return tuple(Tensor(np.asarray(array, np.float32)) for array in found)


def evaluation_config(config: Config) -> Config:
    """The model without randomness, its experts with the capacity of evaluation, or of training where that is null."""
    moe = config.moe
    changed = {"capacity_factor": moe.eval_capacity_factor or moe.capacity_factor, "jitter": 0.0}
    if moe.drop_order == "random":
        changed["drop_order"] = "position"
    return config.model_copy(
        update={
            "moe": moe.model_copy(update=changed),
            "model": config.model.model_copy(update={"dropout": 0.0}),
            "train": config.train.model_copy(update={"gradient_accumulation_steps": 1}),
        }
    )


def parallel_scores(config: Config, vocab_size: int) -> AutoParallel:
    """The graph of evaluation, to be compiled and run on the devices of `parallel`."""
    model, data = create_model(config, vocab_size), config.parallel.data_parallel
    mesh = Mesh(config)
    model.shard(mesh)
    return over_devices(ParallelScores(model, config, mesh).set_train(False), config, ((data, 1),) * 3)


def share_parameters(source: nn.Cell, target: nn.Cell) -> None:
    """Gives the cells of `target` the parameters of those of the same name in `source`."""
    cells = dict(source.cells_and_names())
    for name, cell in target.cells_and_names():
        for key in list(cell._params):
            cell._params[key] = cells[name]._params[key]
