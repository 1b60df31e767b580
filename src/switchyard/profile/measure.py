"""Times the parts of a step, their floors and the whole step in turn, and adds them up."""

import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from tqdm import tqdm

from switchyard.config import Config
from switchyard.errors import UserError
from switchyard.models.decoder import DTYPES
from switchyard.profile.decoder_parts import decoder_parts
from switchyard.profile.floors import floor_cells, floor_of
from switchyard.profile.image_parts import cascade_parts, vision_parts
from switchyard.profile.inputs import inputs_of
from switchyard.profile.parts import Part
from switchyard.profile.seq2seq_parts import seq2seq_parts
from switchyard.training.step import create_step

PARTS = {"decoder": decoder_parts, "seq2seq": seq2seq_parts, "vision": vision_parts, "cascade": cascade_parts}

FLOATS = (mstype.float32, mstype.float16, mstype.bfloat16)
CALLS = 3  # of a contender in its turn
COPIES = 5  # of a cell in one graph, where starting a graph costs more than the work of many parts
MORE = " and its copies"  # ends the name of a contender that runs them all
WARM_UP = 3  # rounds before the clock runs: MindSpore tries numbers of threads in the first ones


@dataclass(frozen=True)
class Row:
    """Holds one line of the table; all in seconds of a step.

    Attributes:
        name: of the part.
        forward, backward: time of the passes.
        floor_forward, floor_backward: of the floors; None: there is none.
        times: how often a step does the part.
    """

    name: str
    forward: float
    backward: float
    floor_forward: float | None
    floor_backward: float | None
    times: int = 1

    @property
    def total(self) -> float:
        """Returns the time of both passes."""
        return self.forward + self.backward

    @property
    def floor(self) -> float | None:
        """Returns the floor of both passes."""
        known = [part for part in (self.floor_forward, self.floor_backward) if part is not None]
        return sum(known) if known else None


class Both(nn.Cell):
    """A cell forward and backward: its result, and the gradients of the result's sum.

    The result is asked for, too: without it the compiler leaves out the last product of the forward pass.

    Args:
        cell: float tensors of its inputs.
        places: of the inputs that gradients are taken of.
        parameters: that gradients are taken of.
    """

    def __init__(self, cell: nn.Cell, places: tuple[int, ...], parameters):
        super().__init__(auto_prefix=False)
        weights = ms.ParameterTuple(parameters) if len(parameters) else None
        self.differentiate = ops.value_and_grad(cell, places, weights)

    def construct(self, *inputs):
        return self.differentiate(*inputs)


class Copies(nn.Cell):
    """Runs cells one after another in one graph, each with arguments of its own: (arguments of all) -> their results.

    Arguments of its own keep the compiler from computing a result once for all cells.
    """

    def __init__(self, cells: Sequence[nn.Cell]):
        super().__init__(auto_prefix=False)
        self.copies = nn.CellList(list(cells), auto_prefix=False)

    def construct(self, *inputs):
        width, found = len(inputs) // len(self.copies), ()
        for place, cell in enumerate(self.copies):
            found = (*found, cell(*inputs[place * width : (place + 1) * width]))
        return found


def measure(config: Config, vocabulary: int, rounds: int) -> tuple[list[Row], float]:
    """Returns the rows of the table, the largest first, and the seconds of a whole step.

    Raises:
        UserError: several devices, or several micro-batches.
    """
    require_measurable(config)
    step, (batch, data) = create_step(config, vocabulary), inputs_of(config, vocabulary)
    step.initialise()
    parts, contenders = list(PARTS[config.model.type](step, batch(step))), {}
    for part in tqdm(parts, desc="compiling the parts", leave=False):
        contenders |= contenders_of(part)
    for name, cell in floor_cells(parts, DTYPES[config.model.compute_dtype]).items():
        contenders |= timed(f"floor {name}", [cell] * copies(), cell.inputs)
    arrays = [array[None] for array in batch(step)]
    contenders["step"] = lambda: step(*arrays, 1e-4)
    contenders["data"] = lambda: [Tensor(array) for array in data(step)]
    seconds = without_calls(in_turn(contenders, rounds))
    rows = [row_of(part, parts, seconds) for part in parts]
    rows.append(Row("data", seconds["data"], 0.0, None, None))
    return sorted(rows, key=lambda row: -row.total), seconds["step"]


def require_measurable(config: Config) -> None:
    """Refuses several devices and several micro-batches (UserError)."""
    if config.devices > 1:
        raise UserError(f"parallel: {config.devices} devices; the profile measures one, set the degrees to 1")
    if config.micro_batches > 1:
        key = "train.gradient_accumulation_steps"
        raise UserError(f"{key}: {config.micro_batches}; the profile measures one micro-batch, set it to 1")


