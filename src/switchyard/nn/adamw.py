"""AdamW and the global gradient norm, one call for all parameters, in place.

Milliseconds for 10 M parameters in 14 tensors on two CPU cores, one process:

    nn.AdamWeightDecay 16.9 (no bias correction)      ops.AdamWeightDecay 44
    ops.Adam 5.3      ops.Adam and decay by Assign 7.1, by AssignSub 7.6
    on one core, a matrix of 4.7 M: decay by Assign 6.3, by ApplyProximalGradientDescent 3.8 (chosen on CPU)
    sum of squares: one ReduceSum over all axes 30.8, L2Loss 5.6, MatMul of a row with itself 4.5,
                    ReduceSum of rows, then of their sums, 3.1 (chosen; of g * g, for Square takes half as long again)

On a GPU ops.AdamWeightDecay is one kernel launch where ops.Adam with decay takes three, and is chosen there.
"""

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore import dtype as mstype

LEAST = 2.0**-100
MOST_DECAY = 2.0**20  # 1 / (1 - decay) - 1 is -1 in float32 from 2^24 on, and the operator would divide by 0


class AdamW(nn.Cell):
    """Adam with decoupled weight decay (arXiv 1711.05101, algorithm 2, green), for all parameters at once.

    Decay groups: matrices and stacked matrices (two axes or more) decay, norms and vectors (one axis or none) do not.

    For gradient g, with t counting the updates that were applied:
        p <- p * (1 - lr * weight_decay)                        where p decays
        m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g^2
        p <- p - lr * (m / c1) / (sqrt(v / c2) + eps)           c1 = 1 - beta1^t, c2 = 1 - beta2^t
    c1 and c2 are parameters that follow c <- c + (1 - beta) (1 - c), which loses no digits as 1 - beta^t does.

    Args:
        parameters: what to update; float32.
        beta1, beta2, eps, weight_decay: as above.
        apart: for each parameter whether its learning rate is multiplied by `factor` of a call; None: of none.
        device_target: decides which kernels are taken, the fastest there; None asks MindSpore's context.
        fills: whether the shapes of gradients are those of this device, see `masked`.

    `state()` names every parameter of the optimizer: moment1.NAME, moment2.NAME, correction1, correction2.
    """

    def __init__(
        self,
        parameters,
        beta1,
        beta2,
        eps,
        weight_decay,
        device_target: str | None = None,
        apart: list[bool] | None = None,
        fills: bool = True,
    ):
        super().__init__(auto_prefix=False)
        self.parameters = ParameterTuple(parameters)
        self.moment1 = self.parameters.clone("moment1", init="zeros")
        self.moment2 = self.parameters.clone("moment2", init="zeros")
        self.correction1 = Parameter(Tensor(0.0, mstype.float32), name="correction1", requires_grad=False)
        self.correction2 = Parameter(Tensor(0.0, mstype.float32), name="correction2", requires_grad=False)
        self.beta1, self.beta2 = Tensor(beta1, mstype.float32), Tensor(beta2, mstype.float32)
        self.rest1, self.rest2 = 1.0 - beta1, 1.0 - beta2
        self.eps, self.weight_decay = eps, weight_decay
        self.apart = tuple(apart or [False] * len(self.parameters))
        self.decays = tuple(weight_decay > 0 and parameter.ndim >= 2 for parameter in parameters)
        target = device_target or ms.get_context("device_target")
        self.one_kernel, self.divides, self.fill = target != "CPU", target == "GPU", ops.FillV2() if fills else None
        self.zero, self.one = Tensor(0.0, mstype.float32), Tensor(1.0, mstype.float32)
        self.adam, self.adam_decay, self.assign = ops.Adam(), ops.AdamWeightDecay(), ops.Assign()
        self.shrink, self.least = ops.ApplyProximalGradientDescent(), Tensor(LEAST, mstype.float32)
        self.sqrt, self.select = ops.Sqrt(), ops.Select()
        self.multiply, self.divide = ops.MulNoNan(), ops.DivNoNan()

    def construct(self, gradients: tuple, learning_rate, alive, factor=None, scale=None) -> Tensor:
        """Updates all parameters by `gradients`, one for each of the same shape, and a float32 scalar: returns 0.

        Where `alive` is false nothing changes, whatever the gradients hold.

        Args:
            gradients: as they come out of the graph.
            learning_rate: [] float32.
            alive: [] bool; whether the update is applied.
            factor: []; 0 holds the parameters that stand apart, 1 lets them go; None where there are none.
            scale: []; multiplies the gradients, see `gradient_scale`; None = 1.
        """
        correction1 = self.correction1 + self.rest1 * (1.0 - self.correction1)
        correction2 = self.correction2 + self.rest2 * (1.0 - self.correction2)
        # lr (m / c1) / (sqrt(v / c2) + eps) = (lr sqrt(c2) / c1) m / (sqrt(v) + eps sqrt(c2)): no pass over m and v
        root = self.sqrt(correction2)
        eps, decay = self.eps * root, self.weight_decay * correction1 / root  # the kernel multiplies decay by `rate`
        beta1, beta2 = self.beta1, self.beta2
        # A refused update: betas of 1 and a rate of 0 leave everything as it is, if the gradient is finite.
        learning_rate = self.select(alive, learning_rate, self.zero)
        beta1, beta2 = self.select(alive, beta1, self.one), self.select(alive, beta2, self.one)
        kept = self.one if scale is None or self.one_kernel else scale
        if self.divides and scale is not None:
            kept = 1.0 / scale
        kept = self.select(alive, kept, self.zero)
        rate, shrink = learning_rate * root / correction1, shrink_factor(learning_rate * self.weight_decay)
        other_rate, other_shrink = rate, shrink
        if factor is not None:
            other_rate, other_shrink = rate * factor, shrink_factor(learning_rate * factor * self.weight_decay)
        self.assign(self.correction1, self.select(alive, correction1, self.correction1))
        self.assign(self.correction2, self.select(alive, correction2, self.correction2))
        for index, gradient in enumerate(gradients):
            gradient = self.masked(gradient, kept, scale)
            parameter, m, v = self.parameters[index], self.moment1[index], self.moment2[index]
            own_rate = other_rate if self.apart[index] else rate
            if self.one_kernel:
                own = decay if self.decays[index] else self.zero
                self.adam_decay(parameter, m, v, own_rate, beta1, beta2, eps, own, gradient)
            else:
                if self.decays[index]:
                    own = other_shrink if self.apart[index] else shrink
                    self.shrink(parameter, self.least, self.zero, own, gradient)
                self.adam(parameter, m, v, self.zero, self.zero, own_rate, beta1, beta2, eps, gradient)
        return self.zero

    def masked(self, gradient: Tensor, kept: Tensor, scale: Tensor | None) -> Tensor:
        """Returns a gradient times `scale`, zeros where the update is refused: 0 times NaN is 0, and NaN by 0, too.

        On a GPU a division does both in one pass, since MulNoNan takes a factor below 2e-7 for 0 there; by a tensor of
        the same shape it takes half as long as by a scalar.
        """
        if self.divides:
            return self.divide(gradient, kept if self.fill is None else self.fill(gradient.shape, kept))
        gradient = self.multiply(gradient, kept)
        return gradient * scale if self.one_kernel and scale is not None else gradient

    def state(self) -> dict[str, Parameter]:
        """Every parameter of the optimizer by name."""
        own = (*self.moment1, *self.moment2, self.correction1, self.correction2)
        return {parameter.name: parameter for parameter in own}


