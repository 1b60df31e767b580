"""Reads tensors of a checkpoint of any layout: any part of a tensor, put together from the shards in its files."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from switchyard.checkpoint.finite import is_finite
from switchyard.checkpoint.manifest import MANIFEST, DamagedError, Manifest, file_of, readable, verify
from switchyard.checkpoint.tensors import TYPES, Box, Entry, full_box, pieces, read_header, read_part, size_of, within
from switchyard.errors import UserError

MOST_CELLS = 1_000_000  # between the edges of a tensor's shards


@dataclass(frozen=True)
class Shards:
    """Locates the shards of one tensor: P shards of a tensor with n axes.

    Attributes:
        files: P names.
        starts, stops: [P, n] of the places in the full tensor.
    """

    files: tuple[str, ...]
    starts: np.ndarray
    stops: np.ndarray

    @classmethod
    def of(cls, places: Iterable[tuple[str, list[int], list[int]]]) -> "Shards":
        """Makes Shards from (file, offsets, shape) of each shard."""
        files, offsets, shapes = zip(*places)
        starts = np.array(offsets, np.int64).reshape(len(files), -1)
        return cls(files, starts, starts + np.array(shapes, np.int64).reshape(len(files), -1))

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuses shards that do not make up the full tensor, each element once (UserError)."""
        if 0 in shape:
            return
        outside = ((self.starts < 0) | (self.starts >= self.stops) | (self.stops > np.array(shape, np.int64))).any(1)
        if outside.any():
            index = int(outside.argmax())
            raise UserError(
                f"unexpected shard of '{name}' in {self.files[index]}: {self._text(index)} of a tensor {shape}"
            )
        edges = [np.unique([starts, stops]) for starts, stops in zip(self.starts.T, self.stops.T)]
        cells = [len(edge) - 1 for edge in edges]
        if math.prod(cells) > MOST_CELLS + 16 * len(self.files):  # shards that make up a tensor are divided alike
            raise UserError(f"inconsistent shards of '{name}': {len(self.files)} shards that do not fit together")
        count = np.zeros(cells, np.int32)  # shards over each cell between all edges
        for index in range(len(self.files)):
            cells = [
                slice(*np.searchsorted(edge, (self.starts[index, axis], self.stops[index, axis])))
                for axis, edge in enumerate(edges)
            ]
            if count[tuple(cells)].any():
                raise UserError(
                    f"duplicate shard of '{name}' in {self.files[index]}: {self._text(index)} is stored twice"
                )
            count[tuple(cells)] += 1
        ends = all(edge[0] == 0 and edge[-1] == size for edge, size in zip(edges, shape))
        if not ends or not count.all():
            stored = int((self.stops - self.starts).prod(1).sum())
            raise UserError(
                f"missing shard of '{name}': the files hold {stored:,} of its {int(np.prod(shape)):,} elements {shape}"
            )

    def _text(self, index: int) -> str:
        return "[" + ", ".join(f"{a}:{b}" for a, b in zip(self.starts[index], self.stops[index])) + "]"

    def box(self, index: int) -> Box:
        """Returns the place of one shard in the tensor."""
        return tuple(slice(int(a), int(b)) for a, b in zip(self.starts[index], self.stops[index]))


