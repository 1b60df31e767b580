"""Text comes piece by piece, repeats under a seed, stops where it should, and a batch is as each prompt alone."""

import numpy as np
import pytest
from oracles.tiny_export import quiet, save_export

from switchyard.errors import UserError
from switchyard.inference.generate import generate, read_prompts, to_dict
from switchyard.inference.mindir import open_model
from switchyard.inference.sampling import Sampling

GREEDY = Sampling(temperature=0)
PROMPTS = ["line 1: 5 sheep", "jump", "over the 3 gates"]


def test_greedy_is_the_argmax_of_ever_longer_prompts(model, graph):
    """Against prefill alone, which reads the whole text anew for each token."""
    (found,), timing = generate(model, [PROMPTS[1]], 6, GREEDY)
    text = PROMPTS[1]
    for _ in range(6):
        logits, _, _ = model.prefill([model.tokenizer.encode(text)])
        text += model.tokenizer.decode([int(logits.argmax())])
    assert PROMPTS[1] + found.text == text
    assert (found.tokens, found.stopped) == (6, "max new tokens")
    assert (timing.prompt_tokens, timing.new_tokens, timing.decode_tokens) == (4, 6, 5)
    assert timing.decode_seconds > 0 and timing.tokens_per_second == 5 / timing.decode_seconds


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_k=5, top_p=0.9, seed=3)])
def test_a_batch_equals_each_alone(sampling, model, graph):
    """With draws, the first row at least: row r draws from (seed, r)."""
    found, _ = generate(model, PROMPTS, 20, sampling)
    alone = [generate(model, [prompt], 20, sampling)[0][0] for prompt in PROMPTS]
    count = len(PROMPTS) if sampling is GREEDY else 1
    assert [one.text for one in found[:count]] == [one.text for one in alone[:count]]
    room = [24 - len(prompt) for prompt in PROMPTS]
    assert [one.tokens for one in found] == [min(20, most) for most in room]
    assert [one.stopped for one in found] == ["max length", "max new tokens", "max length"]


def test_a_seed_repeats(model, graph):
    def drawn(seed):
        return generate(model, [PROMPTS[1]], 12, Sampling(temperature=1.0, seed=seed))[0][0].text

    assert drawn(1) == drawn(1) and len({drawn(seed) for seed in range(4)}) > 1


def test_the_prompt_may_fill_all_but_one_place(model, graph):
    (found,), _ = generate(model, ["1" * 23], 5, GREEDY)
    assert (found.tokens, found.stopped) == (1, "max length")


def test_pieces_join_to_the_text(model, graph):
    pieces = []
    found, _ = generate(model, PROMPTS, 8, GREEDY, pieces.append)
    assert "".join(pieces) == found[0].text and len(pieces) == 8


def test_no_half_character_is_shown(tmp_path, graph):
    """A byte model that is made to write 'é' again and again, one byte a step."""
    out = save_export(tmp_path, tokenizer="byte", moe={})
    model = open_model(out, say=quiet)
    script = iter("é€é".encode() + b"\xc3")

    def logits_of_script(*_):
        logits = np.zeros((1, 256), np.float32)
        logits[0, next(script)] = 9
        return logits, None, None

    model.prefill, model.decode, model.grow = logits_of_script, logits_of_script, lambda keys, values, length: (0, 0)
    model.compile = lambda *_: 0.0
    pieces = []
    (found,), _ = generate(model, ["a"], 8, GREEDY, pieces.append)
    assert pieces == ["é", "€", "é", "\ufffd"] and found.text == "é€é\ufffd" and found.tokens == 8


def test_a_separator_ends_the_text(tmp_path, graph):
    """NUL stands between documents of a byte model: it is not shown and nothing comes after it, in its row."""
    out = save_export(tmp_path, tokenizer="byte", moe={})
    model = open_model(out, say=quiet)
    rows = iter([(65, 66), (0, 67), (65, 68), (65, 69)])

    def logits_of_rows(*_):
        logits = np.zeros((2, 256), np.float32)
        logits[[0, 1], next(rows)] = 9
        return logits, None, None

    model.prefill, model.decode, model.grow = logits_of_rows, logits_of_rows, lambda keys, values, length: (0, 0)
    model.compile = lambda *_: 0.0
    found, timing = generate(model, ["a", "b"], 4, GREEDY)
    assert [(one.text, one.tokens, one.stopped) for one in found] == [
        ("A", 1, "end of document"),
        ("BCDE", 4, "max new tokens"),
    ]
    assert (timing.new_tokens, timing.decode_tokens) == (5, 3)


@pytest.mark.parametrize(
    ("prompts", "count", "said"),
    [
        ([], 5, "prompt: none given"),
        ([""], 5, "prompt: empty"),
        (["jump", ""], 5, "prompt 2: empty"),
        (["jump Ω"], 5, r"prompt: text: character 'Ω' \(U\+03A9\) at position 5 is not in the vocabulary"),
        (["jump", "Ω"], 5, r"prompt 2: text: character 'Ω'"),
        (["1" * 24], 5, "prompt: 24 tokens; the model holds 24 of prompt and answer together"),
        (["jump"], 0, "--max-new-tokens: 0; at least 1"),
    ],
)
def test_what_is_refused(prompts, count, said, model):
    with pytest.raises(UserError, match=f"^{said}"):
        generate(model, prompts, count, GREEDY)


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts"
    path.write_bytes("one\r\ntwo words\nélan".encode())
    assert read_prompts(path) == ["one", "two words", "élan"]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte-order mark is not part of the first prompt
    assert read_prompts(path) == ["one", "two words", "élan"]
    for content, said in (
        (b"", "line 1 is empty"),
        (b"a\n\nb\n", "line 2 is empty"),
        (b"a\xff", "is not UTF-8: byte 0xff at offset 1"),
        ("one\ntwo\n".encode("utf-16-le"), "is UTF-16 text; convert"),
        (b"one\ntw\0o\n", "holds a NUL at offset 6"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^--prompts-file: '.*prompts':? {said}"):
            read_prompts(path)
    with pytest.raises(UserError, match=r"^--prompts-file: '.*none': No such file"):
        read_prompts(tmp_path / "none")


def test_what_json_holds(model, graph):
    (found,), timing = generate(model, [PROMPTS[1]], 3, GREEDY)
    assert to_dict(found, timing) == {
        "prompt": "jump",
        "text": found.text,
        "tokens": 3,
        "stopped": "max new tokens",
        "prefill_seconds": timing.prefill_seconds,
        "decode_seconds": timing.decode_seconds,
        "tokens_per_second": 2 / timing.decode_seconds,
    }
