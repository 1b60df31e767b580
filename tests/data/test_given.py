"""What a checkpoint is scored on when eval.py is given text, records or images: all of it, with its own tokenizer."""

import numpy as np
import pytest

from switchyard import config
from switchyard.data import load_data, load_scored, prepare
from switchyard.data.bpe import train_bpe
from switchyard.data.document import Document
from switchyard.data.tokenizer import ByteTokenizer, CharTokenizer
from switchyard.errors import UserError

RUN_TEXT = "To be, or not to be\n" * 40
OTHER = "not to be or\n"  # 13 characters that the run knows
LETTERS = "".join(sorted(set(RUN_TEXT)))
CHAR = CharTokenizer(LETTERS)
BPE = train_bpe([Document("x", RUN_TEXT.encode())], 270)


@pytest.fixture
def place(tmp_path):
    (tmp_path / "run.txt").write_text(RUN_TEXT)
    (tmp_path / "other.txt").write_text(OTHER)
    (tmp_path / "folder").mkdir()
    for name, text in (("a", "to"), ("b", "be or"), ("c", "")):
        (tmp_path / "folder" / f"{name}.txt").write_text(text)
    return tmp_path


def scored(place, known, *overrides, **run):
    """What eval.py reads; the run was trained on run.txt."""
    tree = {"data": {"path": str(place / "run.txt"), "batch_size": 3, **run}, "model": {"seq_length": 4}}
    overrides = [override.replace("@", f"{place}/") for override in overrides]
    return load_scored(config.build(tree, overrides), known.to_json(), overrides)


def predicted(data):
    """All labels that are scored, in order."""
    return np.concatenate([batch.labels[batch.valid > 0] for batch in data.validation()]).tolist()


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CHAR, BPE], ids=lambda tokenizer: tokenizer.kind)
@pytest.mark.parametrize("batch_size", [1, 2, 3, 50])
def test_every_token_but_the_first_is_scored_once_whatever_the_batch_size(place, tokenizer, batch_size):
    data = scored(place, tokenizer, "data.path=@other.txt", f"data.batch_size={batch_size}")
    ids = tokenizer.encode(OTHER).tolist()
    assert predicted(data) == ids[1:]
    assert data.validation_tokens == len(ids) - 1
    assert data.validation_bytes == len(OTHER) - len(tokenizer.decode(ids[:1]))
    assert "evaluated in full" in data.description and "all but the first predicted" in data.description
    assert data.tokenizer.fingerprint == tokenizer.fingerprint  # which nobody named


@pytest.mark.parametrize("path, count", [("other.txt", 12), ("folder", 7), ("folder/*.txt", 7), ("folder/a.txt", 1)])
def test_tokens_by_hand(place, path, count):
    """13 bytes give 12 predictions; 2 and 5 bytes with a separator between them give 7."""
    for key in ("data.path", "data.val_path"):
        data = scored(place, ByteTokenizer(), f"{key}=@{path}")
        assert data.validation_tokens == count == len(predicted(data))


def test_without_a_text_the_run_s_own_validation_set_is_scored(place):
    data = scored(place, CHAR, "data.batch_size=2", tokenizer="char")
    tree = {"data": {"path": str(place / "run.txt"), "tokenizer": "char", "batch_size": 3}, "model": {"seq_length": 4}}
    own = load_data(config.build(tree), CHAR.to_json())
    assert data.validation_tokens == own.validation_tokens == 79
    assert predicted(data) == CHAR.encode(RUN_TEXT[720:]).tolist()[1:]
    validated = scored(place, ByteTokenizer(), val_path=str(place / "other.txt"))
    assert predicted(validated) == list(OTHER.encode())[1:]  # data.val_path of the run is its validation set


def test_a_text_goes_before_the_run_s_validation_text(place):
    data = scored(place, ByteTokenizer(), "data.path=@folder", val_path=str(place / "other.txt"))
    assert data.validation_tokens == 7


