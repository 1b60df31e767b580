"""Finds classes of a user's own by the name that the configuration has: registered, or `module.Class` in a file."""

from collections.abc import Callable

from switchyard.errors import UserError
from switchyard.trust import import_class, is_own


class Registry:
    """Holds the classes, or functions, of one kind by name.

    Args:
        key: of the configuration that names one, for messages.
        allowed: what an entry must be, for messages.
        accepts: tells whether an object is one.

    Examples:
        >>> losses = Registry("moe.losses", "a function", callable)
        >>> losses.add("size", len)
        >>> losses.find("size")([1, 2, 3])
        3
    """

    def __init__(self, key: str, allowed: str, accepts: Callable[[object], bool]):
        self.key, self.allowed, self.accepts, self.known = key, allowed, accepts, {}

    def add(self, name: str, found: Callable) -> None:
        """Makes an entry known under a name; a later one replaces it."""
        self.known[name] = found

    def find(self, name: str) -> Callable:
        """Returns the entry of a name, or imports the one that `module.Class` names.

        Raises:
            UserError: there is none, it cannot be imported, or it is something else.
        """
        if name in self.known:
            return self.known[name]
        if not is_own(name):
            known = f"registered: {', '.join(sorted(self.known)) or 'none'}"
            raise UserError(f"{self.key}: {name!r}; {known}: write module.Class of a file of your own, or register it")
        found = import_class(name, self.key)
        if not self.accepts(found):
            raise UserError(f"{self.key}: {name!r}; must be {self.allowed}")
        return found


def classes_of(key: str, base: type) -> Registry:
    """Returns the registry of the classes that extend `base`."""

    def accepts(found: object) -> bool:
        return isinstance(found, type) and issubclass(found, base)

    return Registry(key, f"a class that extends switchyard.{base.__name__}", accepts)
