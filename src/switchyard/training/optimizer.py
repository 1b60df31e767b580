"""Updates the weights by gradients."""

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.config import Config
from switchyard.distributed.mesh import LocalMesh
from switchyard.nn.adamw import AdamW, gradient_scale
from switchyard.nn.masks import keep_where


class OptimizerStep(nn.Cell):
    """Adds up gradients over calls and devices, clips them and updates the weights by AdamW.

    What changes from step to step is a parameter that the host sets, see `set`: learning_rate; with float16 `unscale`,
    the inverse of the loss scale; `routers_learn`, 0 once moe.router_freeze_step has come; with several calls a step
    `begins` and `ends`, 1 in the first and in the last of them; where train.on_bad_loss skips batches `loss_limit`, the
    largest loss of a step that is applied.

    Args:
        parameters: those that are trained.
        config: the optimizer.
        mesh: the devices.
        calls: of the program a step.
    """

    def __init__(self, parameters, config: Config, mesh: LocalMesh, calls: int = 1):
        super().__init__(auto_prefix=False)
        optimizer, self.clip = config.optimizer, config.optimizer.clip_grad
        decay = (optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay)
        self.of_router = tuple(".router." in parameter.name for parameter in parameters)
        self.adamw = AdamW(parameters, *decay, apart=self.of_router, fills=mesh.own_shapes)
        self.sum, self.norm = mesh.gradient_sum(parameters), mesh.gradient_norm(parameters)
        self.is_finite = ops.IsFinite()
        self.scaled, self.several = config.model.compute_dtype == "float16", calls > 1
        self.freezes = config.moe.router_freeze_step is not None and bool(config.moe_layers)
        self.learning_rate = control("learning_rate")
        self.unscale = control("unscale") if self.scaled else None
        self.routers_learn = control("routers_learn") if self.freezes else None
        self.begins, self.ends = (control("begins"), control("ends")) if self.several else (None, None)
        self.limits = config.train.on_bad_loss == "skip" and mesh.own_shapes  # see TrainLoss: a compiler may not
        self.loss_limit, self.loss = (control("loss_limit"), control("loss")) if self.limits else (None, None)
        self.accumulated = self.adamw.parameters.clone("accumulated", init="zeros") if self.several else None
        self.assign = ops.Assign()

    def construct(self, gradients: tuple, loss: Tensor = None) -> Tensor:
        """Takes gradients of a device, times the loss scale, and returns their global norm without it: [].

        No weight changes where the norm is not finite, nor in a call that is not the last of its step. `loss` [] is
        what a call adds to the loss of its step, times the loss scale; None where nothing limits the loss.
        """
        if loss is not None and self.limits:
            loss = self.loss_of_step(loss)
        if self.several:
            gradients = self.accumulate(gradients)
        if self.sum is not None:
            gradients = self.sum(gradients)
        if self.freezes:
            gradients = self.of_learners(gradients)
        return self.update(gradients, self.norm(gradients), loss)

    def loss_of_step(self, loss: Tensor) -> Tensor:
        """Adds the loss [] of a call to those of the calls before, of the same step, and returns the sum."""
        if self.scaled:
            loss = loss * self.unscale
        if self.several:
            loss = ops.select(self.begins > 0, loss, loss + self.loss)
            loss = ops.depend(loss, self.assign(self.loss, loss))
        return loss

    def update(self, gradients: tuple, norm: Tensor, loss: Tensor = None) -> Tensor:
        """Updates by gradients and their global norm, both times the loss scale, and returns the norm without it."""
        if self.scaled:
            norm = norm * self.unscale
        alive = self.is_finite(norm)
        if loss is not None and self.limits:
            alive = ops.logical_and(alive, loss <= self.loss_limit)  # false for NaN
        if self.several:
            alive = ops.logical_and(alive, self.ends > 0)
        live = self.routers_learn * 1.0 if self.freezes else None
        self.adamw(gradients, self.learning_rate * 1.0, alive, live, gradient_scale(norm, self.clip, self.unscale))
        return norm

    def accumulate(self, gradients: tuple) -> tuple:
        """Returns the sums of gradients and those of the calls before, of the same step, and keeps them."""
        sums = ()
        for total, gradient in zip(self.accumulated, gradients):
            gradient = ops.select(self.begins > 0, gradient, gradient + total)
            sums = (*sums, ops.depend(gradient, self.assign(total, gradient)))
        return sums

    def of_learners(self, gradients: tuple) -> tuple:
        """Sets gradients of frozen routers to 0, so that the norm does not count them."""
        kept = ()
        for of_router, gradient in zip(self.of_router, gradients):
            kept = (*kept, keep_where(gradient, self.routers_learn) if of_router else gradient)
        return kept

    def set(self, **controls: float) -> None:
        """Sets those of the named controls that this step reads."""
        for name, value in controls.items():
            parameter = getattr(self, name)
            if parameter is not None:
                parameter.set_data(Tensor(np.float32(value)))

    def state(self) -> dict[str, Parameter]:
        """Returns every parameter of the optimizer by name."""
        return self.adamw.state()


def control(name: str) -> Parameter:
    """Returns a scalar that the host sets."""
    return Parameter(Tensor(1.0, mstype.float32), name, False)
