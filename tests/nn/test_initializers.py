"""Initial numbers: a part drawn alone equals that part of the whole, streams differ, distributions are those asked for.

The scenario of a start by shard is `test_parts_set_in_a_model_built_without_numbers_are_those_of_one_device`.
"""

import numpy as np
import pytest
from oracles.tiny import tiny_config

from switchyard.checkpoint.layout import shard_of
from switchyard.distributed.placement import ParallelDims
from switchyard.models import create_model
from switchyard.nn import initializers
from switchyard.nn.adamw import AdamW
from switchyard.nn.initializers import InitialWeights, NormalStream, set_initial, shapes_only

KEY = np.array([3, 4], np.uint64)


def random_box(random, shape):
    ends = [sorted(random.integers(0, size + 1, 2)) for size in shape]
    return tuple(slice(int(start), int(stop)) for start, stop in ends)


@pytest.mark.parametrize("seed", range(8))
def test_any_part_drawn_alone_is_that_part_of_the_whole(seed, monkeypatch):
    """Chunks and blocks far smaller and odd, so that small arrays cross their borders everywhere."""
    random = np.random.default_rng(seed)
    monkeypatch.setattr(initializers, "CHUNK", int(random.integers(2, 40)))
    monkeypatch.setattr(initializers, "BLOCK", int(random.integers(1, 60)))
    for _ in range(20):
        shape = tuple(random.integers(1, 9, random.integers(0, 5)))
        stream = NormalStream(KEY, 0.5, shape)
        whole, box = stream.draw(), random_box(random, shape)
        assert whole.shape == shape and whole.dtype == np.float32
        np.testing.assert_array_equal(stream.draw(box), whole[box])


def test_parts_at_the_real_sizes_of_chunks_and_blocks():
    stream = NormalStream(KEY, 0.02, (3, 700, 500))
    whole = stream.draw()
    for box in [np.s_[1:2, 0:700, 0:500], np.s_[0:3, 350:700, 0:500], np.s_[0:3, 0:700, 125:250]]:
        np.testing.assert_array_equal(stream.draw(box), whole[box])


def test_numbers_are_normal_and_streams_unlike():
    """Half a million numbers each, chunks included: deviations of the mean and of a correlation are about 0.0014."""
    random = InitialWeights(1)
    drawn = [random.normal(2.0, (1000, 500), name).asnumpy().reshape(-1).astype(np.float64) for name in "ab"]
    other = InitialWeights(2).normal(2.0, (1000, 500), "a").asnumpy().reshape(-1).astype(np.float64)
    for numbers in (*drawn, other):
        assert abs(numbers.mean()) < 0.015 and abs(numbers.std() - 2.0) < 0.01
        assert abs((np.abs(numbers) < 2.0).mean() - 0.6827) < 0.004
    assert np.abs(np.corrcoef([*drawn, other]) - np.eye(3)).max() < 0.008
    chunks = drawn[0][: 30 * initializers.CHUNK].reshape(30, -1)
    assert np.abs(np.corrcoef(chunks) - np.eye(30)).max() < 0.05


def test_a_seed_repeats_and_tables_are_drawn_from_streams_of_their_own():
    one, other = InitialWeights(5), InitialWeights(5)
    for random in (one, other):
        random.permutation(7)
    np.testing.assert_array_equal(one.normal(1.0, (4,), "a").asnumpy(), other.normal(1.0, (4,), "a").asnumpy())
    table = one.integers(0, 3, 600)
    assert table.min() == 0 and table.max() == 2 and (table != one.integers(0, 3, 600)).any()
    assert sorted(one.permutation(9)) == list(range(9))


@pytest.mark.parametrize("degrees", [{"expert_parallel": 2}, {"model_parallel": 2}, {"optimizer_shard": 1}])
def test_parts_set_in_a_model_built_without_numbers_are_those_of_one_device(degrees):
    config = tiny_config(hidden=4, router="hash", expert_num=2, layers="all")
    degrees, layers = ParallelDims(data_parallel=2, **degrees), config.model.num_layers
    whole = {parameter.name: parameter.asnumpy() for parameter in create_model(config, 7).get_parameters()}
    for rank in range(degrees.devices):
        with shapes_only():
            model = create_model(config, 7, drawn=False)
            optimizer = AdamW(model.trainable_params(), 0.9, 0.99, 1e-8, 0.1)
        parameters = [*model.get_parameters(), *optimizer.state().values()]
        built = {parameter.name for parameter in parameters if parameter.has_init}
        assert "layers.0.feed_forward.experts.w_in" in built and "moment1.embedding.table" in built
        set_initial(parameters, lambda name, shape, rank=rank: shard_of(name, shape, degrees, rank, layers))
        assert not any(parameter.has_init for parameter in parameters)
        for parameter in parameters:
            name = parameter.name.removeprefix("moment1.").removeprefix("moment2.")
            if parameter.name not in built or name not in whole:
                continue
            part = whole[name][shard_of(parameter.name, whole[name].shape, degrees, rank, layers)]
            expected = part if parameter.name == name else np.zeros_like(part)
            np.testing.assert_array_equal(parameter.asnumpy(), expected)