class Tensors:
    """Reads the tensors of one kind, weights or optimizer, of a checkpoint.

    Every file is verified before anything of it is used, and the shards of every tensor are counted at once.

    Args:
        manifest: of the checkpoint.
        kind: weights or optimizer.

    Attributes:
        entries: name -> type and shape of the full tensor.

    Raises:
        DamagedError: a file is missing, truncated or altered; a shard is missing, doubled or foreign.
    """

    def __init__(self, manifest: Manifest, kind: str):
        self._manifest, self._kind, self._headers = manifest, kind, {}
        if manifest.tensors is None:
            file = file_of(kind)
            self.entries = self._header(file)
            self._shards = {
                name: Shards.of([(file, [0] * len(entry.shape), list(entry.shape))])
                for name, entry in self.entries.items()
            }
            return
        self.entries = manifest.tensors[kind]
        try:
            for path in sorted(manifest.path.glob(f"{kind}*.safetensors")):
                if path.name not in manifest.files:
                    raise UserError(f"unexpected shards in {path.name}: {MANIFEST} does not list the file")
            self._shards = joined(kind, self.entries, manifest.files, manifest.degrees.devices)
        except UserError as error:
            raise DamagedError(manifest.path, str(error)) from None

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        """Reads a part of a tensor, or all of it, into a new array."""
        entry = self.entries[name]
        box = full_box(entry.shape) if box is None else box
        out, found = np.empty(size_of(box), TYPES[entry.dtype]), self._shards[name]
        low, high = np.array([[part.start, part.stop] for part in box], np.int64).reshape(-1, 2).T
        overlap = ((found.starts < high) & (found.stops > low)).all(1)
        for index in np.flatnonzero(overlap) if out.size else ():
            file, place = found.files[index], found.box(index)
            common = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(box, place))
            stored = self._header(file).get(name)
            if stored is None or stored.dtype != entry.dtype or stored.shape != size_of(place):
                raise DamagedError(self._manifest.path, f"{file} does not contain the shard of '{name}'")
            target = out[within(common, box)] if box else out
            with readable(self._manifest.path, file):
                read_part(self._manifest.path / file, stored, within(common, place), target)
        return out

    def read_finite(self, name: str, box: Box | None = None) -> np.ndarray:
        """Reads as `read` does; refuses numbers that are not finite (DamagedError)."""
        array = self.read(name, box)
        if not is_finite(array):
            raise DamagedError(self._manifest.path, f"'{name}' of its {self._kind} holds numbers that are not finite")
        return array

    def check_finite(self) -> None:
        """Reads every tensor, piece by piece, and refuses numbers that are not finite (DamagedError)."""
        for name, entry in self.entries.items():
            for box in pieces(full_box(entry.shape), np.dtype(TYPES[entry.dtype]).itemsize):
                self.read_finite(name, box)

    def _header(self, file: str) -> dict[str, Entry]:
        """Returns the header of a file; the first call verifies the file."""
        if file not in self._headers:
            verify(self._manifest, file)
            try:
                with readable(self._manifest.path, file):
                    self._headers[file] = _numbers_only(read_header(self._manifest.path / file))
            except (ValueError, KeyError) as error:
                raise DamagedError(self._manifest.path, f"{file} is not safetensors ({error})") from None
        return self._headers[file]


def _numbers_only(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Returns the header of a file of a checkpoint (ValueError: a type that checkpoints do not have)."""
    for name, entry in entries.items():
        if entry.dtype not in TYPES:
            raise ValueError(f"'{name}' is of type {entry.dtype}")
    return entries


def joined(kind: str, entries: dict[str, Entry], files: dict[str, dict], devices: int) -> dict[str, Shards]:
    """Collects the shards of each tensor from the files of all ranks.

    Args:
        kind: weights or optimizer.
        entries: name -> type and shape of the full tensor.
        files: name -> {slices: {name: {offsets, shape}}}; those of other kinds are left alone.
        devices: ranks that there may be.

    Raises:
        UserError: a shard is missing, doubled or foreign.
    """
    places: dict[str, list] = {name: [] for name in entries}
    for file, fields in files.items():
        if not file.startswith(f"{kind}-"):
            continue
        rank = file.removeprefix(f"{kind}-").partition("-")[0]
        known = rank.isascii() and rank.isdigit() and int(rank) < devices
        if not known or file != file_of(kind, int(rank), devices):
            raise UserError(f"unexpected shards in {file}: the checkpoint was written by {devices} devices")
        for name, place in (fields.get("slices") or {}).items():
            axes = len(entries[name].shape) if name in places else -1
            if not axes == len(place["offsets"]) == len(place["shape"]):
                raise UserError(f"unexpected shard of '{name}' in {file}: the checkpoint has no such tensor")
            places[name].append((file, place["offsets"], place["shape"]))
    shards = {}
    for name, found in places.items():
        if not found:
            raise UserError(f"missing shard of '{name}': no file contains any part of it")
        shards[name] = Shards.of(found)
        shards[name].check(name, entries[name].shape)
    return shards