def test_one_text_is_given(place):
    with pytest.raises(UserError, match=r"^data\.val_path: '.*other\.txt'; evaluation reads one text"):
        scored(place, ByteTokenizer(), "data.path=@folder", "data.val_path=@other.txt")
    own = scored(place, ByteTokenizer(), "data.val_path=null", val_path=str(place / "other.txt"))
    assert own.validation_tokens == 79  # the last tenth of the run's text: no text was given


def test_a_fraction_scores_the_validation_part(place):
    data = scored(place, CHAR, "data.path=@other.txt", "data.val_fraction=0.5")
    assert predicted(data) == CHAR.encode(OTHER[6:]).tolist()[1:]
    assert "validation 53.8 % of it" in data.description  # 7 of 13


def test_the_tokenizer_of_the_checkpoint_may_be_named_and_no_other(place):
    (place / "bpe.json").write_text(BPE.to_json())
    for tokenizer, name in ((ByteTokenizer(), "byte"), (CHAR, "char"), (BPE, "@bpe.json")):
        assert scored(place, tokenizer, "data.path=@other.txt", f"data.tokenizer={name}").validation_tokens > 1
    for tokenizer, name in ((CHAR, "byte"), (BPE, "char"), (ByteTokenizer(), "@bpe.json"), (BPE, "byte")):
        with pytest.raises(UserError, match=r"^data\.tokenizer: .*checkpoint was trained with"):
            scored(place, tokenizer, "data.path=@other.txt", f"data.tokenizer={name}")


def test_a_character_that_the_checkpoint_does_not_know_is_named(place):
    (place / "other.txt").write_text("to bé")
    with pytest.raises(UserError, match=r"^data\.path: '.*other\.txt': text: character 'é' \(U\+00E9\) at position 4"):
        scored(place, CHAR, "data.path=@other.txt")


@pytest.mark.parametrize("text", ["x", ""])
def test_a_text_without_a_prediction_is_refused(place, text):
    (place / "other.txt").write_text(text)
    with pytest.raises(UserError, match=r"^data\.path: '.*other\.txt'; (gives 1 tokens, at least 2|the file is empty)"):
        scored(place, ByteTokenizer(), "data.path=@other.txt")


def test_records_are_scored_whole_with_any_length_of_blocks(place):
    """13 bytes cut into 6 for training and 7 for validation, and a separator: 14 tokens."""
    out = prepare.prepare(str(place / "other.txt"), place / "blocks", 300, 5, 0.5, "byte")
    data = scored(place, ByteTokenizer(), f"data.path={out}")
    assert predicted(data) == list(b"ot to\0 be or\n")
    assert scored(place, ByteTokenizer(), f"data.path={out}", "data.val_fraction=0.5").validation_tokens == 6
    with pytest.raises(UserError, match="was prepared with another tokenizer than the checkpoint's"):
        scored(place, CHAR, f"data.path={out}")


def test_images_of_another_folder_are_scored_whole_or_their_test_files(tmp_path):
    run = config.build({"model": {"type": "vision"}, "vision": {"image_size": 2}})
    classes = load_data(config.build({"model": {"type": "vision"}})).tokenizer.to_json()

    def idx(name, array):
        head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        (tmp_path / name).write_bytes(head + array.astype(np.uint8).tobytes())

    def scored_images():
        overrides = [f"data.path={tmp_path}"]
        given = run.model_copy(update={"data": run.data.model_copy(update={"path": str(tmp_path)})})
        return load_scored(given, classes, overrides)

    idx("train-images-idx3-ubyte", np.zeros((5, 2, 2)))
    idx("train-labels-idx1-ubyte", np.arange(5))
    data = scored_images()
    assert data.validation_tokens == 5 and "5 images, all evaluated" in data.description
    idx("t10k-images-idx3-ubyte", np.zeros((3, 2, 2)))
    idx("t10k-labels-idx1-ubyte", np.arange(3))
    data = scored_images()
    assert data.validation_tokens == 3 and "(t10k files), 3 images, all evaluated" in data.description
