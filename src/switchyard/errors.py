"""What a user did wrong, said in one line; and the exit codes of the command lines."""

from typing import Any

EXIT_OK = 0
EXIT_USER_ERROR = 2
EXIT_DISK = 74  # the disk was full, or failed: the same command may succeed later
EXIT_INTERRUPTED = 75  # a signal asked for a stop; the state was saved and --resume goes on
LONGEST = 80  # characters of a value that a message shows


class UserError(Exception):
    """A mistake in the input. Its text is one line that names the field, the value and the remedy.

    Attributes:
        exit_code: of a command that it ends.
    """

    exit_code = EXIT_USER_ERROR


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the run was saved. Its text says where."""


def shortened(value: object, longest: int = LONGEST) -> str:
    """Returns a value as messages show it: text as it is typed, one line, at most about `longest` characters.

    Characters that a terminal obeys instead of showing them are written as escapes. A list or table is read only as far
    as it is shown, because it may hold itself or expand to gigabytes.
    """
    text = value if isinstance(value, str) else _outline(value, longest)
    if len(text) > 2 * longest:  # escapes make it longer: escape no more than is shown
        text = f"{text[:longest]} ... {text[-longest // 4 :]}"
    text = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
    if len(text) <= longest:
        return text
    return f"{text[: longest - 20]} ... {text[-10:]}"


def represented(value: object, longest: int = LONGEST) -> str:
    """Returns `repr(value)`, text between quotes, as `shortened` shows it."""
    return shortened(repr(value[: 2 * longest]) if isinstance(value, str) else value, longest)


def _outline(value: object, room: int) -> str:
    """Returns the beginning of `repr(value)`, made of as many parts as fit into `room` characters."""
    if isinstance(value, dict | list | tuple):
        return _outline_of_parts(value, room - 2) if room > 2 else "..."  # one that holds itself ends so
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return f"a number of {value.bit_length()} bits"  # int to text: quadratic, and refused above 4,300 digits
    if isinstance(value, str | bytes):
        value = value[: 2 * room]
    return repr(value)


def _outline_of_parts(value: dict[Any, Any] | list[Any] | tuple[Any, ...], room: int) -> str:
    opening, closing = "{}" if isinstance(value, dict) else "()" if isinstance(value, tuple) else "[]"
    parts: list[str] = []
    used = 0
    for part in value:
        if used >= room:
            return f"{opening}{', '.join(parts)}, ...{closing}"
        text = _outline(part, room - used)
        if isinstance(value, dict):
            text = f"{text}: {_outline(value[part], room - used - len(text))}"
        parts.append(text)
        used += len(text) + 2
    return f"{opening}{', '.join(parts)}{closing}"
