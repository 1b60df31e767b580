"""Prepares text as a folder of tokens, with a byte-level BPE: `python -m switchyard.data.prepare`.

The folder appears in full or not at all; `data.path` takes it. Token shards are written as a stream, see
switchyard.data.prepare_tokens; MindRecord is made of text in memory.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from switchyard import cli
from switchyard.cli import cleans_up
from switchyard.errors import EXIT_OK, EXIT_USER_ERROR, UserError
from switchyard.file_errors import line_of
from switchyard.files import flush_tree, require_text, unfinished

if TYPE_CHECKING:
    import numpy as np

    from switchyard.data.tokenizer import Tokenizer

SHARD_TOKENS = 1 << 25  # 64 MB of uint16
SMALLEST_VOCABULARY = 257  # 256 bytes and the separator
STOPPED_BY_SIGINT = 130  # as shells report it


def parser() -> cli.Parser:
    """Returns the parser of the command line."""
    made = cli.Parser(
        prog="python -m switchyard.data.prepare",
        description="Trains a byte-level BPE tokenizer and writes text as token shards, or MindRecord, for data.path. "
        "Repeated after a kill, the command goes on after the last finished shard.",
    )
    made.add_argument(
        "--input",
        required=True,
        help="file, folder or glob of text, JSON lines (.jsonl) or Parquet, plain, .gz or .zst; or the word stdlib",
    )
    made.add_argument("--out", required=True, help="folder to create; must not exist")
    made.add_argument("--field", help="field of JSON lines and Parquet that holds the text (text)")
    made.add_argument(
        "--instructions",
        action="store_true",
        help="records hold prompt and response, or messages: only answers are learned",
    )
    made.add_argument("--vocab-size", type=cli.whole, default=4096, help="tokens of the BPE vocabulary (%(default)s)")
    made.add_argument(
        "--seq-length",
        type=cli.whole,
        default=256,
        help="tokens of a training sequence; of token shards only a check that the text fills one (%(default)s)",
    )
    made.add_argument("--val-fraction", type=cli.finite, default=0.1, help="part held out for validation (%(default)s)")
    made.add_argument("--val-path", help="text to validate on instead: file, folder or glob, all of it")
    made.add_argument("--tokenizer", help="tokenizer.json to use instead of training one; or byte, char")
    made.add_argument("--format", choices=("tokens", "mindrecord"), default="tokens", help="(%(default)s)")
    made.add_argument("--workers", type=cli.whole, help="processes that encode (one a core)")
    made.add_argument("--shard-tokens", type=cli.whole, help=f"tokens of a shard ({SHARD_TOKENS:,})")
    made.add_argument(
        "--on-error", choices=("stop", "skip"), help="what cannot be read: stop, or skip it and count it (stop)"
    )
    return made


STREAMED = ("field", "instructions", "workers", "shard_tokens", "on_error")  # options that MindRecord does not have


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit code."""
    options = parser().parse_args(arguments)
    out = Path(options.out)
    try:
        with cleans_up():
            folder = _prepared(options, out)
    except (UserError, OSError) as error:
        print(f"error: {error if isinstance(error, UserError) else line_of(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        kept = out.absolute().with_name(f".{out.name}.preparing").exists()
        state = "finished shards are kept; repeat the command to go on" if kept else "nothing was written"
        print(f"interrupted; {state}", file=sys.stderr)
        return STOPPED_BY_SIGINT
    print(f"done: train with data.path={folder}")
    return EXIT_OK


def _prepared(options: argparse.Namespace, out: Path) -> Path:
    """Does what the options ask and returns the folder (UserError)."""
    if options.format == "mindrecord":
        for name in STREAMED:
            if getattr(options, name):
                raise UserError(f"--{name.replace('_', '-')}: --format mindrecord does not read it; leave it out")
        return prepare(
            options.input,
            out,
            options.vocab_size,
            options.seq_length,
            options.val_fraction,
            options.tokenizer,
            options.val_path,
        )
    _check(out, options.vocab_size, options.seq_length, options.val_fraction, options.tokenizer)
    if options.instructions and options.field:
        raise UserError(f"--field: '{options.field}'; --instructions reads prompt, response and messages; leave it out")
    for name in ("workers", "shard_tokens"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(options, name)}; at least 1")
    from switchyard.data.prepare_tokens import Plan, prepare_tokens
    from switchyard.data.workers import cores

    for option, path in (("--input", options.input), ("--val-path", options.val_path)):
        _require_text(option, path)
    plan = Plan(
        source=options.input,
        val_path=options.val_path,
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size,
        val_fraction=options.val_fraction,
        text_field=None if options.instructions else options.field or "text",
        shard_tokens=options.shard_tokens or SHARD_TOKENS,
    )
    return prepare_tokens(plan, out, options.seq_length, options.workers or cores(), options.on_error == "skip")


def _require_text(option: str, path: str | None) -> None:
    """Refuses a folder that is prepared already (UserError)."""
    from switchyard.data import mindrecord, shards

    if path not in ("stdlib", None) and (mindrecord.locate(path) or shards.locate(path)):
        raise UserError(f"{option}: '{path}' is already prepared; give text")


def prepare(
    source: str,
    out: Path,
    vocab_size: int,
    seq_length: int,
    val_fraction: float,
    tokenizer: str | None,
    val_path: str | None = None,
) -> Path:
    """Reads `source`, trains or reads the tokenizer and writes the MindRecord folder `out`, which it returns.

    `val_path` is text to validate on; None holds out `val_fraction` of `source`.

    Raises:
        UserError: impossible arguments, `out` exists, or the text is missing, undecodable or too short.
    """
    _check(out, vocab_size, seq_length, val_fraction, tokenizer)
    from switchyard.config import DataConfig
    from switchyard.data.batches import EvalBatches, TextSource
    from switchyard.data.bpe import train_bpe
    from switchyard.data.corpus import load_text
    from switchyard.data.tokenizer import load_tokenizer, unknown_note

    for option, path in (("--input", source), ("--val-path", val_path)):
        _require_text(option, path)
    # any word but `byte` makes load_text insist on characters, which BPE training needs too
    data = DataConfig(
        path=None if source == "stdlib" else source,
        val_path=val_path,
        tokenizer=tokenizer or "bpe",
        val_fraction=val_fraction,
    )
    corpus = load_text(data)
    print(corpus.description, flush=True)
    made = load_tokenizer(data, corpus) if tokenizer else train_bpe(corpus.train, vocab_size)
    train, validation = made.encode_documents(corpus.train), made.encode_documents(corpus.validation)
    TextSource(train, seq_length)  # both refuse too little text, before anything is written
    EvalBatches(validation, 1, seq_length)
    share = 100 * len(validation) / (len(train) + len(validation))
    print(
        f"vocabulary of {made.vocab_size:,}; {len(train):,} train / {len(validation):,} validation tokens "
        f"({share:.3g} % validation){unknown_note(made, train, validation)}",
        flush=True,
    )
    _write(out, {"train": train, "validation": validation}, seq_length, made, corpus.description)
    return out


def _write(out: Path, streams: dict[str, "np.ndarray"], seq_length: int, tokenizer: "Tokenizer", source: str) -> None:
    """Writes the folder `out` beside its place and renames it (UserError: it cannot be created)."""
    from switchyard.data import mindrecord

    with ExitStack() as stack:
        try:
            partial = stack.enter_context(unfinished(out.absolute()))
        except OSError as error:
            raise UserError(f"--out: '{out}'; {error.strerror}; give a folder that can be created") from None
        with _progress(sum(-(-len(stream) // (seq_length + 1)) for stream in streams.values())) as advance:
            splits = {
                name: mindrecord.write_split(partial / f"{name}.mindrecord", stream, seq_length, advance)
                for name, stream in streams.items()
            }
        manifest = mindrecord.Manifest(
            source=source,
            seq_length=seq_length,
            vocab_size=tokenizer.vocab_size,
            tokenizer_fingerprint=tokenizer.fingerprint,
            **splits,
        )
        mindrecord.write_manifest(partial, manifest, tokenizer)
        flush_tree(partial)
        os.rename(partial, out)


def _check(out: Path, vocab_size: int, seq_length: int, val_fraction: float, tokenizer: str | None) -> None:
    """Refuses impossible arguments before any work (UserError)."""
    require_text(out, "--out")
    if out.exists() or out.is_symlink():
        raise UserError(f"--out: '{out}' already exists; remove it or give another folder")
    if not tokenizer and vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"--vocab-size: {vocab_size}; at least {SMALLEST_VOCABULARY}: 256 bytes and a separator")
    if seq_length < 1:
        raise UserError(f"--seq-length: {seq_length}; at least 1")
    if not 0.0 < val_fraction < 1.0:
        raise UserError(f"--val-fraction: {val_fraction}; between 0 and 1, both excluded")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Shows a bar of blocks on a terminal, and a line for each tenth elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc="writing", unit=" blocks", unit_scale=True) as bar:
            yield bar.update
        return
    written = 0

    def advance(count: int) -> None:
        nonlocal written
        before, written = written, written + count
        if written * 10 // total > before * 10 // total:
            print(f"writing {written:,} of {total:,} blocks", flush=True)

    yield advance


if __name__ == "__main__":
    sys.exit(cli.run(main))
