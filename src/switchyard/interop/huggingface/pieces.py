"""Moves numbers between both layouts, piece by piece: at most one parameter, or one expert of it, is held at a time."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from switchyard.checkpoint.finite import is_finite
from switchyard.checkpoint.reader import Tensors
from switchyard.checkpoint.tensors import CODES, Box, Entry, full_box, pieces, size_of
from switchyard.errors import UserError
from switchyard.interop.huggingface.floats import from_float32, to_float32
from switchyard.interop.huggingface.folder import Folder
from switchyard.interop.huggingface.rules import Parameter, Source

FLOAT = np.dtype(np.float32).itemsize


class Held:
    """Keeps the arrays that the parts of one parameter are made of, until another parameter is asked for."""

    def __init__(self):
        self._owner: object = None
        self._arrays: dict[str, np.ndarray] = {}

    def get(self, owner: object, name: str, read: Callable[[], np.ndarray]) -> np.ndarray:
        """Returns the array `name` of `owner`, read once; those of an owner before are let go first."""
        if owner != self._owner:
            self._arrays.clear()
            self._owner = owner
        if name not in self._arrays:
            self._arrays[name] = read()
        return self._arrays[name]


class Importing:
    """Reads parts of parameters of ours from a folder of theirs.

    Args:
        folder: whose tensors have been checked against the parameters.
        parameters: of the model.
    """

    def __init__(self, folder: Folder, parameters: Iterable[Parameter]):
        self._folder, self._held = folder, Held()
        self._parameters = {parameter.name: parameter for parameter in parameters}
        self.entries = {name: Entry("F32", parameter.shape) for name, parameter in self._parameters.items()}

    def read(self, name: str, box: Box) -> np.ndarray:
        """Returns a part of a parameter, float32 (UserError: a number that is not finite)."""
        parameter = self._parameters[name]
        if len(parameter.shape) == 3:
            experts = [self._single(parameter, parameter.sources[e], box[1:]) for e in range(box[0].start, box[0].stop)]
            found = np.stack(experts)  # [e, d, f]
        elif len(parameter.sources) == 1:
            found = self._single(parameter, parameter.sources[0], box)
            self._compare_copies(parameter, found, box)
        else:
            found = self._fused(parameter, box)
        if not is_finite(found):
            names = ", ".join(sorted({source.name for source in parameter.sources})[:3])
            raise UserError(f"'{names}': holds numbers that are not finite; take another version of the model")
        return found

    def _compare_copies(self, parameter: Parameter, found: np.ndarray, box: Box) -> None:
        """Refuses a copy of a tensor that is another one (UserError)."""
        source = parameter.sources[0]
        for name in parameter.copies:
            if name in self._folder.tensors:
                copy = self._single(parameter, replace(source, name=name), box)
                if not np.array_equal(copy, found, equal_nan=True):
                    raise UserError(f"'{name}': other numbers than '{source.name}'; only one such table is offered")

    def _single(self, parameter: Parameter, source: Source, box: Box) -> np.ndarray:
        """Returns a part of what one tensor makes: [d] or [d, f]."""
        if not parameter.turned:
            return to_float32(self._folder.read(source.name, box), self._folder.dtype(source.name))
        return to_float32(self._whole(parameter, source).T[box], self._folder.dtype(source.name))

    def _fused(self, parameter: Parameter, box: Box) -> np.ndarray:
        """Returns a part of the joined queries, keys and values: [d, w], or [w] of their bias."""
        found, last = np.empty(size_of(box), np.float32), box[-1]
        for source in parameter.sources:
            inside = (source.columns >= last.start) & (source.columns < last.stop)
            target = source.columns[inside] - last.start
            array, dtype = self._whole(parameter, source), self._folder.dtype(source.name)
            if parameter.turned:
                found[:, target] = to_float32(array[:, box[0]][inside], dtype).T  # [w, d] -> [d, w]
            else:
                found[target] = to_float32(array[inside], dtype)
        return found

    def _whole(self, parameter: Parameter, source: Source) -> np.ndarray:
        owner = (parameter.name, source.expert)
        return self._held.get(owner, source.name, lambda: self._folder.read(source.name, full_box(source.shape)))


class Exporting:
    """Reads parts of tensors of theirs from a checkpoint of ours.

    Args:
        tensors: the weights of the checkpoint.
        parameters: of the model.
        dtype_of: name of theirs -> type of the file, a key of floats.FLOATS.
    """

    def __init__(self, tensors: Tensors, parameters: Iterable[Parameter], dtype_of: Callable[[str], str]):
        self._tensors, self._held = tensors, Held()
        self._made = {source.name: (parameter, source) for parameter in parameters for source in parameter.sources}
        for parameter, source in list(self._made.values()):
            self._made |= dict.fromkeys(parameter.copies, (parameter, source))
        self.entries = {name: Entry(dtype_of(name), source.shape) for name, (_, source) in self._made.items()}

    def read(self, name: str, box: Box) -> np.ndarray:
        """Returns a part of a tensor in its type (UserError: numbers that it cannot hold; DamagedError)."""
        parameter, source = self._made[name]
        if source.expert is None and source.columns is None and not parameter.turned:
            return self._converted(parameter, box, name)
        array = self._whole(parameter, source)  # [D, W], or [W] of a bias
        if source.columns is not None:
            columns = source.columns[box[0]]
            return array[box[1]][:, columns].T if parameter.turned else array[columns]
        return (array.T if parameter.turned else array)[box]

    def _converted(self, parameter: Parameter, box: Box, name: str) -> np.ndarray:
        """Returns a part of a parameter in the type of the tensor `name`."""
        return from_float32(self._tensors.read_finite(parameter.name, box), self.entries[name].dtype, name)

    def _whole(self, parameter: Parameter, source: Source) -> np.ndarray:
        """Returns the parameter, or its expert that the tensor is, in the type of the tensor."""
        owner, dtype = (parameter.name, source.expert), self.entries[source.name].dtype
        return self._held.get(owner, dtype, lambda: self._read_whole(parameter, source, dtype))

    def _read_whole(self, parameter: Parameter, source: Source, dtype: str) -> np.ndarray:
        """Reads piece by piece: float32, and what a file is mapped for, do not add to what is held."""
        shape = parameter.shape if source.expert is None else parameter.shape[1:]
        expert = () if source.expert is None else (slice(source.expert, source.expert + 1),)
        out = np.empty(shape, CODES[dtype])
        for box in pieces(full_box(shape), FLOAT):
            out[box] = self._converted(parameter, (*expert, *box), source.name).reshape(size_of(box))
        return out


def bytes_of(entries: dict[str, Entry]) -> int:
    """Returns the bytes of tensors."""
    return sum(entry.bytes for entry in entries.values())
