"""The way in: one configuration to tokenizer, batches and figures."""

import subprocess
import sys

import numpy as np
import pytest

from switchyard import config
from switchyard.data import Data, load_data
from switchyard.data.tokenizer import ByteTokenizer, CharTokenizer
from switchyard.errors import UserError

TEXT = "To be, or not to be: grüße\n" * 40


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "input.txt"
    path.write_text(TEXT)
    return path


def load(path, *overrides, **more) -> Data:
    return load_data(config.build({}, [f"data.path={path}", "model.seq_length=8", *overrides]), **more)


def test_characters_as_nanogpt_prepares_them(file):
    data = load(file, "data.tokenizer=char")
    cut = int(len(TEXT) * 0.9)
    letters = sorted(set(TEXT))
    assert data.tokenizer.vocab_size == len(letters)
    expected = [letters.index(letter) for letter in TEXT[cut:]]
    labels = np.concatenate([batch.labels[batch.valid == 1] for batch in data.validation()])
    assert labels.tolist() == expected[1:]
    assert data.validation_tokens == len(expected) - 1
    assert data.validation_bytes == len(TEXT[cut + 1 :].encode())
    assert data.tokenizer.decode(data.train.at(0).tokens[0]) in TEXT[:cut]
    assert data.description.count("\n") == 0 and "input.txt" in data.description and "char" in data.description


def test_ids_of_the_training_split_are_counted(file):
    data = load(file)
    train = TEXT.encode()[: len(TEXT[: int(len(TEXT) * 0.9)].encode())]
    counts = data.token_counts()
    assert counts.shape == (data.tokenizer.vocab_size,) and counts.sum() == len(train)
    assert all(counts[byte] == train.count(bytes([byte])) for byte in set(train))


def test_bytes_per_token_of_bytes_is_one(file):
    data = load(file)
    assert data.validation_bytes == data.validation_tokens
    assert sum(float(batch.valid.sum()) for batch in data.validation()) == data.validation_tokens


def test_standard_library_is_the_default_and_needs_no_mindspore():
    program = (
        "import sys\nfrom switchyard import config\nfrom switchyard.data import load_data\n"
        "data = load_data(config.build({}))\nprint(data.description)\n"
        "assert data.train.at(0).tokens.shape == (12, 64)\nassert 'mindspore' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("standard library: ") and done.stdout.count("\n") == 1  # loading prints nothing


def test_batch_size_is_of_all_processes_together(file):
    assert load(file, "data.batch_size=6", rank=1, world=3).train.at(0).tokens.shape == (2, 8)
    with pytest.raises(UserError, match=r"data\.batch_size: 6; must be a multiple of the 4 processes"):
        load(file, "data.batch_size=6", world=4)


def test_seed_of_the_run_shuffles(file):
    one, other = load(file, "train.seed=1"), load(file, "train.seed=2")
    assert not np.array_equal(one.train.at(0).tokens, other.train.at(0).tokens)


def test_tokenizer_of_a_checkpoint_is_used(file):
    known = CharTokenizer("".join(sorted(set(TEXT + "xyz"))))
    data = load(file, "data.tokenizer=char", tokenizer_json=known.to_json())
    assert data.tokenizer.fingerprint == known.fingerprint


def test_tokenizer_of_a_checkpoint_serves_when_its_file_has_gone(file):
    known = CharTokenizer("".join(sorted(set(TEXT))))
    data = load(file, "data.tokenizer=gone/tokenizer.json", tokenizer_json=known.to_json())
    assert data.tokenizer.fingerprint == known.fingerprint


@pytest.mark.parametrize(
    "text, overrides, checkpoint, words",
    [
        (b"", [], None, ["data.path", "input.txt", "empty"]),
        (b"short", [], None, ["model.seq_length: 8", "4 tokens", "at most 3"]),
        (b"twelve chars", [], None, ["data.batch_size: 12", "1 blocks"]),
        (b"eleven char", ["data.val_fraction=0.01", "data.batch_size=1"], None, ["data.val_fraction", "1 validation"]),
        (b"caf\xe9" * 99, ["data.tokenizer=char"], None, ["input.txt", "0xe9", "offset 3"]),
        (TEXT.encode(), ["data.tokenizer=char"], ByteTokenizer(), ["char vocabulary of", "byte vocabulary of 256"]),
        (TEXT.encode(), [], CharTokenizer("ab"), ["byte vocabulary of 256", "char vocabulary of 2 "]),
        (TEXT.encode(), ["data.tokenizer=char"], CharTokenizer(" ,Tbeo"), ["vocabulary of 6 ", "lacks '\\n'"]),
    ],
)
def test_refused_in_one_line(file, text, overrides, checkpoint, words):
    file.write_bytes(text)
    with pytest.raises(UserError) as caught:
        load(file, *overrides, tokenizer_json=checkpoint and checkpoint.to_json())
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
