"""Checks whether two methods that must match still come from one class: a subclass may override only one of them.

Where one device calls one method and a compiled cluster, evaluation or generation another, a class of a user's own that
changes the first and inherits the second would be replaced by its parent, without a word. No MindSpore in here.
"""


def changed(cls: type, method: str, root: type) -> bool:
    """Returns whether a class that extends `root` overrides a method of `root`."""
    return any(method in one.__dict__ for one in cls.__mro__[: cls.__mro__.index(root)])


def changes_alone(cls: type, method: str, partners: tuple[str, ...], root: type) -> bool:
    """Returns whether a class overrides a method of `root` without overriding a partner in the same class or a nearer
    one.

    Args:
        cls: extends `root`.
        method: what one way calls.
        partners: what another way calls; one of them changed with the method is enough.
        root: whose methods belong together.
    """
    own = cls.__mro__[: cls.__mro__.index(root)]
    places = {name: _place(own, name) for name in (method, *partners)}
    return places[method] < len(own) and all(places[name] > places[method] for name in partners)


def _place(classes: tuple[type, ...], name: str) -> int:
    """Returns the index of the first class that defines a name; the number of classes where none does."""
    return next((index for index, one in enumerate(classes) if name in one.__dict__), len(classes))


def keeps(cls: type, method: str, partner: str) -> bool:
    """Returns whether the method `partner` of a class still matches `method`: no subclass has overridden `method`
    since.
    """
    at, besides = _place(cls.__mro__, method), _place(cls.__mro__, partner)
    return besides < len(cls.__mro__) and besides <= at
