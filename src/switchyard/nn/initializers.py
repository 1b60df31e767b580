"""Initial numbers of parameters: any part of a parameter can be drawn alone, and is the same in every layout.

Each parameter has a stream of its own, by train.seed and by its place in the order of construction. Its numbers, in the
order of memory, come in chunks of CHUNK, and each chunk begins at a counter of its own (Philox, SC 2011). So a device
draws only the chunks that touch the part it holds, and a simulated compile, which reads shapes alone, draws nothing.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext

import numpy as np
from mindspore import Parameter, Tensor
from mindspore import dtype as mstype
from mindspore.common.initializer import initializer

CHUNK = 2**14  # numbers of one counter; a draw that begins inside a chunk makes up to so many for nothing
BLOCK = 2**18  # numbers that are drawn at a time where the last axes are sharded, and then sliced
WEIGHT_STREAM = 0x57454947  # keeps these keys apart from those of noise

Box = tuple[slice, ...]  # a part of an array: start and stop for each axis


@contextmanager
def shapes_only():
    """Lets parameters that have an initializer be built without memory, the moments of an optimizer say.

    As mindspore.nn.utils.no_init_parameters, but one may stand inside another.
    """
    before = getattr(Parameter, "init_param", True)
    Parameter.init_param = False
    try:
        yield
    finally:
        Parameter.init_param = before


class NormalStream:
    """The normal numbers of one parameter, mean 0, float32; those of a place do not depend on what else is drawn.

    Args:
        key: [2] uint64.
        std: standard deviation.
        shape: of the whole parameter.
    """

    def __init__(self, key: np.ndarray, std: float, shape: tuple[int, ...]):
        self.key, self.std, self.shape = key, std, tuple(int(size) for size in shape)

    def draw(self, box: Box | None = None) -> np.ndarray:
        """The numbers of a part, start and stop for each axis; of the whole parameter without one."""
        box = tuple(slice(0, size) for size in self.shape) if box is None else box
        out = np.empty([part.stop - part.start for part in box], np.float32)
        if out.size:
            self._fill(out, box, 0, 0)
        return out

    def _fill(self, out: np.ndarray, box: Box, axis: int, first: int) -> None:
        """Fills `out` with the part `box` of what lies at number `first` of the stream, axes from `axis` on."""
        rest = self.shape[axis + 1 :]
        inner, part = math.prod(rest), box[axis] if axis < len(box) else slice(0, 1)
        if axis + 1 >= len(self.shape) or out.size == (part.stop - part.start) * inner:  # one run of memory
            self._fill_run(out.reshape(-1), first + part.start * inner)
            return
        if inner > BLOCK:
            for index, row in enumerate(range(part.start, part.stop)):
                self._fill(out[index], box, axis + 1, first + row * inner)
            return
        step = BLOCK // inner
        for row in range(part.start, part.stop, step):
            rows = np.empty((min(step, part.stop - row), *rest), np.float32)
            self._fill_run(rows.reshape(-1), first + row * inner)
            index = row - part.start
            out[index : index + step] = rows[(slice(None), *box[axis + 1 :])]

    def _fill_run(self, out: np.ndarray, first: int) -> None:
        """Fills `out` [n], which is contiguous, with the numbers from `first` on."""
        done, total = 0, len(out)
        while done < total:
            chunk, skipped = divmod(first + done, CHUNK)
            count = min(CHUNK - skipped, total - done)
            generator = np.random.Generator(np.random.Philox(key=self.key, counter=[0, chunk, 0, 0]))
            if skipped:
                out[done : done + count] = generator.standard_normal(skipped + count, np.float32)[skipped:]
            else:
                generator.standard_normal(dtype=np.float32, out=out[done : done + count])
            done += count
        out *= np.float32(self.std)


class InitialWeights:
    """Hands out the initial numbers of a model's parameters while it is built, one stream after the other.

    `integers` and `permutation` are for tables, which every device holds whole.

    Args:
        seed: train.seed.
        drawn: False: parameters are built with shapes and no numbers, for a graph that is only compiled, or for
            `set_initial`, which draws a part of them later.
    """

    def __init__(self, seed: int, drawn: bool = True):
        self.seed, self.drawn, self.count = seed, drawn, 0

    def normal(self, std: float, shape: tuple[int, ...], name: str, requires_grad: bool = True) -> Parameter:
        """A parameter of normal numbers of mean 0, float32; `shape` is that of the full one."""
        stream = NormalStream(self._key(), std, shape)
        with nullcontext() if self.drawn else shapes_only():
            values = Tensor.from_numpy(stream.draw()) if self.drawn else initializer("zeros", shape, mstype.float32)
            parameter = Parameter(values, name=name, requires_grad=requires_grad)
        parameter.initial = stream
        return parameter

    def integers(self, low: int, high: int, size) -> np.ndarray:
        """Whole numbers from `low` on, below `high`, each as probable: int64."""
        return self._generator().integers(low, high, size)

    def permutation(self, size: int) -> np.ndarray:
        """The numbers below `size` in random order: int64."""
        return self._generator().permutation(size)

    def _generator(self) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self._key()))

    def _key(self) -> np.ndarray:
        """The key of the next stream."""
        self.count += 1
        return np.random.SeedSequence((WEIGHT_STREAM, self.seed, self.count)).generate_state(2, np.uint64)


def initial_part(parameter: Parameter, box: Box) -> np.ndarray:
    """The initial numbers of a part of a parameter: drawn, or constant as its initializer says, or as it holds them."""
    stream = getattr(parameter, "initial", None)
    if stream is not None:
        return stream.draw(box)
    if parameter.has_init:
        shape = [part.stop - part.start for part in box]
        return initializer(parameter.init_mode.init, shape, parameter.dtype).init_data().asnumpy()
    return parameter.asnumpy()[box]


def set_initial(parameters: Iterable[Parameter], part_of: Callable[[str, tuple[int, ...]], Box | None]) -> None:
    """Gives each parameter that was built without numbers those of the part that this device holds.

    Args:
        parameters: weights, moments and what else the optimizer keeps; those that have numbers are left as they are.
        part_of: (name, shape of the whole) -> start and stop for each axis; None: this device has no part in it.
    """
    for parameter in parameters:
        box = part_of(parameter.name, tuple(parameter.param_info.parameter_shape)) if parameter.has_init else None
        if box is not None:
            parameter.set_data(Tensor.from_numpy(initial_part(parameter, box)), slice_shape=True)
