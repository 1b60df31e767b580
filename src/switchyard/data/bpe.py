"""Trains a byte-level BPE tokenizer."""

import sys
import time
from collections.abc import Iterable

from switchyard.data.document import Document
from switchyard.data.tokenizer import END_OF_TEXT, LibraryTokenizer

TRAINING_PIECE = 1_000_000  # characters that the BPE trainer gets at a time
LONGEST_RUN = 256  # characters of one kind that may make one word: the trainer's time grows with the square of a word


def train_bpe(documents: Iterable[Document], vocab_size: int) -> LibraryTokenizer:
    """Trains a byte-level BPE tokenizer (arXiv 1508.07909, bytes as in GPT-2) on the text of `documents`.

    The end-of-text token separates documents. The vocabulary is smaller than asked if the text has no more pairs.
    Runs of letters, digits, signs or white space are divided after every LONGEST_RUN characters, so that training takes
    seconds on text without spaces, too. The vocabulary of other text does not depend on that rule.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

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
