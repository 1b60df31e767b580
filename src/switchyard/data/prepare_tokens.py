"""Writes token shards from input of any size: in parallel, with bounded memory, and resumable after a kill.

The work is done in a folder beside the result:

    .NAME.preparing/plan.json       what was asked, and name, size and time of each input file
    .NAME.preparing/progress.jsonl  a line for each pair of finished shards: both, and the unit of input behind them
    .NAME.preparing/*.npy           finished shards, and perhaps one that a kill interrupted

The manifest is written last; then the folder gets its name. The order of the tokens follows from the input alone, so
neither the number of processes nor a kill changes a byte.
"""

import contextlib
import fcntl
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from switchyard.data import shards
from switchyard.data.bpe import train_bpe
from switchyard.data.document import Document
from switchyard.data.encoding import Encoded, texts_of
from switchyard.data.inputs import BINARY, UNIT, BadSource, SourceFile, Unit, find_files, is_compressed, units_of
from switchyard.data.shards import Shard, ShardWriter, TokenManifest
from switchyard.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, read_tokenizer
from switchyard.data.workers import encode_in_order
from switchyard.errors import UserError
from switchyard.file_errors import writing
from switchyard.files import flush_tree, remove

PLAN, PROGRESS = "plan.json", "progress.jsonl"
SAMPLE = 64 << 20  # bytes of text that a BPE is trained on
SHOWN = 5  # problems that are printed
SECONDS = 10  # between two lines of progress
SMALL = 4 * UNIT  # bytes of input that this process encodes alone: other processes take a second to start
Place = tuple[int, int]  # file, unit in the file


@dataclass(frozen=True)
class Plan:
    """Holds what is asked for.

    Attributes:
        source, val_path: text, folder or glob for training, and for validation; None holds out `val_fraction`.
        tokenizer: byte, char or a path; None trains a BPE of `vocab_size`.
        vocab_size: of that BPE.
        val_fraction: part that validates.
        text_field: of records; None reads instruction data.
        shard_tokens: tokens from which on a shard is closed.
    """

    source: str
    val_path: str | None = None
    tokenizer: str | None = None
    vocab_size: int = 4096
    val_fraction: float = 0.1
    text_field: str | None = "text"
    shard_tokens: int = 1 << 25


def prepare_tokens(plan: Plan, out: Path, seq_length: int, workers: int, skip: bool = False) -> Path:
    """Writes the folder `out`, or goes on where an interrupted call stopped, and returns it.

    Args:
        plan: what to read and how.
        out: must not exist.
        seq_length: of which the text must fill at least one sequence.
        workers: processes that encode.
        skip: leave out what cannot be read; it ends the preparation otherwise.

    Raises:
        UserError: unreadable or too little text, another preparation at work or unfinished with other arguments.
    """
    fraction = 0.0 if plan.val_path else plan.val_fraction
    files = find_files(plan.source, fraction)
    if plan.val_path:
        files += _distinct(find_files(plan.val_path, 1.0, "--val-path"), files, plan.val_path)
    with _work_folder(out) as work:
        _check_plan(work, plan, files)
        tokenizer = _tokenizer(work, plan, files)
        job = _Job(work, plan, files, tokenizer, skip)
        small = sum(file.size for file in files) < SMALL
        job.run(1 if small else workers)
        manifest = job.manifest(_describe(plan, files), seq_length)
        shards.write_manifest(work, manifest)
        for name in (PROGRESS, PLAN):  # a kill between them leaves a plan without progress, which begins anew
            (work / name).unlink()
        flush_tree(work)
        os.rename(work, out)
    return out


def _distinct(held_out: list[SourceFile], files: list[SourceFile], val_path: str) -> list[SourceFile]:
    known = {os.path.realpath(file.path) for file in files}
    for file in held_out:
        if os.path.realpath(file.path) in known:
            raise UserError(f"--val-path: '{val_path}'; '{file.name}' is also text of --input; give other text")
    return held_out


def _describe(plan: Plan, files: list[SourceFile]) -> str:
    return f"'{plan.source}': {len(files):,} files, {sum(file.size for file in files) / 1e6:,.1f} MB"


@contextlib.contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """Makes or finds the folder of the work, for this process alone; removes it where no shard was finished."""
    work = out.absolute().with_name(f".{out.name}.preparing")
    try:
        work.mkdir(parents=True, exist_ok=True)
        handle = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"--out: '{out}'; {error.strerror}; give a folder that can be created") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--out: '{out}'; another process is preparing it; wait for it or stop it") from None
        try:
            yield work
        finally:
            if work.exists() and not _lines(work):
                remove(work)
    finally:
        os.close(handle)


