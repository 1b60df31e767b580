"""Imports packages that only some uses need; one line says what to install where a package is missing."""

import importlib
import importlib.util
from types import ModuleType

from switchyard.errors import UserError


def is_installed(module: str) -> bool:
    """Returns whether a top-level module can be found; does not import the module."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def require(module: str, package: str, purpose: str) -> ModuleType:
    """Imports a module of an optional package.

    Args:
        module: the name to import, such as "sklearn.datasets".
        package: what `pip install` takes, such as "scikit-learn".
        purpose: the key or option with its value that needs the package; the beginning of the message.

    Returns:
        The module.

    Raises:
        UserError: the package is not installed, or fails while it is imported.

    Examples:
        >>> require("math", "python", "example").floor(1.5)
        1
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.partition(".")[0] == error.name.partition(".")[0]:
            raise UserError(f"{purpose}; needs the package {package}; pip install {package}") from None
        raise UserError(f"{purpose}; {package} needs the module {error.name}; pip install {package}") from None
    except ImportError as error:
        raise UserError(f"{purpose}; {package} cannot be imported: {' '.join(str(error).split())}") from None
