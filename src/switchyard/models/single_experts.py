"""Feed-forward experts of which each has its weights in parameters of its own, so that a graph reads them in place.

`EachExpert` serves any number of rows, `SwitchedExpert` one row. A graph contains every expert's operators, so both are
for few experts. What runs, and on how many rows, is known at run time only, which was tried on CPU alone: see
`separates`. A graph loaded from MindIR that contains one of them serves the shapes of its first call alone: when
MindSpore compiles it again it keeps shapes behind rows of unknown number, and finds the names of a switch in use.

Legend: N rows, n rows of one expert, E experts, K choices of a row, D width, F hidden width.
"""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.functional import switch_layer

from switchyard.moe.experts import FeedForwardExperts
from switchyard.nn.activation import SwiGLU

MOST = 16  # experts: the time to compile a graph grows with them
HEAVY = 2 << 20  # bytes of an expert


class SingleExpert(nn.Cell):
    """Applies one of some feed-forward experts: rows [n, D] -> [n, D] float32, n may be 0.

    Args:
        experts: what they have in common.
        w_in, w_gate, w_out: the matrices of this one; w_gate None: it has none.
    """

    def __init__(self, experts: FeedForwardExperts, w_in: np.ndarray, w_gate: np.ndarray | None, w_out: np.ndarray):
        super().__init__()
        self.dtype, self.gated = experts.dtype, experts.gated
        self.bend = SwiGLU(silu=True) if self.gated else experts.activation  # the same numbers, an operator less
        self.w_in = held(w_in, experts.w_in, "w_in")  # [D, F]
        self.w_gate = held(w_gate, experts.w_gate, "w_gate") if self.gated else None
        self.w_out = held(w_out, experts.w_out, "w_out")  # [F, D]
        self.product = ops.MatMul()

    def construct(self, rows: Tensor) -> Tensor:
        rows = rows.astype(self.dtype)
        hidden = self.product(rows, self.w_in)  # [n, F]
        hidden = self.bend(self.product(rows, self.w_gate), hidden) if self.gated else self.bend(hidden)
        return self.product(hidden, self.w_out).astype(mstype.float32)


class EachExpert(nn.Cell):
    """Applies to each row its K experts, one expert after the other: exactly the work that the choices ask for.

    The plain twin is the way by blocks, see dispatch.BlockDispatcher: it gathers a copy of the weights for each block,
    and fills blocks up. On one CPU core, 1,024 rows of width 384, hidden width 1,536, 2 of 8 experts chosen: 75 ms
    against 133 (blocks of 128 rows) and 176 (of 32). Nothing but the sum takes its shape from the choices' shape:
    MindSpore keeps the shape of a Gather between rows of unknown number when it compiles a loaded graph for a second
    shape.

    Args:
        experts: whose weights are copied.
    """

    def __init__(self, experts: FeedForwardExperts):
        super().__init__()
        self.expert_num = experts.w_out.shape[0]
        self.each = taken_apart(experts)
        self.numbers = Tensor(np.arange(self.expert_num, dtype=np.int32).reshape(-1, 1, 1))
        self.sum, self.split = ops.ReduceSum(), ops.Split(0, self.expert_num)
        self.find, self.pick, self.put = ops.NonZero(), ops.GatherNd(), ops.TensorScatterAdd()

    def construct(self, x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        """Rows [N, D], experts [N, K] (E: none) and their gates [N, K] -> [N, D] float32."""
        mine = (ops.expand_dims(experts, 0) == self.numbers).astype(mstype.float32)  # [E, N, K]
        reads = self.split(self.sum(mine, 2))  # E times [1, N]: 1 where an expert reads a row
        weights = self.split(self.sum(mine * ops.expand_dims(gates, 0), 2))  # E times [1, N]
        total = ops.zeros_like(x)
        for expert, rows, weight in zip(self.each, reads, weights):
            at = self.find(rows.reshape(-1))  # [n, 1]
            part = expert(self.pick(x, at)) * self.pick(weight.reshape(-1, 1), at)  # [n, D]
            total = self.put(total, at, part)
        return total


class SwitchedExpert(nn.Cell):
    """Applies to one row its K experts; the others' operators do not run.

    The plain twin is decode.ChosenExperts, which copies the weights of K experts. On one CPU core, 6 layers of width
    384, hidden width 1,536, 2 of 8 experts chosen: 6.0 ms against 16.1; 4 layers of width 128, hidden width 512: 1.5 ms
    against 1.3, since a switch takes 0.07 to 0.09 ms.

    Args:
        experts: whose weights are copied.
        choices: K.
    """

    def __init__(self, experts: FeedForwardExperts, choices: int):
        super().__init__()
        self.each = taken_apart(experts)
        self.choice = ops.Split(1, choices)

    def construct(self, x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        """A row [1, D], experts [1, K] and their gates [1, K] -> [1, D] float32."""
        total = None
        for index, gate in zip(self.choice(experts), self.choice(gates)):
            part = switch_layer(index.reshape(()), self.each)(x) * gate  # [1, D]
            total = part if total is None else total + part
        return total


def taken_apart(experts: FeedForwardExperts) -> nn.CellList:
    """Returns a cell for each of the experts, with a copy of the expert's weights."""
    w_in, w_out = numbers(experts.w_in), numbers(experts.w_out)
    w_gate = numbers(experts.w_gate) if experts.gated else [None] * len(w_in)
    return nn.CellList([SingleExpert(experts, *matrices) for matrices in zip(w_in, w_gate, w_out)])


def separates(experts: nn.Cell) -> bool:
    """Returns whether each of these experts may have operators of its own in a graph, on the device that is set."""
    few = type(experts) is FeedForwardExperts and experts.w_in.shape[0] <= MOST
    return few and experts.lora_in is None and ms.get_context("device_target") == "CPU"


def are_heavy(experts: nn.Cell) -> bool:
    """Returns whether a copy of one expert's weights takes longer than the operators that avoid it."""
    matrices = (experts.w_in, experts.w_gate, experts.w_out)
    return separates(experts) and sum(one.nbytes for one in matrices if one is not None) >= HEAVY * len(experts.w_in)


def held(matrix: np.ndarray, like: Parameter, name: str) -> Parameter:
    """Returns a parameter of the type of another."""
    return Parameter(Tensor(np.ascontiguousarray(matrix), like.dtype), name=name)


def numbers(parameter: Parameter) -> np.ndarray:
    """Returns the values of a parameter of any type as float32: NumPy has no bfloat16."""
    return parameter.astype(mstype.float32).asnumpy()
