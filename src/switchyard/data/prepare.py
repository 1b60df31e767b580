"""Prepares text as a folder of MindRecord files, with a byte-level BPE: `python -m switchyard.data.prepare`.

The folder appears in full or not at all; `data.path` takes it.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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

    from switchyard.data.document import Document
    from switchyard.data.tokenizer import LibraryTokenizer, Tokenizer

SMALLEST_VOCABULARY = 257  # 256 bytes and the separator
STOPPED_BY_SIGINT = 130  # as shells report it
TRAINING_PIECE = 1_000_000  # characters that the BPE trainer gets at a time
LONGEST_RUN = 256  # characters of one kind that may make one word: the trainer's time grows with the square of a word


def parser() -> cli.Parser:
    """Returns the parser of the command line."""
    made = cli.Parser(
        prog="python -m switchyard.data.prepare",
        description="Trains a byte-level BPE tokenizer and writes text as MindRecord for data.path.",
    )
    made.add_argument("--input", required=True, help="text file, folder or glob, or the word stdlib")
    made.add_argument("--out", required=True, help="folder to create; must not exist")
    made.add_argument("--vocab-size", type=cli.whole, default=4096, help="tokens of the BPE vocabulary (%(default)s)")
    made.add_argument("--seq-length", type=cli.whole, default=256, help="tokens of a training sequence (%(default)s)")
    made.add_argument("--val-fraction", type=cli.finite, default=0.1, help="part held out for validation (%(default)s)")
    made.add_argument("--val-path", help="text to validate on instead: file, folder or glob, all of it")
    made.add_argument("--tokenizer", help="tokenizer.json to use instead of training one; or byte, char")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit code."""
    options = parser().parse_args(arguments)
    try:
        with cleans_up():
            folder = prepare(
                options.input,
                Path(options.out),
                options.vocab_size,
                options.seq_length,
                options.val_fraction,
                options.tokenizer,
                options.val_path,
            )
    except (UserError, OSError) as error:
        print(f"error: {error if isinstance(error, UserError) else line_of(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return STOPPED_BY_SIGINT
    print(f"done: train with data.path={folder}")
    return EXIT_OK


def prepare(
    source: str,
    out: Path,
    vocab_size: int,
    seq_length: int,
    val_fraction: float,
    tokenizer: str | None,
    val_path: str | None = None,
) -> Path:
    """Reads `source`, trains or reads the tokenizer and writes the folder `out`, which it returns.

    `val_path` is text to validate on; None holds out `val_fraction` of `source`.

    Raises:
        UserError: impossible arguments, `out` exists, or the text is missing, undecodable or too short.
    """
    _check(out, vocab_size, seq_length, val_fraction, tokenizer)
    from switchyard.config import DataConfig
    from switchyard.data import mindrecord
    from switchyard.data.batches import EvalBatches, TextSource
    from switchyard.data.corpus import load_text
    from switchyard.data.tokenizer import load_tokenizer, unknown_note

    for option, path in (("--input", source), ("--val-path", val_path)):
        if path not in ("stdlib", None) and mindrecord.locate(path):
            raise UserError(f"{option}: '{path}' is already prepared; give text")
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


def train_bpe(documents: Iterable["Document"], vocab_size: int) -> "LibraryTokenizer":
    """Trains a byte-level BPE tokenizer (arXiv 1508.07909, bytes as in GPT-2) on the text of `documents`.

    The end-of-text token separates documents. The vocabulary is smaller than asked if the text has no more pairs.
    Runs of letters, digits, signs or white space are divided after every LONGEST_RUN characters, so that training takes
    seconds on text without spaces, too. The vocabulary of other text does not depend on that rule.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    from switchyard.data.tokenizer import END_OF_TEXT, LibraryTokenizer

    library = Tokenizer(models.BPE())
    run = "|".join(f"{kind}{{{LONGEST_RUN}}}" for kind in (r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]", r"\s"))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(run), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    print(f"training a byte-level BPE of {vocab_size:,} tokens ...", flush=True)
    start = time.perf_counter()
    texts = (document.text() for document in documents)  # in pieces that the trainer can count in parallel
    pieces = (text[place : place + TRAINING_PIECE] for text in texts for place in range(0, len(text), TRAINING_PIECE))
    library.train_from_iterator(pieces, trainer)
    print(f"trained in {time.perf_counter() - start:.1f} s", flush=True)
    return LibraryTokenizer(library.to_str())


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