def _check_plan(work: Path, plan: Plan, files: list[SourceFile]) -> None:
    """Writes the plan, or compares it with that of the interrupted preparation."""
    text = json.dumps({"plan": asdict(plan), "files": [asdict(file) for file in files]}, allow_nan=False)
    if not _lines(work):
        with writing(work / PLAN):
            (work / PLAN).write_text(text)
        return
    before = (work / PLAN).read_text() if (work / PLAN).exists() else ""
    if before != text:
        raise UserError(
            f"--out: '{work}' holds an unfinished preparation with other arguments or of files that changed since; "
            "remove that folder, or repeat the arguments"
        )


def _lines(work: Path) -> list[dict[str, Any]]:
    """Returns the finished pairs of shards; a line that a kill cut off does not count."""
    found = []
    with contextlib.suppress(FileNotFoundError, ValueError):
        for line in (work / PROGRESS).read_text().splitlines(keepends=True):
            found.append(json.loads(line if line.endswith("\n") else "cut"))
    return found


def _tokenizer(work: Path, plan: Plan, files: list[SourceFile]) -> Tokenizer:
    """Returns the tokenizer of the interrupted preparation, or the one that the plan names."""
    place = work / shards.TOKENIZER
    if _lines(work) and place.exists():
        return Tokenizer.from_json(place.read_text(encoding="utf-8"), str(place))
    if plan.tokenizer == "byte":
        made: Tokenizer = ByteTokenizer()
    elif plan.tokenizer == "char":
        units = (unit for file in files for unit in _readable(file, plan))
        texts = (text for unit in units for text in texts_of(unit, plan.text_field))
        made = CharTokenizer("".join(sorted({"\0"}.union(*map(set, texts)))), separated=True)
    elif plan.tokenizer:
        made = read_tokenizer(plan.tokenizer)
    else:
        made = train_bpe(_sample(plan, files), plan.vocab_size)
    with writing(place):
        place.write_text(made.to_json(), encoding="utf-8")
    return made


def _readable(file: SourceFile, plan: Plan) -> Iterator[Unit]:
    """Yields the units of a file as far as the file can be read."""
    fraction = 0.0 if plan.val_path else plan.val_fraction
    fields = None if plan.text_field is None else (plan.text_field,)
    with contextlib.suppress(BadSource):
        yield from units_of(file, fraction, fields)


def _sample(plan: Plan, files: list[SourceFile]) -> Iterator[Document]:
    """Yields training text, at most SAMPLE bytes: the first part of each file, by its share in all bytes."""
    total = max(sum(file.size for file in files), 1)
    for file in files:
        left = SAMPLE * max(file.size / total, 1 / len(files)) if total > SAMPLE else total * 100
        for unit in _readable(file, plan):
            if unit.validates or left <= 0:
                break
            for text in texts_of(unit, plan.text_field):
                left -= len(text)
                yield Document(file.name, text.encode("utf-8"))


