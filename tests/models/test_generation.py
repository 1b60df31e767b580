"""The two halves of generation equal the whole forward pass, token by token."""

import numpy as np
import pytest
from mindspore import Tensor
from oracles.tiny_decoder import EXPERTS, VARIANTS, VOCABULARY, decoder_config, loads_of, random_tokens, run_decoder

from switchyard.models import Decode, Prefill, create_model
from switchyard.models.generation import OpenBlockPlan
from switchyard.moe.routing import known_routers

LENGTH = 8  # of the cache


def prefill(decoder, tokens, lengths):
    """Logits and caches with room for LENGTH places; what is behind a prompt must not be seen, so it is loud."""
    lengths = Tensor(np.array(lengths, np.int32))
    logits, *caches = Prefill(decoder, LENGTH)(Tensor(np.ascontiguousarray(tokens)), lengths)
    room = [(0, 0)] * 2 + [(0, LENGTH - tokens.shape[1]), (0, 0)]
    return logits, [Tensor(np.pad(cache.asnumpy(), room, constant_values=99)) for cache in caches]


@pytest.mark.parametrize("name", ["experts-everywhere", "grouped-query-swiglu", "dense-learned-free-layernorm-gelu"])
def test_prefill_and_decode_equal_the_whole_forward(name, pynative):
    """Prompts of different length, right-padded, then token by token to the end of the cache."""
    config = decoder_config(*VARIANTS[name])
    decoder = create_model(config, VOCABULARY).set_train(False)
    tokens, lengths = random_tokens(), np.array([3, 5], np.int32)
    whole = run_decoder(decoder, tokens)[0]
    prompt = tokens[:, :5].copy()
    prompt[0, 3:] = 0
    logits, caches = prefill(decoder, prompt, lengths)
    kv_heads = config.model.n_kv_heads or 4
    assert [cache.shape for cache in caches] == 4 * [(2, kv_heads, 8, 4)]
    np.testing.assert_allclose(logits.asnumpy(), whole[[0, 1], lengths - 1], atol=1e-5, rtol=1e-5)
    decode = Decode(decoder, LENGTH)
    for step in range(3):
        position = lengths + step
        logits = decode(Tensor(tokens[[0, 1], position]), Tensor(position), *caches)
        np.testing.assert_allclose(logits.asnumpy(), whole[[0, 1], position], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "model", [{}, {"sliding_window": 3}, {"n_kv_heads": 2}], ids=["all", "window", "grouped-query"]
)
def test_queries_in_parts_see_what_queries_in_one_see(model, pynative):
    """Four parts of two places, two prompts of different length: the same logits and caches."""
    decoder = create_model(decoder_config(model, {"expert_num": 4}), VOCABULARY).set_train(False)
    given = Tensor(random_tokens()), Tensor(np.array([5, 8], np.int32))
    whole, parts = (Prefill(decoder, LENGTH, parts=count)(*given) for count in (1, 4))
    for one, other in zip(whole, parts):
        np.testing.assert_allclose(one.asnumpy(), other.asnumpy(), atol=1e-6)


def _routers():
    """Every router that the decoder takes, and the settings with which a row may be left without an expert."""
    for name, router in known_routers().items():
        if router.causal and "task_ids" not in router.needs:
            yield pytest.param({"router": name, **NEEDED.get(name, {})}, id=name)
    threshold = {"second_expert": "threshold", "second_expert_threshold": 0.48}
    yield pytest.param({"router": "gshard", "num_experts_chosen": 2, **threshold}, id="gshard-threshold")
    yield pytest.param({"router": "top_k", "copies": 2}, id="copies")


NEEDED = {
    "mixture_of_depths": {"expert_num": 1, "capacity_factor": 0.5},
    "two_level": {"n_group": 2},
    "gshard": {"num_experts_chosen": 2},
    "random": {"random_draw": "step"},
}


