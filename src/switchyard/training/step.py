"""One optimizer step as one compiled graph, and its counterpart for evaluation.

Legend: A micro-batches, B batch, S sequence, N = B * S tokens, D width, V vocabulary, M conditional layers, J noise
slices.
"""

import gc

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.checkpoint.store import load_weights, set_parameters
from switchyard.config import Config
from switchyard.nn.adamw import AdamW, GlobalNorm, gradient_scale
from switchyard.nn.cross_entropy import TokenLosses
from switchyard.nn.masks import keep_where

AUDIT_SUMS = ("load", "importance")  # of a step: sums over its micro-batches; the other audit figures are means
AUDIT_MEANS = ("dropped", "entropy", "max_violation", "z")
GROWTH_INTERVAL = 2000  # good steps before the loss scale doubles, as torch.amp.GradScaler
MAX_LOSS_SCALE = 2.0**24


class LossCell(nn.Cell):
    """What training makes small: cross-entropy plus the routers' balance and z-losses.

    total = mean over valid tokens of the cross-entropy
            + moe.aux_loss_factor * sum over layers of balance_loss + moe.z_loss_factor * sum over layers of z_loss
            + sum over layers of further losses, which the model has weighted (moe.losses)

    With moe.consistency_loss_factor the model reads the batch twice, each time with noise of its own and so with other
    random experts; the cross-entropy is the mean of both and factor * symmetric KL of their outputs is added (THOR,
    arXiv 2110.04260, halved). The audit is that of the first pass.

    Args:
        model: (tokens [B, S], valid [B, S], noise) -> (logits [N, V] float32, losses, audit), see models.Decoder. A
            network that reads images has [B, C, H, W] in the place of tokens and T tasks in that of S, see
            models.Vision.
        config: the factors are read.
        joint: of one process among several, see distributed.collectives.Joint: total and figures are
            then its part of them.
    """

    def __init__(self, model: nn.Cell, config: Config, joint: nn.Cell | None = None):
        super().__init__(auto_prefix=False)
        self.model, self.token_losses, self.joint = model, TokenLosses(), joint
        self.exits = getattr(model, "exits", 1)
        self.conditional = bool(config.moe_layers)
        self.balance_factor, self.z_factor = config.moe.aux_loss_factor, config.moe.z_loss_factor
        self.consistency = config.moe.consistency_loss_factor if self.conditional else 0.0
        self.window = config.row_tokens
        self.log_softmax = ops.LogSoftmax(-1)

    def construct(self, tokens: Tensor, labels: Tensor, valid: Tensor, noise: Tensor, replay: Tensor = None):
        """tokens, labels [B, S] int32, valid [B, S] float32, noise [max(J, 1), N, D] -> (total [], figures).

        replay [M, N, K] int32: see models.Decoder.

        figures is a tuple that `name_figures` names: loss (cross-entropy alone), balance_loss and z_loss (means over
        layers, 0 when dense), then the audit where the model is conditional.
        """
        logits, layer_losses, audit = self.read(tokens, valid, noise, replay)  # [N, V]
        labels, weights = labels.reshape(-1), valid.reshape(-1)  # [N] each
        if self.exits > 1:  # of a cascade: the mean over all exits (BranchyNet, arXiv 1709.01686, section III-B)
            labels, weights = ops.tile(labels, (self.exits,)), ops.tile(weights, (self.exits,))
        losses = self.token_losses(logits, labels)  # [N]
        apart = ops.zeros_like(losses)  # [N]
        if self.consistency > 0:
            other, _, _ = self.read(tokens, valid, noise[noise.shape[0] // 2 :], replay)  # [N, V]
            losses = (losses + self.token_losses(other, labels)) / 2
            apart = self.divergence(logits, other)
        count, part = self.counts(weights, valid)
        loss = keep_where(losses, weights).sum() / count
        if not self.conditional:
            zero = ops.zeros_like(loss)
            return loss, (loss, zero, zero)
        balance, z, further = layer_losses  # [M] each
        total = loss + self.balance_factor * balance.sum() + self.z_factor * z.sum() + further.sum()
        figures = (loss, balance.mean(), z.mean(), *flat_audit(audit))
        if self.joint is not None:  # means over the routed rows, of which this process has its part
            balances = self.balance_factor * balance.sum() + self.z_factor * z.sum() + further.sum()
            total, figures = loss + balances * part, self.joint.parts(figures, part)
        if self.consistency > 0:
            total = total + self.consistency * keep_where(apart, weights).sum() / count
        return total, figures

    def counts(self, weights: Tensor, valid: Tensor):
        """(valid predictions of the micro-batch over all processes, 1 at least; the share of its routed rows that this
        process has), both [] float32: by one sum over the processes."""
        count = weights.sum()
        if self.joint is None:
            return ops.maximum(count, 1.0), ops.ones_like(count)
        rows = valid.reshape(-1)[:: self.window].sum()
        totals = self.joint.count(ops.stack((count, rows)))
        return ops.maximum(totals[0], 1.0), rows / ops.maximum(totals[1], 1.0)

    def read(self, tokens: Tensor, valid: Tensor, noise: Tensor, replay: Tensor):
        """What the model makes of a batch; only a run that replays hands it choices."""
        if replay is None:
            return self.model(tokens, valid, noise)
        return self.model(tokens, valid, noise, replay)

    def divergence(self, one: Tensor, other: Tensor) -> Tensor:
        """(KL(p || q) + KL(q || p)) / 2 of the distributions of two logits [N, V] -> [N]."""
        one, other = self.log_softmax(one), self.log_softmax(other)
        return ((ops.exp(one) - ops.exp(other)) * (one - other)).sum(-1) / 2


def flat_audit(audit: dict) -> tuple:
    """The audit's figures in the order of AUDIT_SUMS + AUDIT_MEANS, () when dense.

    What leaves a compiled graph must be a flat tuple: MindSpore 2.9 hands out a dict through the Python interpreter,
    which is slow and, worse, repeats the values of the first call.
    """
    if len(audit) == 0:
        return ()
    sums = (audit["load"], audit["importance"])
    figures = (*sums, audit["dropped"], audit["entropy"], audit["max_violation"], audit["z"])
    if "experts" in audit:
        figures = (*figures, audit["experts"])  # moe.record
    return figures


def name_figures(figures: tuple) -> dict:
    """A flat tuple of figures -> {loss, balance_loss, z_loss, audit: {...}}, audit {} when dense."""
    audit = dict(zip((*AUDIT_SUMS, *AUDIT_MEANS, "experts"), figures[3:]))
    return {"loss": figures[0], "balance_loss": figures[1], "z_loss": figures[2], "audit": audit}


class StepGraph(nn.Cell):
    """The graph of `TrainStep`: tensors in, a flat tuple of figures out."""

    def __init__(self, model: nn.Cell, config: Config, joint: nn.Cell | None = None):
        super().__init__(auto_prefix=False)
        optimizer = config.optimizer
        self.loss, self.joint = LossCell(model, config, joint), joint
        self.micro_batches = config.train.gradient_accumulation_steps
        self.scaled = config.model.compute_dtype == "float16"
        self.clip = optimizer.clip_grad
        self.optimizer = AdamW(
            model.trainable_params(),
            optimizer.beta1,
            optimizer.beta2,
            optimizer.eps,
            optimizer.weight_decay,
            apart=[".router." in parameter.name for parameter in model.trainable_params()],
        )
        self.of_router = self.optimizer.apart
        self.freezes = config.moe.router_freeze_step is not None and self.loss.conditional
        self.states = ParameterTuple(model.untrainable_params())  # a forward pass may write them, such as a bias
        self.state_of_router = tuple(".router." in parameter.name for parameter in self.states)
        self.norm = GlobalNorm()
        self.accumulated = None
        if self.micro_batches > 1:
            self.accumulated = self.optimizer.parameters.clone("accumulated", init="zeros")
        self.loss_scale = Parameter(Tensor(config.train.init_loss_scale, mstype.float32), "loss_scale", False)
        self.good_steps = Parameter(Tensor(0, mstype.int32), "good_steps", False)
        self.gradient = ops.value_and_grad(self.scaled_loss, None, self.optimizer.parameters, has_aux=True)
        self.assign, self.assign_add, self.is_finite = ops.Assign(), ops.AssignAdd(), ops.IsFinite()
        self.one = Tensor(1.0, mstype.float32)
        layers, experts = len(config.moe_layers), config.moe.expert_num
        shapes = [()] * 3
        if self.loss.conditional:
            shapes += [(layers, experts)] * len(AUDIT_SUMS) + [(layers,)] * len(AUDIT_MEANS)
        self.is_sum = tuple(len(shape) == 2 for shape in shapes)
        self.no_figures = tuple(Tensor(np.zeros(shape, np.float32)) for shape in shapes)
        if self.loss.conditional and config.moe.record is not None:
            rows = config.rows
            shape = (self.micro_batches, layers, rows, config.moe.choices)  # [A, M, N, K]
            self.no_figures = (*self.no_figures, Tensor(np.zeros(shape, np.int32)))

    def construct(
        self,
        tokens: Tensor,
        labels: Tensor,
        valid: Tensor,
        noise: Tensor,
        learning_rate: Tensor,
        replay: Tensor = None,
    ) -> tuple:
        """See TrainStep; learning_rate [], or [2] with 1 behind it while routers learn, 0 once they are frozen, where
        moe.router_freeze_step is set; returns (gradient_norm [], loss_scale [], skipped [], figures of LossCell...)."""
        scale = self.scale()
        live, held = None, ()
        if self.freezes:
            learning_rate, live = learning_rate[0], learning_rate[1]
        for state in self.states:
            held = (*held, state + ops.zeros_like(state))
        if self.micro_batches == 1:
            forced = None if replay is None else replay[0]  # [M, N, K]
            (_, figures), gradients = self.differentiate(tokens[0], labels[0], valid[0], noise[0], scale, forced)
        else:
            figures, gradients = self.accumulate(tokens, labels, valid, noise, scale, replay)
        if self.joint is not None:
            gradients = self.joint(gradients)
        if self.freezes:
            gradients = self.learning(gradients, live)
        norm = (self.norm(gradients) if self.joint is None else self.joint.norm(gradients)) / scale
        alive, unscale = self.is_finite(norm), 1.0 / scale if self.scaled else None
        self.keep(held, alive, live)
        self.optimizer(gradients, learning_rate, alive, live, gradient_scale(norm, self.clip, unscale))
        if self.scaled:
            self.adjust_scale(alive)
        return (norm, scale, 1.0 - alive.astype(mstype.float32), *figures)

    def learning(self, gradients, live):
        """Returns the gradients, with zeros for those of frozen routers (`live` is 0): the norm does not count them."""
        kept = ()
        for of_router, gradient in zip(self.of_router, gradients):
            kept = (*kept, keep_where(gradient, live) if of_router else gradient)
        return kept

    def keep(self, held, alive, live):
        """Puts back what the forward pass has written, such as the bias that balances `sigmoid`: all of it where the
        step is refused, that of frozen routers always."""
        for index, before in enumerate(held):
            state, moves = self.states[index], alive
            if self.freezes and self.state_of_router[index]:
                moves = ops.logical_and(alive, live > 0)
            self.assign(state, ops.select(moves, state + ops.zeros_like(state), before))

    def scaled_loss(self, tokens, labels, valid, noise, factor, replay=None):
        """(total loss times `factor`, figures): what is differentiated."""
        total, figures = self.loss(tokens, labels, valid, noise, replay)
        return total * factor, figures

    def differentiate(self, tokens, labels, valid, noise, factor, replay):
        """((scaled loss, figures), gradients) of a micro-batch, all inputs its own."""
        if self.joint is not None:  # which replays nothing
            (total, figures), gradients = self.gradient(tokens, labels, valid, noise, factor)
            return (total, self.joint.figures(figures)), gradients
        if replay is None:
            return self.gradient(tokens, labels, valid, noise, factor)
        return self.gradient(tokens, labels, valid, noise, factor, replay)

    def scale(self):
        """The loss scale []: a parameter's value with float16, else 1."""
        return self.loss_scale * 1.0 if self.scaled else self.one

    def accumulate(self, tokens, labels, valid, noise, scale, replay):
        """(figures of the step, its gradients times `scale`): a loop in the graph, so its size does not grow with A."""
        for total in self.accumulated:
            self.assign(total, ops.zeros_like(total))
        counts = valid.sum((1, 2))  # [A, B, S] -> [A]
        if self.joint is not None:
            counts = self.joint.count(counts)
        shares = counts / ops.maximum(counts.sum(), 1.0)
        sums, index = self.no_figures, Tensor(0, mstype.int32)
        while index < self.micro_batches:
            mask = ops.gather(valid, index, 0)  # [A, B, S] -> [B, S]
            share = ops.gather(shares, index, 0)
            (_, figures), gradients = self.differentiate(
                ops.gather(tokens, index, 0),
                ops.gather(labels, index, 0),
                mask,
                ops.gather(noise, index, 0),  # [A, J, N, D] -> [J, N, D]
                scale * share,
                None if replay is None else ops.gather(replay, index, 0),
            )
            for total, gradient in zip(self.accumulated, gradients):
                self.assign_add(total, gradient)
            sums = self.add_figures(sums, figures, share, index)
            index = index + 1
        return sums, self.accumulated

    def add_figures(self, sums, figures, share, micro):
        """`sums` plus the figures of a micro-batch; those that are means count by its share of the tokens."""
        added = ()
        for index, figure in enumerate(figures):
            if index < len(self.is_sum):
                added = (*added, sums[index] + (figure if self.is_sum[index] else share * figure))
            else:
                place = (ops.arange(self.micro_batches) == micro).astype(mstype.int32).reshape(-1, 1, 1, 1)
                added = (*added, sums[index] + place * figure)  # choices: [A, M, N, K]
        return added

    def adjust_scale(self, alive):
        """Halves the loss scale after a step that is not finite, doubles it after GROWTH_INTERVAL good ones."""
        good = ops.select(alive, self.good_steps + 1, ops.zeros_like(self.good_steps))
        grown = good >= GROWTH_INTERVAL
        scale = ops.select(alive, self.loss_scale * 1.0, ops.maximum(self.loss_scale * 0.5, 1.0))
        scale = ops.select(grown, ops.minimum(scale * 2.0, MAX_LOSS_SCALE), scale)
        self.assign(self.loss_scale, scale)
        self.assign(self.good_steps, ops.select(grown, ops.zeros_like(good), good))


class TrainStep:
    """One optimizer step as one compiled graph: forward, backward, accumulation, clip and AdamW, all in place.

    With more than one micro-batch the graph loops over them and adds up gradients in place, each weighted by its share
    of the valid tokens: the cross-entropy's gradient is that of the joined batch. Balance losses are those of each
    micro-batch, weighted likewise.

    A step whose gradient norm is not finite is skipped: weights, moments and the routers' state stay. With float16 the
    loss is scaled: a skipped step halves the scale, and GROWTH_INTERVAL good steps double it. Scale and counter are
    parameters.

    Args:
        model: see LossCell; its trainable parameters are float32.
        config: optimizer, accumulation, loss factors, compute_dtype.
        joint: of one process among several, whose model is cut: see distributed.collectives.
    """

    def __init__(self, model: nn.Cell, config: Config, joint: nn.Cell | None = None):
        gc.collect()  # a Cell that is collected later empties MindSpore's key cache: this graph would compile twice
        self.model = model
        self.graph = StepGraph(model, config, joint)
        self.graph.set_train(True)

    def __call__(self, tokens, labels, valid, noise, learning_rate: float, replay=None, routers_learn=True) -> dict:
        """tokens, labels [A, B, S] int32, valid [A, B, S] float32, noise [A, max(J, 1), N, D]: NumPy arrays; replay, if
        any, [A, M, N, K] int32. routers_learn: read where moe.router_freeze_step is set; false leaves the routers' own
        parameters, and what they keep besides, as they are.

        Returns figures of the whole step as tensors: those of `name_figures`; gradient_norm [] before the clip;
        loss_scale [] and skipped [] (1 where the update was refused).
        """
        self.graph.set_train(True)  # evaluation switches the same model over
        inputs = [Tensor(array) for array in (tokens, labels, valid, noise)]
        rate = [learning_rate, float(routers_learn)] if self.graph.freezes else learning_rate
        inputs.append(Tensor(rate, mstype.float32))
        if replay is not None:
            inputs.append(Tensor(replay, mstype.int32))
        norm, scale, skipped, *figures = self.graph(*inputs)
        return {**name_figures(tuple(figures)), "gradient_norm": norm, "loss_scale": scale, "skipped": skipped}

    def optimizer_state(self) -> dict[str, Parameter]:
        """Everything besides the weights that the next step reads: name -> parameter."""
        graph = self.graph
        return {**graph.optimizer.state(), "loss_scale": graph.loss_scale, "good_steps": graph.good_steps}

    def load(self, weights: dict[str, np.ndarray], optimizer: dict[str, np.ndarray]) -> None:
        """Sets the model's parameters and the optimizer's state, strictly by name and shape (UserError)."""
        load_weights(self.model, weights)
        self.load_optimizer_state(optimizer)

    def load_optimizer_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Sets the optimizer's state, strictly by name and shape (UserError)."""
        set_parameters(self.optimizer_state(), arrays, "optimizer state")


class EvalStep(nn.Cell):
    """Losses of one batch without dropout, jitter or capacity of training.

    Args:
        model: see LossCell.
    """

    def __init__(self, model: nn.Cell):
        super().__init__(auto_prefix=False)
        self.model, self.token_losses = model, TokenLosses()
        self.classifies = getattr(model, "classifies", False)
        self.argmax = ops.Argmax(axis=-1, output_type=mstype.int32)
        self.no_noise = Tensor(np.zeros((1, 1, 1), np.float32))

    def construct(self, tokens: Tensor, labels: Tensor, valid: Tensor, replay: Tensor = None):
        """tokens, labels [B, S] int32, valid [B, S] float32 -> (sum of losses [B], valid tokens [B], audit...).

        Of a network that classifies images the right answers [B] come third.

        replay [M, N, K] int32: see models.Decoder.
        """
        if replay is None:
            logits, _, audit = self.model(tokens, valid, self.no_noise)  # [N, V]
        else:
            logits, _, audit = self.model(tokens, valid, self.no_noise, replay)
        losses = self.token_losses(logits, labels.reshape(-1)).reshape(valid.shape)  # [N] -> [B, S]
        sums = (keep_where(losses, valid).sum(1), valid.sum(1))
        if self.classifies:
            right = (self.argmax(logits) == labels.reshape(-1)).astype(mstype.float32).reshape(valid.shape)
            sums = (*sums, (right * valid).sum(1))
        return (*sums, *flat_audit(audit))
