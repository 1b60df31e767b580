"""Reads a section of a MindFormers file key by key, and remembers what nobody has read. No MindSpore in here."""

from dataclasses import dataclass, field
from typing import Any

from switchyard.errors import UserError, represented

UNKNOWN = "unknown key"


@dataclass(frozen=True)
class Left:
    """Is a key that has no counterpart, and why."""

    key: str
    value: Any
    why: str

    def __str__(self) -> str:
        return f"{self.key}: {represented(self.value)}; {self.why}"


@dataclass
class Reader:
    """Hands out the values of a section; what was never asked for is unknown.

    Args:
        name: of the section, as messages name it.
        values: key -> value.

    Attributes:
        left: what has no counterpart, in the order in which it was found.
        decided: keys that were given and that this package decides by itself.

    Examples:
        >>> reader = Reader("moe_config", {"expert_num": 8, "colour": "red"})
        >>> reader.take("expert_num", default=1), reader.take("capacity_factor", default=1.1)
        (8, 1.1)
        >>> [str(one) for one in reader.finish()]
        ["moe_config.colour: 'red'; unknown key"]
    """

    name: str
    values: dict[str, Any]
    left: list[Left] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)
    decided: list[str] = field(default_factory=list)

    def take(self, *names: str, default: Any = None, kind: type | tuple | None = None) -> Any:
        """Returns the value of a key that has several names; the default where none is given, or null is.

        Raises:
            UserError: two names are given with different values, or the value is not of a `kind`.
        """
        given = [name for name in names if self.values.get(name) is not None]
        self.taken.update(names)
        if not given:
            return default
        value = self.values[given[0]]
        for other in given[1:]:
            if self.values[other] != value:
                mine, own = represented(self.values[other]), represented(value)
                raise UserError(f"{self.name}.{other}: {mine}; the same key is {own} as '{given[0]}': give one of them")
        wrong = kind is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool))
        if wrong:
            kinds = kind if isinstance(kind, tuple) else (kind,)
            wanted = " or ".join(one.__name__ for one in kinds)
            raise UserError(f"{self.name}.{given[0]}: {represented(value)}; must be of type {wanted}")
        return value

    def leave(self, names: str | tuple[str, ...], why: str, usual: Any = None) -> None:
        """Notes keys that have no counterpart, unless they are absent, null or at a value that changes nothing."""
        for name in [names] if isinstance(names, str) else names:
            value = self.values.get(name)
            self.taken.add(name)
            if value is not None and value != usual:
                self.left.append(Left(f"{self.name}.{name}", value, why))

    def skip(self, *names: str) -> None:
        """Notes that keys need no counterpart: this package decides the same by itself."""
        self.taken.update(names)
        self.decided += [f"{self.name}.{name}" for name in names if self.values.get(name) is not None]

    def finish(self) -> list[Left]:
        """Returns all that is left, with the keys that nobody has asked for."""
        unknown = [name for name in self.values if name not in self.taken]
        return self.left + [Left(f"{self.name}.{name}", self.values[name], UNKNOWN) for name in unknown]
