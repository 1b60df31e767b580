"""Keeps, in the state of a checkpoint, what config.json and its neighbours said when a model was imported.

An export takes over what our configuration has no key for: token ids, the longest text, the tokenizer's template, the
type of each tensor. Resharding a checkpoint keeps the state.
"""

from collections import Counter
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from switchyard.errors import UserError
from switchyard.interop.huggingface.family import Family
from switchyard.interop.huggingface.floats import FLOATS
from switchyard.interop.huggingface.folder import TEXTS, Folder

KEY = "huggingface"  # of the state
Text, Dtype = Literal[TEXTS], Literal[tuple(FLOATS)]  # a state may come from somebody else: no other file is written


class Origin(BaseModel):
    """Holds what an import kept.

    Attributes:
        model_type: of the family.
        config: config.json.
        texts: name of a file -> its text, see folder.TEXTS.
        dtype: type of most tensors, a key of floats.FLOATS.
        others: name of a tensor -> its type, where that is another.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model_type: str
    config: dict[str, Any]
    texts: dict[Text, str]
    dtype: Dtype
    others: dict[str, Dtype] = {}

    def dtype_of(self, name: str) -> str:
        """Returns the type of a tensor, a key of floats.FLOATS."""
        return self.others.get(name, self.dtype)


def origin_of(folder: Folder, family: Family) -> dict[str, Any]:
    """Returns what the state of an imported checkpoint keeps of its folder."""
    types = {name: entry.dtype for name, (_, entry) in folder.tensors.items() if entry.dtype in FLOATS}
    usual = Counter(types.values()).most_common(1)[0][0]
    others = {name: dtype for name, dtype in types.items() if dtype != usual}
    origin = Origin(
        model_type=family.model_type, config=folder.config, texts=folder.texts(), dtype=usual, others=others
    )
    return origin.model_dump()


def read_origin(state: dict[str, Any], path: Path) -> Origin | None:
    """Returns what the state of a checkpoint keeps, None where it was not imported (UserError: it is damaged)."""
    if state.get(KEY) is None:
        return None
    try:
        return Origin.model_validate(state[KEY])
    except ValidationError as error:
        raise UserError(f"checkpoint '{path}': state.json: {KEY}: {error.errors()[0]['msg']}") from None
