"""Relative positions against a literal loop over distances."""

import math

import numpy as np
import pytest
from mindspore import Tensor

from switchyard.config import build
from switchyard.nn.layers import MASKED
from switchyard.nn.relative import RelativeBias, relative_buckets


def bucket_loop(distance: int, causal: bool, buckets: int, most: int) -> int:
    """The rule of T5 for one distance (key - query): exact ones, then by the logarithm, then one for all the rest."""
    first, size = 0, -distance
    if not causal:
        buckets //= 2
        if distance > 0:
            first, size = buckets, distance
    size, exact = max(size, 0), buckets // 2
    if size < exact:
        return first + size
    far = exact + int(math.log(size / exact) / math.log(most / exact) * (buckets - exact) + 1e-6)
    return first + min(far, buckets - 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (8, 20), (4, 3)])
def test_buckets_equal_a_loop(causal, buckets, most):
    distances = np.arange(-200, 201)
    wanted = [bucket_loop(int(distance), causal, buckets, most) for distance in distances]
    assert relative_buckets(distances, causal, buckets, most).tolist() == wanted


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (5, 5), (3, 7)])
def test_the_bias_of_a_query_and_a_key_is_that_of_their_distance(causal, queries, keys, pynative):
    own = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 6}
    config = build({"seq2seq": own}, inherited=True)
    table = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    found = RelativeBias(config, causal, 9)(Tensor(table), queries, keys).asnumpy()
    assert found.shape == (2, queries, keys)
    for query in range(queries):
        for key in range(keys):
            wanted = table[bucket_loop(key - query, causal, 8, 6)]
            if causal and key > query:
                wanted = wanted + MASKED
            np.testing.assert_allclose(found[:, query, key], wanted, rtol=1e-6)
