"""The parts of an encoder-decoder's generation give the logits of the whole model, token by token."""

import numpy as np
import pytest
from mindspore import Tensor, ops
from oracles.tiny import NO_NOISE
from oracles.tiny_seq2seq import LENGTH, MOE, TARGETS, VOCABULARY, random_pair, seq2seq_config

from switchyard.config.seq2seq import PAD
from switchyard.models import create_model
from switchyard.models.seq2seq_generation import Begin, Continue, Encode

LONGEST = 12


@pytest.mark.parametrize("moe", [MOE, {}, {"router": "gshard", "expert_num": 4, "num_experts_chosen": 2}])
def test_encode_begin_and_continue_give_the_logits_of_the_whole(moe, pynative):
    """Two inputs of 9 and 6 tokens; the first answer begins with one token, the second with two."""
    model = create_model(seq2seq_config(moe), VOCABULARY, length=LONGEST).set_train(False)
    tokens, valid = random_pair()
    tokens[1, 6:LENGTH] = PAD
    wanted = model(Tensor(tokens), Tensor(valid), Tensor(NO_NOISE))[0].asnumpy().reshape(2, TARGETS, -1)
    assert np.abs(wanted[:, 1:] - wanted[:, :-1]).max(-1).min() > 1e-3  # places can be told apart
    inputs, answers, rows = np.zeros((2, LONGEST), np.int32), tokens[:, LENGTH:], np.arange(2)
    inputs[:, :LENGTH] = tokens[:, :LENGTH]
    lengths, places = Tensor(np.array([9, 6], np.int32)), np.array([1, 2], np.int32)
    memory = (*Encode(model, LONGEST, 2).set_train(False)(Tensor(inputs), lengths), lengths)
    begin, proceed = Begin(model, LONGEST, 2).set_train(False), Continue(model, LONGEST).set_train(False)
    logits, *caches = begin(Tensor(answers[:, :2]), Tensor(places), *memory)
    np.testing.assert_allclose(logits.asnumpy(), wanted[rows, places - 1], atol=1e-5)
    caches = [ops.concat((cache, ops.ones((*cache.shape[:2], 3, cache.shape[3]))), 2) for cache in caches]
    for _ in range(2):
        logits = proceed(Tensor(answers[rows, places]), Tensor(places), *memory, *caches)
        np.testing.assert_allclose(logits.asnumpy(), wanted[rows, places], atol=1e-5)
        places = places + 1
