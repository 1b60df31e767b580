"""JSON that every reader understands: numbers that are not finite have no word in it (RFC 8259)."""

import json
import math
from typing import Any


def to_json(value: Any, **options: Any) -> str:
    """Returns `value` as JSON text, with null in the place of NaN and infinities.

    Args:
        value: what `json.dumps` takes.
        options: those of `json.dumps`.
    """
    return json.dumps(with_nulls(value), allow_nan=False, **options)


def with_nulls(value: Any) -> Any:
    """Returns the same value with None for each number that is not finite."""
    if isinstance(value, dict):
        return {key: with_nulls(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_nulls(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
