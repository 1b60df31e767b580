"""Keeps the compiled training graph in a folder, so that the next run of the same program need not compile it.

MindSpore's own cache does not notice a changed number in a Cell: it would hand out a graph of another configuration.
So each program has a folder of its own here, named by a digest of all that the graph is made of.
"""

import contextlib
import hashlib
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import mindspore as ms
import numpy as np

import switchyard
from switchyard.config import Config
from switchyard.errors import UserError
from switchyard.file_errors import writing
from switchyard.files import remove, unfinished
from switchyard.trust import own_names

DIGEST = "digest"  # beside the graph, of its file: a damaged graph is not loaded
OUTSIDE = {"train": {"name", "output", "loggers"}, "context": {"compile_cache"}}  # keys that no graph depends on


@contextlib.contextmanager
def compile_cache(config: Config, shapes: dict[str, tuple[int, ...]], say: Callable[[str], None]) -> Iterator[None]:
    """Lets what is compiled inside come from, or go to, the folder that context.compile_cache names.

    Args:
        config: of the run; where context.compile_cache is null nothing happens.
        shapes: of the parameters, by name.
        say: receives a line about what the cache does.

    Raises:
        UserError: the folder cannot be written.
    """
    parent = config.context.compile_cache
    if parent is None:
        yield
    elif own_names(config.moe):
        say("context.compile_cache: not used, since the run has code of its own, of which no digest is taken")
        yield
    else:
        folder = Path(parent) / digest_of(config, shapes)
        yield from _cached(folder, say)


def _cached(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Compiles with a program's folder, which appears whole or not at all."""
    if folder.is_dir() and not is_whole(folder):
        say(f"context.compile_cache: {folder} is damaged, and is made anew")
        remove(folder)
    if folder.is_dir():
        with _switched_on(folder):
            yield
        return
    with writing(folder), unfinished(folder.absolute()) as new:
        with _switched_on(new):
            yield
        found = graph_of(new)
        if found is not None:
            (new / DIGEST).write_text(digest_of_file(found), encoding="ascii")
            with contextlib.suppress(OSError):  # another process of the same program was faster
                os.rename(new, folder)


@contextlib.contextmanager
def _switched_on(folder: Path) -> Iterator[None]:
    """Has MindSpore's compile cache in a folder, for what is compiled inside alone."""
    ms.set_context(enable_compile_cache=True, compile_cache_path=str(folder))
    try:
        yield
    finally:
        ms.set_context(enable_compile_cache=False)


def graph_of(folder: Path) -> Path | None:
    """Returns the file of the graph that MindSpore has written in a folder, or None."""
    return next(iter(sorted(folder.glob("rank_*/graph_cache/*.mindir"))), None)


def is_whole(folder: Path) -> bool:
    """Returns whether the graph of a folder is the one that was written there."""
    graph = graph_of(folder)
    try:
        return graph is not None and digest_of_file(graph) == (folder / DIGEST).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return False


def digest_of_file(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digest_of(config: Config, shapes: dict[str, tuple[int, ...]]) -> str:
    """Returns a digest of all that the training graph is made of: configuration, code, versions, device, shapes."""
    tree = config.model_dump(mode="json")
    for section, keys in OUTSIDE.items():
        tree[section] = {key: value for key, value in tree[section].items() if key not in keys}
    found = hashlib.sha256(repr(sorted(tree.items())).encode())
    target = ms.get_context("device_target")
    for part in (
        sorted(shapes.items()),
        ms.__version__,
        np.__version__,
        platform.machine(),
        target,
        platform.python_version(),
    ):
        found.update(f"\n{part}".encode())
    root = Path(switchyard.__file__).parent
    for path in sorted(root.rglob("*.py")):
        found.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return found.hexdigest()[:32]


def require_one_device(config: Config) -> None:
    """Refuses the cache on several devices, whose graphs it was never tried with (UserError)."""
    if config.context.compile_cache is not None and config.devices > 1:
        raise UserError(
            f"context.compile_cache: {config.context.compile_cache!r}; works on one device, here are {config.devices}: "
            "leave it out"
        )
