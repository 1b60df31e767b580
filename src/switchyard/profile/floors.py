"""What a part cannot do without: the same matrix products alone, or the same bytes moved by a copy."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from switchyard.profile.parts import Part

COPIED = 4_000_000  # float32 numbers of the copy that tells the bandwidth
COPIED_BY_GPU = 64_000_000  # far more than its cache holds


class Products(nn.Cell):
    """The products of a part's forward pass, or of its backward pass: of each the gradients of both factors."""

    def __init__(self, part: Part, backward: bool, dtype):
        super().__init__()
        self.product, self.left = ops.BatchMatMul(), ops.BatchMatMul(transpose_a=True)
        self.right = ops.BatchMatMul(transpose_b=True)
        self.backward, random = backward, np.random.default_rng(0)

        def draw(*shape):
            return Tensor(random.standard_normal(shape).astype(np.float32)).astype(dtype)

        factors = []
        for batch, rows, inner, columns in part.products:
            shapes = ((rows, inner), (inner, columns), (rows, columns))
            factors += [draw(batch, *shape) for shape in shapes]
        self.inputs = tuple(factors)  # arguments of the graph: a product of constants could be made when it compiles

    def construct(self, *factors):
        found = ()
        for place in range(0, len(factors), 3):
            rows, weight, out = factors[place : place + 3]
            if self.backward:
                found = (*found, self.right(out, weight), self.left(rows, out))
            else:
                found = (*found, self.product(rows, weight))
        return found


class Copy(nn.Cell):
    """Reads and writes `copied()` numbers."""

    def __init__(self):
        super().__init__()
        self.inputs = (Tensor(np.ones(copied(), np.float32)),)
        self.relu = ops.ReLU()

    def construct(self, numbers):
        return self.relu(numbers)


def copied() -> int:
    """Returns how many float32 numbers the copy moves on this device."""
    return COPIED if ms.get_context("device_target") == "CPU" else COPIED_BY_GPU


def floor_cells(parts: list[Part], dtype) -> dict[str, nn.Cell]:
    """Returns what to time: "NAME forward", "NAME backward" of each part with products, and "copy"."""
    cells: dict[str, nn.Cell] = {"copy": Copy()}
    for part in parts:
        if part.products:
            cells[f"{part.name} forward"] = Products(part, False, dtype)
            if part.backward:
                cells[f"{part.name} backward"] = Products(part, True, dtype)
    return cells


def floor_of(part: Part, seconds: dict[str, float], backward: bool) -> float | None:
    """Returns the floor of a part's pass in seconds, of the times of `floor_cells`; None: it has none."""
    name = f"{part.name} {'backward' if backward else 'forward'}"
    if part.products:
        return seconds.get(name, 0.0)
    moved = part.moved[backward]
    return moved * seconds["copy"] / (2 * 4 * copied()) if moved else None
