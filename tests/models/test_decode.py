"""What a decode step does to its caches, and its plain twins of a choice and of experts."""

import numpy as np
import pytest
from mindspore import Tensor
from oracles.tiny_decoder import VOCABULARY, decoder_config, random_tokens, run_decoder

from switchyard.models import Decode, Prefill, create_model
from switchyard.models.decode import PlainChoice, has_plain_experts
from switchyard.moe.routing.base import make_context

TWO = {"router": "top_k", "expert_num": 4, "num_experts_chosen": 2, "layers": "all"}


@pytest.mark.parametrize("model", [{"activation": "swiglu"}, {"activation": "relu"}], ids=["swiglu", "relu"])
def test_both_ways_through_the_experts_write_one_place_and_agree(model, pynative):
    """Prompts of 3 and 5 tokens and one token more: the caches change at places 3 and 5, and nowhere else."""
    decoder = create_model(decoder_config(model, TWO), VOCABULARY).set_train(False)
    assert has_plain_experts(decoder)
    tokens, lengths = random_tokens(), np.array([3, 5], np.int32)
    whole = run_decoder(decoder, tokens)[0][[0, 1], lengths]
    _, *caches = Prefill(decoder, 8)(Tensor(tokens), Tensor(lengths))
    before = [cache.asnumpy().copy() for cache in caches]
    for every_expert in (False, True):
        given = [Tensor(cache.copy()) for cache in before]
        logits = Decode(decoder, 8, every_expert)(Tensor(tokens[[0, 1], lengths]), Tensor(lengths), *given)
        np.testing.assert_allclose(logits.asnumpy(), whole, atol=1e-5, rtol=1e-5)
        for cache, old in zip(given, before):
            changed = np.abs(cache.asnumpy() - old).max((1, 3)) > 0  # [B, T]
            assert not changed[[0, 0, 1, 1], [2, 4, 4, 6]].any()
    blank = [Tensor(np.full_like(cache, 7.0)) for cache in before]
    Decode(decoder, 8)(Tensor(tokens[[0, 1], lengths]), Tensor(lengths), *blank)
    for cache in blank:
        changed = (cache.asnumpy() != 7.0).all((1, 3))  # [B, T]
        assert np.argwhere(changed).tolist() == [[0, 3], [1, 5]]


@pytest.mark.parametrize("moe", [TWO, {"router": "switch", "expert_num": 4, "layers": "all"}], ids=["top_k", "switch"])
def test_a_plain_choice_is_that_of_the_router_where_logits_are_equal(moe, pynative):
    router = create_model(decoder_config({}, moe), VOCABULARY).set_train(False).layers[0].feed_forward.router
    logits = np.random.default_rng(0).integers(0, 2, (1, 16, 4)).astype(np.float32)  # many ties
    logits[0, 0] = 0.0
    context = make_context(Tensor(np.ones((1, 16), np.float32)), None, None, None, (), None)
    wanted = router.route((Tensor(logits),), context)
    experts, gates = PlainChoice(router)(Tensor(logits[0]))
    np.testing.assert_array_equal(experts.asnumpy(), wanted["expert_index"].asnumpy()[0])
    np.testing.assert_allclose(gates.asnumpy(), wanted["gates"].asnumpy()[0], rtol=1e-6)


def test_experts_of_other_routers_have_no_twin(pynative):
    decoder = create_model(
        decoder_config({}, {"router": "gshard", "expert_num": 4, "num_experts_chosen": 2}), VOCABULARY
    )
    assert not has_plain_experts(decoder.set_train(False))
