"""What the planner says of an encoder-decoder, against the model, the compiled graph and numbers by hand."""

from collections import Counter

import pytest
from oracles.tiny_seq2seq import VOCABULARY, seq2seq_config

from switchyard.distributed.placement import ParallelDims
from switchyard.models import create_model
from switchyard.planner.costs import costs, exchanges, stage_costs
from switchyard.planner.host import noise_slices
from switchyard.planner.sizes import parameters
from switchyard.simulation.compile import compile_step


@pytest.mark.parametrize("model", [{"dropout": 0.1}, {"activation": "swiglu", "tie_word_embeddings": False}])
def test_parameters_and_noise_are_those_of_the_model(model):
    config = seq2seq_config(model=model, seq2seq={"num_decoder_layers": 3})
    made = create_model(config, VOCABULARY, drawn=False)
    assert parameters(config, VOCABULARY) == {one.name: tuple(one.shape) for one in made.get_parameters()}
    assert noise_slices(config) == made.noise_slices


def test_the_work_of_a_dense_encoder_decoder_by_hand():
    """D 16, F 20; 18 rows of 9 keys, 8 of 4; two layers each; cross-attention of 8 rows with 18; head 16 x 20."""
    attention = 18 * (4 * 256 + 2 * 9 * 16) + 8 * (4 * 256 + 2 * 4 * 16)
    cross = 8 * 2 * 256 + 18 * 2 * 256 + 8 * 2 * 9 * 16
    blocks = 2 * (attention + cross + (18 + 8) * 2 * 16 * 20)
    assert costs(seq2seq_config({}), VOCABULARY).flops == 2 * 3 * (blocks + 8 * 16 * 20)


@pytest.mark.long
def test_exchanges_and_what_is_held_are_those_of_the_graph():
    """Two data and expert shards, two model shards, ZeRO 1."""
    parallel = {"data_parallel": 2, "expert_parallel": 2, "model_parallel": 2, "optimizer_shard": 1}
    config = seq2seq_config(parallel=parallel, data={"batch_size": 8})
    report, degrees = compile_step(config, 4, 0, VOCABULARY), ParallelDims.of(config.parallel)
    groups = {"expert": ("expert",), "replicas": ("outer",), "data": ("outer", "expert"), "model": ("model",)}
    groups["stage"] = ("outer", "expert", "model")
    expected = Counter()
    for one in exchanges(config, VOCABULARY):
        expected[one.kind, degrees.along(0, *groups[one.group]), one.bytes] += one.number
    assert Counter((one.kind, one.group, one.bytes) for one in report.collectives) == expected
    cost = stage_costs(config, VOCABULARY)[0]
    assert {"weights": cost.weights, "optimizer state": cost.optimizer} == report.held_bytes