def shrink_factor(decay: Tensor) -> Tensor:
    """Returns the factor l2 with which ApplyProximalGradientDescent multiplies a parameter by 1 - decay, in place.

    The operator makes (p - alpha g) / (1 + alpha l2). With the least alpha the gradient g moves nothing.
    """
    decay = ops.minimum(decay, MOST_DECAY)
    return decay / (1.0 - decay) * (1.0 / LEAST)


def plain_adamw(parameter, moment1, moment2, gradient, step, learning_rate, beta1, beta2, eps, decay):
    """The plain twin in NumPy: arrays of one shape and the update's number t >= 1 -> (parameter, moment1, moment2)."""
    parameter = parameter * (1 - learning_rate * decay)
    moment1 = beta1 * moment1 + (1 - beta1) * gradient
    moment2 = beta2 * moment2 + (1 - beta2) * gradient**2
    mean, variance = moment1 / (1 - beta1**step), moment2 / (1 - beta2**step)
    return parameter - learning_rate * mean / (np.sqrt(variance) + eps), moment1, moment2


def gradient_scale(norm: Tensor, clip: float | None, unscale: Tensor | None) -> Tensor | None:
    """Returns what takes the loss scale from gradients and cuts their global norm to `clip`; None = nothing does.

    Args:
        norm: of the gradients without the loss scale.
        clip: the limit; None = no limit.
        unscale: the inverse of the loss scale []; None = there is none.
    """
    if clip is None:
        return unscale
    factor = ops.minimum(clip / (norm + 1e-6), 1.0)
    return factor if unscale is None else factor * unscale
