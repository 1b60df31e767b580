"""Finds the configurations that come with the package: those of config/ in a repository, of recipes/ in a wheel."""

import os
from pathlib import Path

import switchyard

PACKAGE = Path(switchyard.__file__).resolve().parent


def folder() -> Path | None:
    """Returns the folder of the shipped configurations; None where neither a wheel nor a repository has one."""
    for place in (PACKAGE / "recipes", PACKAGE.parents[1] / "config"):
        if (place / "quickstart.yaml").is_file():
            return place
    return None


def names() -> list[str]:
    """Returns the names that `--config NAME` takes, sorted."""
    place = folder()
    return sorted(path.stem for path in place.glob("*.yaml")) if place else []


def find(path: str | Path) -> Path:
    """Returns the file that `--config` means.

    Args:
        path: a file, or the name of a shipped configuration such as "quickstart" or "quickstart.yaml".

    Returns:
        `path` where something exists there or where no shipped configuration has the name; else the shipped file.

    Examples:
        >>> find("quickstart").name
        'quickstart.yaml'
        >>> str(find("my/own.yaml"))
        'my/own.yaml'
    """
    path, place = Path(path), folder()
    if place is None or path.parent != Path(".") or os.path.exists(path):  # Path.exists fails where a name is too long
        return path
    shipped = place / f"{path.name.removesuffix('.yaml')}.yaml"
    return shipped if os.path.isfile(shipped) else path