def contenders_of(part: Part) -> dict[str, Callable]:
    """Compiles a part; returns what to time: "NAME forward" and, where it has a backward pass, "NAME both"."""
    cells = [part.cell, *(twin(part, number) for number in range(1, copies()))]
    for cell in cells:
        cell.set_train(True)
    found = timed(f"{part.name} forward", cells, part.inputs)
    if part.backward:
        places = tuple(place for place, one in enumerate(part.inputs) if one.dtype in FLOATS) or None
        both = [Both(cell, places, part.parameters or tuple(cell.trainable_params())) for cell in cells]
        found |= timed(f"{part.name} both", both, part.inputs)
    for run in found.values():
        run()
    return found


def copies() -> int:
    """Returns how many cells one graph runs on this device; a CPU starts a graph in microseconds."""
    return 1 if ms.get_context("device_target") == "CPU" else COPIES


def twin(part: Part, number: int) -> nn.Cell:
    """Returns a part's cell with weights of its own, since a cast of shared ones is made once for all copies.

    A cell without parameters is shared, and with it the model that it may compute on, which may fill the memory.
    """
    if not part.cell.parameters_dict():
        return part.cell
    made = deepcopy(part.cell)
    for parameter in made.get_parameters():
        parameter.name = f"{number}.{parameter.name}"
    return made


def timed(name: str, cells: Sequence[nn.Cell], inputs: tuple) -> dict[str, Callable]:
    """Returns what to time of a cell and its copies: a run of the first one, and a run of all in one graph."""
    found = {name: bound(cells[0], inputs)}
    if len(cells) > 1:
        found[name + MORE] = bound(Copies(cells), inputs * len(cells))
    return found


def without_calls(seconds: dict[str, float]) -> dict[str, float]:
    """Returns the seconds of each contender; where copies were run, what one of them adds, without the call."""
    found = {name: value for name, value in seconds.items() if not name.endswith(MORE)}
    for name in found:
        if name + MORE in seconds:
            found[name] = (seconds[name + MORE] - found[name]) / (COPIES - 1)
    return found


def bound(cell: nn.Cell, inputs: tuple) -> Callable:
    """Returns a function without arguments that runs a cell on its inputs."""
    held = tuple(resident(value) for value in inputs)
    return lambda: cell(*held)


def resident(value):
    """Returns a float tensor in the memory of the device: one of NumPy's is copied to a GPU again at every call."""
    if ms.get_context("device_target") == "CPU" or not isinstance(value, Tensor) or value.dtype not in FLOATS:
        return value
    ms.set_context(mode=ms.PYNATIVE_MODE)
    made = ops.mul(value, Tensor(1, value.dtype))
    ms.runtime.synchronize()
    ms.set_context(mode=ms.GRAPH_MODE)
    return made


def wait() -> None:
    """Waits for the device; a call on a CPU is over when it returns."""
    if ms.get_context("device_target") != "CPU":
        ms.runtime.synchronize()


def in_turn(contenders: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Runs every contender once a round, so that what else the machine does hits all alike; returns medians."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in tqdm(range(rounds + WARM_UP), desc="measuring in turn", leave=False):
        for name, run in contenders.items():
            run()  # wakes the threads, and brings its data near
            wait()
            start = time.perf_counter()
            for _ in range(CALLS):
                run()
            wait()
            if number >= WARM_UP:
                seconds[name].append((time.perf_counter() - start) / CALLS)
    return {name: statistics.median(found) for name, found in seconds.items()}


def row_of(part: Part, parts: list[Part], seconds: dict[str, float]) -> Row:
    """Returns the line of a part, without the part that it contains."""
    forward, backward = passes(part, seconds)
    inner = next((other for other in parts if other.name == part.without), None)
    if inner is not None:
        less_forward, less_backward = passes(inner, seconds)
        forward, backward = forward - less_forward, backward - less_backward
    floors = {name.removeprefix("floor "): value for name, value in seconds.items() if name.startswith("floor ")}
    low = [floor_of(part, floors, direction) for direction in (False, True)]
    scaled = [None if value is None else value * part.times for value in low]
    return Row(part.name, forward * part.times, backward * part.times, scaled[0], scaled[1], part.times)


def passes(part: Part, seconds: dict[str, float]) -> tuple[float, float]:
    """Returns the seconds of one forward and of one backward pass of a part."""
    forward = seconds[f"{part.name} forward"]
    return forward, seconds[f"{part.name} both"] - forward if part.backward else 0.0
