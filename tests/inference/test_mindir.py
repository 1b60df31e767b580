"""What an opened export takes and refuses."""

import numpy as np
import pytest

from switchyard.errors import UserError
from switchyard.inference.mindir import load_graph


def test_lengths_are_rounded_up(model):
    """To powers of two from 16, multiples of the prefill's block, and not beyond what holds max_length = 24."""
    assert model.manifest.limits.prompt_multiple == 8 and model.max_length == 24
    assert [model.bucket(length) for length in (1, 16, 17, 24)] == [16, 16, 24, 24]


def test_a_batch_equals_each_alone(model, graph):
    random = np.random.default_rng(0)
    prompts = [random.integers(0, model.vocab_size, length) for length in (3, 20, 1)]
    logits, keys, values = model.prefill(prompts)
    keys, values = model.grow(keys, values, 24)
    lengths = np.array([len(prompt) for prompt in prompts])
    step, _, _ = model.decode(np.array([5, 6, 7]), lengths, keys, values)
    for row, prompt in enumerate(prompts):
        alone, keys, values = model.prefill([prompt])
        np.testing.assert_allclose(alone[0], logits[row], atol=1e-5)
        keys, values = model.grow(keys, values, 24)
        alone, _, _ = model.decode(np.array([5 + row]), lengths[row : row + 1], keys, values)
        np.testing.assert_allclose(alone[0], step[row], atol=1e-5)


def test_decode_equals_the_prefill_of_a_longer_prompt(model, graph):
    ids = np.random.default_rng(1).integers(0, model.vocab_size, 19)
    logits, keys, values = model.prefill([ids[:14]])
    keys, values = model.grow(keys, values, 20)
    for place in range(14, 19):
        logits, keys, values = model.decode(ids[place : place + 1], np.array([place]), keys, values)
        longer, _, _ = model.prefill([ids[: place + 1]])
        np.testing.assert_allclose(logits, longer, atol=1e-5)


def test_caches_grow_by_zeros(model, graph):
    _, keys, values = model.prefill([np.array([1, 2])])
    assert [cache.shape for cache in (*keys, *values)] == 4 * [(1, 4, 16, 4)]
    more, _ = model.grow(keys, values, 20)
    assert more[1].shape == (1, 4, 24, 4) and not more[1].asnumpy()[..., 16:, :].any()
    np.testing.assert_array_equal(more[1].asnumpy()[..., :16, :], keys[1].asnumpy())
    assert model.grow(keys, values, 16)[0] is keys


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([], "prompt: empty"),
        ([[]], "prompt: empty"),
        ([[1, 2], []], "prompt: empty"),
        ([[1] * 25], "prompt: 25 tokens; the model holds 24"),
        ([[1, 99]], "tokens: an id outside 0 .. "),
        ([[-1]], "tokens: an id outside 0 .. "),
    ],
)
def test_prompts_that_are_refused(prompts, said, model):
    with pytest.raises(UserError, match=f"^{said}"):
        model.prefill([np.array(prompt, np.int32) for prompt in prompts])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": np.array([1])}, r"positions: shape \(2,\); must be \(1,\) here"),
        ({"positions": np.array([[3, 3]])}, r"positions: shape \(1, 2\); must be \(2,\) here"),
        ({"positions": np.array([3, 16])}, r"positions: 3 .. 16; must be in 0 .. 15"),
        ({"positions": np.array([-1, 3])}, r"positions: -1 .. 3; must be in 0 .. 15"),
        ({"tokens": np.array([1, 99])}, "tokens: an id outside"),
        ({"values": 2 * [np.zeros((2, 4, 8, 4), np.float32)]}, r"values: shape \(2, 4, 8, 4\); must be"),
        ({"keys": 2 * [np.zeros((1, 4, 16, 4), np.float32)]}, r"keys: shape \(1, 4, 16, 4\); must be"),
        ({"keys": 2 * [np.zeros((2, 16), np.float32)]}, r"keys: shape \(2, 16\); must be"),
        ({"keys": [np.zeros((2, 4, 16, 4), np.float32)]}, "keys: 1 caches; must be 2, one a layer"),
    ],
)
def test_steps_that_are_refused(change, said, model, graph):
    _, keys, values = model.prefill([np.array([1, 2]), np.array([3])])
    step = {"tokens": np.array([1, 2]), "positions": np.array([3, 3]), "keys": keys, "values": values} | change
    with pytest.raises(UserError, match=f"^{said}"):
        model.decode(**step)


def test_a_file_that_is_no_graph(tmp_path):
    (tmp_path / "a.mindir").write_bytes(b"no graph")
    with pytest.raises(UserError, match=r"^--model: MindSpore cannot load '.*a.mindir'"):
        load_graph(tmp_path / "a.mindir", None)


def test_graphs_of_one_shape_share_few_places(model, monkeypatch):
    """The oldest use goes first; of large graphs fewer are held, and one in any case."""
    held = [("prefill", 1, size) for size in (16, 24, 32, 40)]
    for size, kept in ((1 << 20, 3), (400 << 20, 1), (4 << 30, 0)):  # of the four, beside the new one
        monkeypatch.setattr(model, "_graphs", {("decode",): None, **dict.fromkeys(held)})
        model._make_room(size)
        assert list(model._graphs) == [("decode",), *held[4 - kept :]]