@pytest.mark.parametrize("moe", list(_routers()))
def test_generation_with_every_causal_router(moe, pynative):
    """Prompts of different length and two more tokens: what the whole forward says, whatever the router leaves out."""
    decoder = create_model(decoder_config(moe={"expert_num": 4} | moe), VOCABULARY).set_train(False)
    tokens, lengths = random_tokens(), np.array([4, 6], np.int32)
    whole, stats = run_decoder(decoder, tokens)
    if decoder.layers[0].feed_forward.router.may_skip_tokens:  # and does, so that it is tested
        assert loads_of(stats).sum() < len(stats) * 16 * moe.get("num_experts_chosen", 1)
    prompt = tokens[:, :6].copy()
    prompt[0, 4:] = 0
    logits, caches = prefill(decoder, prompt, lengths)
    np.testing.assert_allclose(logits.asnumpy(), whole[[0, 1], lengths - 1], atol=1e-5, rtol=1e-5)
    decode = Decode(decoder, LENGTH)
    for step in range(2):
        position = lengths + step
        logits = decode(Tensor(tokens[[0, 1], position]), Tensor(position), *caches)
        np.testing.assert_allclose(logits.asnumpy(), whole[[0, 1], position], atol=1e-5, rtol=1e-5)


def test_prefill_of_a_prompt_as_long_as_the_cache(pynative):
    decoder, tokens = create_model(decoder_config(), VOCABULARY).set_train(False), random_tokens()
    logits, caches = prefill(decoder, tokens, [8, 8])
    assert caches[0].shape[2] == 8
    np.testing.assert_allclose(logits.asnumpy(), run_decoder(decoder, tokens)[0][:, -1], atol=1e-5)


def test_generation_of_one_sequence_by_a_model_of_many_groups(pynative):
    """Groups are of training: prompts need not be a multiple of them."""
    decoder = create_model(decoder_config(moe=EXPERTS | {"groups": 2}), VOCABULARY).set_train(False)
    tokens = random_tokens(2)
    whole = run_decoder(decoder, tokens)[0]
    logits, caches = prefill(decoder, tokens[:1, :7], [7])
    np.testing.assert_allclose(logits.asnumpy(), whole[:1, 6], atol=1e-5, rtol=1e-5)
    logits = Decode(decoder, LENGTH)(Tensor(tokens[:1, 7]), Tensor(np.array([7], np.int32)), *caches)
    np.testing.assert_allclose(logits.asnumpy(), whole[:1, 7], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", [1, 4, 8])
def test_the_plan_of_prefill(block, pynative):
    """Every choice has a slot of its own in a block of its expert; padding has the last slot, which nobody owns."""
    experts = np.random.default_rng(block).integers(0, 6, 24).astype(np.int32)  # 5 is no expert: padding
    dispatch_index, combine_index, block_expert = (part.asnumpy() for part in OpenBlockPlan(5, block)(Tensor(experts)))
    assert dispatch_index.shape == (24 + 5 * block,) and block_expert.shape == (24 // block + 5,)
    real = np.flatnonzero(experts < 5)
    np.testing.assert_array_equal(dispatch_index[combine_index[real]], real)
    np.testing.assert_array_equal(block_expert[combine_index[real] // block], experts[real])
    assert len(set(combine_index[real])) == len(real)
    np.testing.assert_array_equal(combine_index[experts == 5], len(dispatch_index) - 1)
    assert len(dispatch_index) - 1 not in combine_index[real]


def test_the_plan_when_all_choose_one_expert(pynative):
    """By hand: 4 choices of expert 1 of 2 in blocks of 2 take blocks 0 and 1; the last of the four blocks is spare."""
    dispatch_index, combine_index, block_expert = OpenBlockPlan(2, 2)(Tensor(np.array([1, 1, 1, 1], np.int32)))
    assert combine_index.asnumpy().tolist() == [0, 1, 2, 3]
    assert dispatch_index.asnumpy().tolist() == [0, 1, 2, 3, 0, 0, 0, 0]
    assert block_expert.asnumpy().tolist() == [1, 1, 1, 1]
