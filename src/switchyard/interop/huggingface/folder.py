"""Reads a folder of Hugging Face: its texts, and parts of the tensors in its safetensors files.

Nothing outside the folder is read, and no pickle is opened: *.bin, *.pt and *.pth may run code when they are.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from switchyard.checkpoint.tensors import CODES, Box, Entry, full_box, read_header, size_of
from switchyard.config.reader import UnreadableError, parse_json
from switchyard.errors import UserError, represented, shortened
from switchyard.files import UnfitError, open_regular, read_regular
from switchyard.interop.huggingface.floats import FLOATS

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
# texts beside tokenizer.json that say how a tokenizer is used; vocabulary files repeat what tokenizer.json holds
TEXTS = (GENERATION, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
LONGEST = {INDEX: 1 << 28, TOKENIZER: 256 << 20}  # bytes
LONGEST_TEXT = 1 << 21
FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")


class Folder:
    """Holds what a folder has: its configuration, and where each tensor is.

    Args:
        path: of the folder.

    Attributes:
        path: of the folder.
        config: config.json.
        tensors: name -> (file, its entry).

    Raises:
        UserError: no such folder, or a file that is missing, damaged, of another format or outside the folder.

    Examples:
        >>> folder = Folder("models/mixtral")  # doctest: +SKIP
        >>> folder.config["model_type"], folder.dtype("lm_head.weight")  # doctest: +SKIP
        ('mixtral', 'BF16')
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            what = "is not a folder" if self.path.exists() else "does not exist"
            raise UserError(f"--model: '{self.path}' {what}; give a folder with {CONFIG} and *.safetensors")
        self.config = self._mapping(CONFIG)
        self.tensors: dict[str, tuple[str, Entry]] = {}

    def open_tensors(self) -> None:
        """Reads the headers of all safetensors files (UserError: a shard or a tensor is missing, or there are none)."""
        if (self.path / SINGLE).exists():
            self.tensors = {name: (SINGLE, entry) for name, entry in self._header(SINGLE).items()}
            return
        if not (self.path / INDEX).exists():
            raise UserError(f"--model: '{self.path}': {self._why_no_tensors()}")
        places = self._weight_map()
        for file in sorted(set(places.values())):
            header = self._header(file)
            for name in sorted(header.keys() ^ {name for name, place in places.items() if place == file}):
                what = f"is not in {INDEX}" if name in header else f"is missing: {INDEX} names it"
                raise UserError(f"--model: '{self.path / file}': tensor '{shortened(name)}' {what}; download it again")
            self.tensors |= {name: (file, entry) for name, entry in header.items()}

    def _weight_map(self) -> dict[str, str]:
        """Returns the file of each tensor by the index."""
        places = self._mapping(INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(f"--model: '{self.path / INDEX}': weight_map is missing; download it again")
        for name, file in places.items():
            if not (isinstance(file, str) and FILE.fullmatch(file)):
                reason = f"'{shortened(name)}' is in {represented(file)}, which is no name of a safetensors file here"
                raise UserError(f"--model: '{self.path / INDEX}': {reason}")
        return places

    def _why_no_tensors(self) -> str:
        """Says what is there in the place of safetensors files."""
        names = sorted(entry.name for entry in self.path.iterdir())
        pickles = [name for name in names if name.endswith(PICKLES)]
        if any(name.endswith(".safetensors") for name in names):
            return f"neither {SINGLE} nor {INDEX}; a download that is not complete: download it again"
        if pickles:
            return (
                f"{pickles[0]} is not safetensors and is never opened, because a pickle may run code; save the model "
                "with save_pretrained(..., safe_serialization=True) and import that"
            )
        return f"neither {SINGLE} nor {INDEX}; give a folder with a model"

    def _header(self, file: str) -> dict[str, Entry]:
        """Returns the tensors of a safetensors file (UserError)."""
        path = self.path / file
        try:
            with open_regular(path, folder=self.path):
                pass  # a link that leads out of the folder is refused here
            entries = read_header(path)
        except FileNotFoundError:
            raise UserError(f"--model: '{path}': the shard is missing, and {INDEX} names it; download it") from None
        except UnfitError as error:
            raise UserError(f"--model: '{path}' {error}; copy the folder with cp -rL") from None
        except (ValueError, KeyError) as error:
            raise UserError(f"--model: '{path}': not safetensors, or damaged ({error}); download it again") from None
        return entries

    def dtype(self, name: str) -> str:
        """Returns the type of a tensor: a key of floats.FLOATS (UserError: another type)."""
        file, entry = self.tensors[name]
        if entry.dtype not in FLOATS:
            raise UserError(
                f"--model: '{self.path / file}': tensor '{name}' is {entry.dtype}; quantised and whole-number weights "
                f"are not read: take a version in {', '.join(FLOATS.values())}"
            )
        return entry.dtype

    def read(self, name: str, box: Box) -> np.ndarray:
        """Reads consecutive rows of a tensor, or all of it; BF16 as its bits.

        The file is not mapped: pages would count as memory beside the array.
        """
        file, entry = self.tensors[name]
        code, box = np.dtype(CODES[entry.dtype]), box or full_box(entry.shape)
        row = math.prod(entry.shape[1:]) * code.itemsize
        first = box[0].start if box else 0
        out = np.empty((box[0].stop - first, *entry.shape[1:]) if box else (), code)
        with open_regular(self.path / file, folder=self.path) as source:
            source.seek(entry.start + first * row)
            if source.readinto(out.reshape(-1).view(np.uint8)) != out.nbytes:
                raise UserError(f"--model: '{self.path / file}': was changed while it was read; start again")
        return out if size_of(box) == out.shape else out[(slice(None), *box[1:])]

    def text(self, name: str) -> str | None:
        """Returns the text of a file; None where there is none (UserError: it cannot be read)."""
        path = self.path / name
        try:
            return read_regular(path, LONGEST.get(name, LONGEST_TEXT), self.path).decode("utf-8")
        except FileNotFoundError:
            return None
        except UnfitError as error:
            raise UserError(f"--model: '{path}' {error}; copy the folder with cp -rL") from None
        except UnicodeDecodeError:
            raise UserError(f"--model: '{path}': not UTF-8 text; download it again") from None

    def texts(self) -> dict[str, str]:
        """Returns the texts that go along with a model: name -> content of those that are there."""
        found = {name: self.text(name) for name in TEXTS}
        return {name: text for name, text in found.items() if text is not None}

    def _mapping(self, name: str) -> dict[str, Any]:
        """Returns a JSON object in a file (UserError)."""
        text = self.text(name)
        if text is None:
            raise UserError(f"--model: '{self.path / name}' is missing; give a folder that save_pretrained wrote")
        try:
            tree = parse_json(text)
        except UnreadableError as error:
            raise UserError(f"--model: '{self.path / name}': not JSON: {error.reason}") from None
        if not isinstance(tree, dict):
            raise UserError(f"--model: '{self.path / name}': not a JSON object; download it again")
        return tree