class _Job:
    """Encodes the input and writes the shards, from the last finished pair on."""

    def __init__(self, work: Path, plan: Plan, files: list[SourceFile], tokenizer: Tokenizer, skip: bool):
        self._work, self._plan, self._files, self._tokenizer, self._skip = work, plan, files, tokenizer, skip
        self._dtype, self._masked = shards.token_type(tokenizer.vocab_size), plan.text_field is None
        self._writers = {name: ShardWriter(work, name, self._dtype, self._masked) for name in shards.SPLITS}
        done = _lines(work)
        self._next: Place = tuple(done[-1]["next"]) if done else (0, 0)
        self._skipped = done[-1]["skipped"] if done else 0
        self._shown = 0
        self._shards = {
            name: [Shard.model_validate(line[name]) for line in done if line[name]] for name in shards.SPLITS
        }
        self._commits = len(done)
        self._tokens = self._resumed = sum(shard.tokens for side in self._shards.values() for shard in side)
        self._started = self._said = time.monotonic()
        self._remove_unfinished(done)
        if done:
            print(f"goes on after {self._commits:,} finished shards, {self._tokens:,} tokens", flush=True)

    def _remove_unfinished(self, done: list[dict[str, Any]]) -> None:
        """Removes the shard and the line that a kill interrupted."""
        kept = {name for side in self._shards.values() for shard in side for name in (shard.file, shard.mask)}
        for path in self._work.glob("*.npy"):
            if path.name not in kept:
                path.unlink()
        if done:
            whole = self._work / f"{PROGRESS}.new"
            with writing(whole):
                whole.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in done))
                os.replace(whole, self._work / PROGRESS)

    def run(self, workers: int) -> None:
        """Encodes all that is left of the input."""
        fraction = 0.0 if self._plan.val_path else self._plan.val_fraction
        encoded = encode_in_order(self._units(), self._tokenizer, self._plan.text_field, fraction, workers)
        with contextlib.closing(encoded):
            for place, found in encoded:
                self._add(found)
                self._next = (place[0], place[1] + 1)
                if any(writer.tokens >= self._plan.shard_tokens for writer in self._writers.values()):
                    self._commit()
                self._say(*self._next)
        self._next = (len(self._files), 0)
        if any(writer.tokens for writer in self._writers.values()):
            self._commit()
        self._say(len(self._files), 0, last=True)

    def _units(self) -> Iterator[tuple[Place, Unit]]:
        """Yields the units behind the last finished shards; files before them are not opened."""
        start_file, start_unit = self._next
        fraction = 0.0 if self._plan.val_path else self._plan.val_fraction
        fields = None if self._plan.text_field is None else (self._plan.text_field,)
        for number, file in enumerate(self._files[start_file:], start_file):
            first = start_unit if number == start_file else 0
            try:
                units = enumerate(units_of(file, fraction, fields))
                for index, unit in itertools.islice(units, first, None):
                    yield (number, index), unit
            except BadSource as error:  # takes its turn, so that it is counted once whatever is interrupted
                yield (number + 1, -1), Unit(file, 0, str(error))

    def _add(self, found: Encoded) -> None:
        for problem in found.problems:
            self._note(problem, self._skip or (problem.endswith(BINARY) and len(self._files) > 1))
        for name, part in zip(shards.SPLITS, (found.train, found.validation)):
            if len(part.ids):
                self._writers[name].add(part.ids, part.mask, part.documents, part.bytes)
                self._tokens += len(part.ids)

    def _note(self, problem: str, skip: bool) -> None:
        """Prints what is left out, and counts it (UserError where nothing may be left out)."""
        if not skip:
            raise UserError(f"--input: {problem}; correct the file, or leave such parts out with --on-error skip")
        self._skipped += 1
        self._shown += 1
        if self._shown <= SHOWN:
            print(f"skipped: {problem}", file=sys.stderr, flush=True)

    def _commit(self) -> None:
        """Closes a shard of each split, so that a resumed preparation begins here."""
        closed = {name: writer.close_shard(self._commits) for name, writer in self._writers.items()}
        for name, shard in closed.items():
            self._shards[name] += [shard] if shard else []
        line: dict[str, Any] = {name: shard.model_dump() if shard else None for name, shard in closed.items()}
        line |= {"next": list(self._next), "skipped": self._skipped}
        with writing(self._work / PROGRESS), open(self._work / PROGRESS, "ab") as file:
            file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._commits += 1

    def _say(self, number: int, unit: int, last: bool = False) -> None:
        """Prints how far the work is, at most every SECONDS."""
        now = time.monotonic()
        if not last and now - self._said < SECONDS:
            return
        self._said = now
        rate = (self._tokens - self._resumed) / max(now - self._started, 1e-9)
        done, total = (sum(file.size for file in part) for part in (self._files[:number], self._files))
        if number < len(self._files) and not is_compressed(self._files[number].name):
            done += min(unit * UNIT, self._files[number].size)  # units count bytes that are not compressed
        print(
            f"{number:,} of {len(self._files):,} files, {done / 1e6:,.1f} of {total / 1e6:,.1f} MB; "
            f"{self._tokens:,} tokens in {self._commits:,} finished shards; {rate:,.0f} tokens/s",
            flush=True,
        )

    def manifest(self, source: str, seq_length: int) -> TokenManifest:
        """Returns the index (UserError: a split has too few tokens)."""
        needed = {"train": seq_length + 1, "validation": 2}
        tokens = {name: sum(shard.tokens for shard in side) for name, side in self._shards.items()}
        for name, count in tokens.items():
            marks = int(self._tokenizer.separator is not None)
            if count - marks < needed[name]:
                remedy = "lower --seq-length or give more text"
                if name == "validation":
                    remedy = "give --val-path, more text or a larger --val-fraction"
                remove(self._work)  # repeating the same would end the same
                raise UserError(
                    f"--input: '{self._plan.source}'; gives {count:,} tokens for {name}, {needed[name]:,} "
                    f"are needed; {remedy}"
                )
        skipped = f", {self._skipped:,} unreadable parts skipped" if self._skipped else ""
        share = 100 * tokens["validation"] / sum(tokens.values())
        print(
            f"vocabulary of {self._tokenizer.vocab_size:,}; {tokens['train']:,} train / {tokens['validation']:,} "
            f"validation tokens ({share:.3g} % validation){skipped}",
            flush=True,
        )
        return TokenManifest(
            source=source,
            vocab_size=self._tokenizer.vocab_size,
            dtype=str(self._dtype),
            separator=self._tokenizer.separator,
            masked=self._masked,
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            skipped=self._skipped,
            **self._shards,
        )
