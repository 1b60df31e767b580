"""What a run costs: FLOPs by hand, seconds between two lines, the share of the peak, waiting for the slowest rank."""

import numpy as np
import pytest
from oracles.tiny_run import run_config

from switchyard.training.cost import CostMeter, active_weights, cost_words, flops_of_token, measured_peak, memory_peak

MOE = {"expert_num": 4, "num_experts_chosen": 2, "router": "top_k", "shared_expert_num": 1}
SHAPES = {
    "embedding.table": (17, 16),
    "position.table": (16, 16),
    "layers.0.attention_norm.gain": (16,),
    "layers.0.attention.qkv.weight": (16, 48),
    "layers.0.attention.out.weight": (16, 16),
    "layers.0.feed_forward.router.weight": (16, 4),
    "layers.0.feed_forward.experts.w_in": (4, 16, 64),
    "layers.0.feed_forward.experts.w_out": (4, 64, 16),
    "layers.0.feed_forward.shared.w_in": (1, 16, 64),
    "layers.0.feed_forward.shared.w_out": (1, 64, 16),
}
ALWAYS = 16 * 48 + 16 * 16 + 16 * 4 + 2 * 16 * 64  # attention, router, shared expert


@pytest.mark.parametrize("tied, head", [(True, 17 * 16), (False, 0)])
def test_a_token_meets_its_experts_and_the_output_layer(tied, head):
    config = run_config(moe=MOE, model={"position": "learned", "tie_word_embeddings": tied})
    weights = ALWAYS + 2 * (2 * 16 * 64) + head  # two of four experts
    assert active_weights(config, SHAPES) == weights
    assert flops_of_token(config, SHAPES) == 6 * weights + 12 * 1 * 16 * 16  # L = 1, H Q = 16, S = 16


def test_networks_of_images_have_no_share_of_the_peak():
    config = run_config(model={"type": "vision"}, data={"tokenizer": "char"})
    assert flops_of_token(config, SHAPES) is None
    assert CostMeter(config, SHAPES).figures(10.0)["mfu"] is None


def test_figures_are_those_since_the_line_before():
    meter = CostMeter(run_config(moe=MOE, train={"peak_tflops": 0.001}), SHAPES, devices=2)
    meter.add("data", 0.5), meter.add("compute", 2.0), meter.add("saving", 0.25)
    meter.met(np.array([0.1, 0.3]), waited=0.05)  # rank 1 began 0.2 s after rank 0
    meter.met(np.array([0.1, 0.1]), waited=0.01)
    first = meter.figures(4000.0)
    assert first["tokens_per_second_device"] == 2000
    assert first["mfu"] == pytest.approx(2000 * flops_of_token(run_config(moe=MOE), SHAPES) / 1e9)
    assert (first["data_seconds"], first["compute_seconds"], first["saving_seconds"]) == (0.5, 2.0, 0.25)
    assert first["wait_seconds"] == pytest.approx((0.05 + 0.1 + 0.01) / 2) and first["slowest_rank"] == 1
    meter.add("data", 0.125)
    second = meter.figures(None)
    assert second["data_seconds"] == 0.125 and second["compute_seconds"] == 0 and second["mfu"] is None
    assert "wait_seconds" not in second
    assert cost_words(first | {"memory_peak": 2_500_000_000, "mfu": 0.25}) == [
        "mfu 25.0%", "memory 2.50 GB", "data 0.50 s", "compute 2.00 s", "saving 0.25 s", "wait 80 ms for rank 1"
    ]  # fmt: skip


def test_the_peak_is_measured_in_a_sane_range():
    assert 1e8 < measured_peak("float32") < 1e14
    assert 1e7 < memory_peak() < 1e13
