"""Times what an optimizer step on one GPU is made of: AdamW's operator, what scales and hides gradients, their norm.

    python benchmarks/gpu_optimizer.py [--config config/moe_1b_gpu.yaml] [--vocab 32000] [--short] [--json FILE]
                                       [--only WAY ...] [section.key=value ...]

The tensors have the shapes of a configuration's parameters. Each way is a graph of its own; a line says its median and
least milliseconds of eight calls. Ways that hide no gradient are no choice for a program: a step that is refused may
hold NaN. "branch" applies the update in a branch of the graph, so that a refused one runs no operator; "composed" is
the composition that MindSpore's GPU backend has a fused operator for, in which 1 - beta carries the scale. --short: two
calls in place of eight.
"""

import argparse
import statistics
import time
from functools import partial

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.common.initializer import initializer
from workers import record

from switchyard import config as configuration
from switchyard.device import set_context
from switchyard.planner.sizes import parameters

CALLS = 8
BETA1, BETA2, EPS, DECAY, RATE = 0.9, 0.95, 1e-8, 0.1, 1e-4


def tables(shapes: list[tuple[int, ...]]) -> dict[str, ParameterTuple]:
    """Returns weights, moments and gradients of those shapes."""
    first = {"p": "ones", "m": "zeros", "v": "ones", "g": "ones"}
    return {
        name: ParameterTuple(
            [Parameter(initializer(value, shape, ms.float32), name=f"{name}{i}") for i, shape in enumerate(shapes)]
        )
        for name, value in first.items()
    }


class Update(nn.Cell):
    """Updates all weights by AdamWeightDecay.

    Args:
        held: of `tables`.
        scale: [] of the gradients.
        operator: prepares a gradient; None: nothing does.
        by: its second factor: the "scale", a tensor "filled" with it, or the gradient "itself".
        branch: whether the update stands in a branch that a finite scale takes.
    """

    def __init__(self, held: dict[str, ParameterTuple], scale: Parameter, operator=None, by="scale", branch=False):
        super().__init__(auto_prefix=False)
        self.p, self.m, self.v, self.g, self.scale = held["p"], held["m"], held["v"], held["g"], scale
        self.operator, self.by, self.branch = operator, by, branch
        self.adam, self.finite, self.fill = ops.AdamWeightDecay(), ops.IsFinite(), ops.FillV2()
        self.zero = Tensor(0.0, ms.float32)
        constants = (RATE, BETA1, BETA2, EPS, DECAY)
        self.rate, self.beta1, self.beta2, self.eps, self.decay = (Tensor(x, ms.float32) for x in constants)

    def construct(self):
        scale, done = self.scale * 1.0, self.zero
        if not self.branch:
            return self.apply(scale)
        if self.finite(scale):
            done = self.apply(scale)
        return done

    def apply(self, scale):
        for p, m, v, g in zip(self.p, self.m, self.v, self.g):
            prepared = self.prepare(g, scale)
            self.adam(p, m, v, self.rate, self.beta1, self.beta2, self.eps, self.decay, prepared)
        return scale

    def prepare(self, g, scale):
        if self.operator is None:
            return g
        if self.by == "itself":
            return self.operator(g, g)
        return self.operator(g, self.fill(g.shape, scale) if self.by == "filled" else scale)


class Composed(Update):
    """Writes AdamW as the backend knows it."""

    def apply(self, scale):
        rest1, rest2, done = (1.0 - self.beta1) * scale, (1.0 - self.beta2) * scale * scale, scale
        for p, m, v, g in zip(self.p, self.m, self.v, self.g):
            next_m = self.beta1 * m + rest1 * g
            next_v = self.beta2 * v + rest2 * ops.square(g)
            update = self.decay * p + next_m / (self.eps + ops.sqrt(next_v))
            next_p = p - self.rate * update
            next_p = ops.depend(next_p, ops.assign(p, next_p))
            next_p = ops.depend(next_p, ops.assign(m, next_m))
            done = ops.depend(done, ops.depend(next_p, ops.assign(v, next_v)))
        return done


class Norm(nn.Cell):
    """Sums squares of all gradients: rows of `length` values times themselves; 0: rows of the tensor's last axis.

    Args:
        held: of `tables`.
        scale: not read.
        length: of a row.
        squares: sums products of equal shapes in the place of that.
    """

    def __init__(self, held: dict[str, ParameterTuple], scale: Parameter, length: int = 0, squares: bool = False):
        super().__init__(auto_prefix=False)
        self.g, self.length, self.squares = held["g"], length, squares
        self.product, self.sum, self.add = ops.BatchMatMul(transpose_b=True), ops.ReduceSum(), ops.AddN()

    def construct(self):
        sums = ()
        for g in self.g:
            sums = (*sums, self.of(g))
        return self.add(sums)

    def of(self, g):
        if self.squares:
            return self.sum(g * g)
        length = self.length if self.length and g.size % self.length == 0 else g.shape[-1]
        rows = g.reshape(-1, 1, length)
        return self.sum(self.product(rows, rows))


WAYS = {
    "AdamWeightDecay alone": Update,
    "a filled tensor, DivNoNan": partial(Update, operator=ops.DivNoNan(), by="filled"),
    "DivNoNan by a scalar": partial(Update, operator=ops.DivNoNan()),
    "a filled tensor, MulNoNan": partial(Update, operator=ops.MulNoNan(), by="filled"),
    "a filled tensor, Mul": partial(Update, operator=ops.Mul(), by="filled"),
    "Mul by a scalar": partial(Update, operator=ops.Mul()),
    "Mul of equal shapes": partial(Update, operator=ops.Mul(), by="itself"),
    "branch, a filled tensor, Mul": partial(Update, operator=ops.Mul(), by="filled", branch=True),
    "composed": Composed,
    "branch, composed": partial(Composed, branch=True),
    "norm: rows of the tensor": Norm,
    "norm: rows of 4,096": partial(Norm, length=4096),
    "norm: rows of 32,768": partial(Norm, length=32768),
    "norm: squares, then their sum": partial(Norm, squares=True),
}


def milliseconds(cell: nn.Cell, calls: int) -> dict[str, float]:
    """Returns the median and the least time of a call."""
    found = []
    for call in range(calls + 1):
        start = time.perf_counter()
        cell().asnumpy()
        found += [1e3 * (time.perf_counter() - start)] if call else []  # the first one compiles
    return {"median_ms": round(statistics.median(found), 3), "min_ms": round(min(found), 3)}


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="config/moe_1b_gpu.yaml")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--short", action="store_true", help="two calls of each way")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--only", nargs="+", choices=tuple(WAYS), metavar="WAY", help="ways to time")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    chosen = parser.parse_intermixed_args()
    config = configuration.load(chosen.config, chosen.overrides)
    set_context(config.context, config.train.seed, config.model.compute_dtype)
    shapes = list(parameters(config, chosen.vocab).values())
    held, scale, rows = tables(shapes), Parameter(Tensor(0.999, ms.float32), name="scale"), []
    print(f"{len(shapes)} tensors, {sum(map(np.prod, shapes)) / 1e6:,.1f} million numbers")
    for name in chosen.only or WAYS:
        rows.append({"way": name, **milliseconds(WAYS[name](held, scale), 2 if chosen.short else CALLS)})
        print(f"{name:32}{rows[-1]['median_ms']:10.3f}{rows[-1]['min_ms']:10.3f}", flush=True)
    if chosen.json:
        record(chosen.json, "an optimizer step on a GPU", "python benchmarks/gpu_optimizer.py", rows)


if __name__ == "__main__":
    main()
