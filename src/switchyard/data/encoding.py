"""Encodes units of input: documents become ids, instruction data become ids with a mask of what is learned.

Records of instruction data, in JSON lines or Parquet:

    {"prompt": "...", "response": "..."}                            the response and the separator are learned
    {"messages": [{"role": "user", "content": "..."}, ...]}         what the assistant says, and the separator
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from switchyard.data.document import Document
from switchyard.data.inputs import SourceFile, Unit
from switchyard.data.split import hash_fraction
from switchyard.data.tokenizer import Tokenizer
from switchyard.errors import UserError

ASSISTANT = "assistant"


class Part(NamedTuple):
    """Holds what a unit gives to one split."""

    ids: np.ndarray  # [T] int32
    mask: np.ndarray | None  # [T] uint8; None outside instruction data
    documents: int
    bytes: int


class Encoded(NamedTuple):
    """Holds a unit as ids, and a line for each part of it that cannot be read."""

    train: Part
    validation: Part
    problems: list[str]


@dataclass
class _Side:
    """Collects one split."""

    pieces: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    documents: int = 0
    bytes: int = 0


class Encoder:
    """Encodes units.

    Args:
        tokenizer: of all units.
        text_field: field of a record that holds its text; None reads instruction data.
        fraction: of the records of a file that validate, drawn by a hash of file name and number.
    """

    def __init__(self, tokenizer: Tokenizer, text_field: str | None, fraction: float):
        self._tokenizer, self._field, self._fraction = tokenizer, text_field, fraction
        mark = [] if tokenizer.separator is None else [tokenizer.separator]
        self._mark = np.array(mark, np.int32)

    def __call__(self, unit: Unit) -> Encoded:
        """Returns the ids of a unit."""
        sides, problems = (_Side(), _Side()), []
        if isinstance(unit.content, str):
            problems.append(unit.content)
        elif unit.file.kind == "text":
            self._add_text(unit, sides[bool(unit.validates)], problems)
        else:
            self._add_records(unit, sides, problems)
        return Encoded(*(self._part(side) for side in sides), problems)

    def _part(self, side: _Side) -> Part:
        ids = np.concatenate(side.pieces).astype(np.int32) if side.pieces else np.zeros(0, np.int32)
        mask = None
        if self._field is None:
            mask = np.concatenate(side.masks) if side.masks else np.zeros(0, np.uint8)
        return Part(ids, mask, side.documents, side.bytes)

    def _add_text(self, unit: Unit, side: _Side, problems: list[str]) -> None:
        """Appends a part of a text file; a line that cannot be read is left out."""
        if self._field is None:
            problems.append(f"'{unit.file.name}': is text; instruction data are JSON lines or Parquet")
            return
        ids = self._ids_of_text(unit, unit.content)
        if ids is None:
            offset, kept = unit.first, []
            for line in unit.content.splitlines(keepends=True):
                reason = self._fault(line)
                if reason:
                    problems.append(f"'{unit.file.name}' offset {offset:,}: {reason}")
                else:
                    kept.append(line)
                offset += len(line)
            ids = self._ids_of_text(unit, b"".join(kept))
            if ids is None:
                problems.append(f"'{unit.file.name}' offset {unit.first:,}: cannot be encoded")
                ids = np.zeros(0, np.int32)
        ends = unit.ends and (len(ids) > 0 or unit.first > 3)  # an empty document leaves no trace
        self._append(side, ids, ends)

    def _ids_of_text(self, unit: Unit, raw: bytes) -> np.ndarray | None:
        """Returns the ids of bytes of text; None where a part of them cannot be encoded."""
        if self._fault_of_bytes(raw):
            return None
        try:
            return next(self._tokenizer.encode_each([Document(unit.file.name, raw, "--input")]))
        except UserError:
            return None

    def _fault_of_bytes(self, raw: bytes) -> str | None:
        place = raw.find(b"\0")
        if place >= 0:
            return f"a NUL, {place:,} bytes on, is reserved as the separator of documents"
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            return f"byte 0x{raw[error.start]:02x}, {error.start:,} bytes on, is not UTF-8"
        return None

    def _fault(self, line: bytes) -> str | None:
        """Returns why one line of text cannot be encoded."""
        reason = self._fault_of_bytes(line)
        if reason is None:
            try:
                self._tokenizer.encode(line.decode("utf-8"))
            except UserError as error:
                reason = str(error)
        return reason

    def _append(self, side: _Side, ids: np.ndarray, ends: bool, mask: np.ndarray | None = None) -> None:
        """Appends ids [T] and, where a document ends, the separator, which is learned."""
        side.bytes += self._tokenizer.byte_length(ids) + len(self._mark) * ends
        side.documents += ends
        side.pieces += [ids, self._mark] if ends else [ids]
        if mask is not None:
            side.masks += [mask, np.ones(len(self._mark), np.uint8)]

    def _add_records(self, unit: Unit, sides: tuple[_Side, _Side], problems: list[str]) -> None:
        """Appends records, all of a unit together where the tokenizer takes them."""
        found = list(_records(unit, problems))
        if self._field is None:
            for number, record in found:
                self._add_instruction(unit, number, record, sides, problems)
            return
        texts = []
        for number, record in found:
            text = record.get(self._field) if isinstance(record, dict) else record
            reason = _fault_of_text(text, self._field)
            if reason:
                problems.append(f"{_place(unit, number)}: {reason}")
            elif text:
                texts.append((number, text))
        for (number, _), ids in zip(texts, self._encode_texts(unit, texts, problems)):
            if ids is not None:
                self._append(sides[self._validates(unit.file, number, unit.validates)], ids, ends=True)

    def _encode_texts(self, unit: Unit, texts: list[tuple[int, str]], problems: list[str]) -> list[np.ndarray | None]:
        """Returns the ids of each text; None for a text that the tokenizer refuses."""
        documents = [Document("", text.encode("utf-8"), "") for _, text in texts]
        try:
            if not any(b"\0" in document.raw for document in documents):
                return list(self._tokenizer.encode_each(documents)) if documents else []
        except UserError:
            pass  # one by one, to name the record
        out: list[np.ndarray | None] = []
        for number, text in texts:
            try:
                out.append(self._tokenizer.encode(text))
            except UserError as error:
                problems.append(f"{_place(unit, number)}: {error}")
                out.append(None)
        return out

    def _add_instruction(self, unit: Unit, number: int, record: Any, sides, problems: list[str]) -> None:
        """Appends one record of instruction data."""
        try:
            turns = list(turns_of(record))
            pieces = [(self._tokenizer.encode(text), learned) for text, learned in turns if text]
        except (UserError, ValueError) as error:
            problems.append(f"{_place(unit, number)}: {error}")
            return
        ids = np.concatenate([ids for ids, _ in pieces])
        mask = np.concatenate([np.full(len(ids), learned, np.uint8) for ids, learned in pieces])
        self._append(sides[self._validates(unit.file, number, unit.validates)], ids, ends=True, mask=mask)

    def _validates(self, file: SourceFile, number: int, whole: bool | None) -> bool:
        return hash_fraction(f"{file.name}:{number}") < self._fraction if whole is None else whole


def turns_of(record: Any) -> Iterator[tuple[str, bool]]:
    """Yields the texts of a record of instruction data, each with whether it is learned.

    Messages are written as `role: content` and a line end; of the assistant's the content and the line end are learned.

    Raises:
        ValueError: another record; says what is missing.
    """
    if isinstance(record, dict) and record.get("messages"):
        messages = record["messages"]
        if not isinstance(messages, list) or not any(_is_answer(message) for message in messages):
            raise ValueError("'messages' has no message of the role assistant")
        for message in messages:
            role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
            _require_text(role, "messages.role")
            _require_text(content, "messages.content")
            yield f"{role}: ", False
            yield f"{content}\n", role == ASSISTANT
        return
    if not isinstance(record, dict):
        raise ValueError("is not an object with prompt and response, or messages")
    for key in ("prompt", "response"):
        _require_text(record.get(key), key)
        yield record[key], key == "response"


def _is_answer(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == ASSISTANT


def _require_text(value: Any, key: str) -> None:
    if reason := _fault_of_text(value, key) or ("" if value else f"'{key}' is empty"):
        raise ValueError(reason)


def _fault_of_text(text: Any, key: str) -> str | None:
    """Returns why a field is no text that can be encoded."""
    if not isinstance(text, str):
        return f"no text in the field '{key}'"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"a lone surrogate at position {error.start:,} of '{key}'"
    return None


def _place(unit: Unit, number: int) -> str:
    """Names a record for messages."""
    return f"'{unit.file.name}' {'row' if unit.file.kind == 'parquet' else 'line'} {number:,}"


def _records(unit: Unit, problems: list[str]) -> Iterator[tuple[int, Any]]:
    """Yields (number, record) of lines of JSON or rows of Parquet; bytes of rows become text."""
    if unit.file.kind == "parquet":
        for number, row in enumerate(unit.content, unit.first):
            try:
                yield number, row.decode("utf-8") if isinstance(row, bytes) else row
            except UnicodeDecodeError as error:
                problems.append(f"{_place(unit, number)}: not UTF-8 at byte {error.start:,}")
        return
    for number, line in enumerate(unit.content.split(b"\n"), unit.first):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not JSON"
            problems.append(f"{_place(unit, number)}: {reason}: {' '.join(str(error).split())[:120]}")


def texts_of(unit: Unit, text_field: str | None) -> Iterator[str]:
    """Yields the texts of a unit that a tokenizer is trained on; leaves out what cannot be read."""
    if unit.file.kind == "text":
        yield unit.content.decode("utf-8", "ignore").replace("\0", "")
        return
    for _, record in _records(unit, []):
        if text_field is None:
            try:
                yield from [text for text, _ in turns_of(record)]
            except ValueError:
                continue
        else:
            text = record.get(text_field) if isinstance(record, dict) else record
            if not _fault_of_text(text, text_field):
                yield text
