"""Dropless expert parallelism: the graphs of all ranks, executed together, train as one device does.

Rows that an operator leaves undefined are NaN there, and a rank that receives nothing is an error. What the graphs hold
is in test_collectives.
"""

import numpy as np
import pytest
from mindspore import Tensor
from oracles.marks import long_but

from switchyard.config import build
from switchyard.distributed.placement import ParallelDims
from switchyard.errors import UserError
from switchyard.models import create_model
from switchyard.moe import metrics
from switchyard.simulation import compile as simulate
from switchyard.simulation import emulate as virtual
from switchyard.simulation.baseline import one_device
from switchyard.simulation.interpreter import EXCHANGES, all_reduce, all_to_all, all_to_all_v, run_cluster
from switchyard.training.loss import STATISTICS
from switchyard.training.scores import EvalStep

VOCABULARY = 32
MODEL = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "seq_length": 8, "intermediate_size": 16}
NAMES = ("tokens", "labels", "valid")
FORMS = ("dropless", "dropless_static")
pytestmark = pytest.mark.usefixtures("workers")


def layout(dispatch, model=None, moe=None, context=None, **degrees):
    """A decoder of a dense and a conditional layer of 4 experts, 2 a row; the last sequence is half padding."""
    experts = {"expert_num": 4, "router": "top_k", "num_experts_chosen": 2, "layers": [1], "dispatch": dispatch}
    return build(
        {
            "model": MODEL | {"init_method_std": 0.2} | (model or {}),
            "moe": experts | (moe or {}),
            "data": {"batch_size": 4},
            "parallel": degrees,
            "context": context or {},
            # of an element whose gradient is nearly zero AdamW would make a whole step of the rounding error
            "optimizer": {"eps": 1e-4},
        }
    )


def skewed(dispatch, bias):
    """4 ranks, 2 expert slices; with a large bias all rows of both groups go to ranks 0 and 2, none to 1 and 3."""
    moe = {"router": {"name": "oracles.skewed.Skewed", "first_bias": bias}}
    return layout(dispatch, moe=moe, data_parallel=4, expert_parallel=2)


def compiled(config):
    return simulate.compile_ranks(config, config.devices, range(config.devices), VOCABULARY)


def trained(config, reports, steps=2):
    """(batches, what one device made of them)."""
    batches = virtual.draw_batches(config, VOCABULARY, steps, virtual.noise_slices(config, reports[0]))
    return batches, virtual.train_reference(config, VOCABULARY, batches)


def assert_equal(config, reports, batches, reference):
    found = virtual.compare(config, reports, batches, reference)
    assert found.equal, virtual.render(found)
    moments = [far for name, (far, _) in found.differences.items() if name.startswith("moment1")]
    assert max(moments) < 1e-6  # a tenth of the gradients'
    for name in ("w_in", "w_out"):  # there was something to be wrong about
        assert found.differences[f"layers.1.feed_forward.experts.{name}"][1] > 100 * virtual.TOLERANCE
    return found


@pytest.fixture(scope="module", params=long_but(FORMS, ["dropless"]))
def four(request, workers):
    """(form, reports of 4 ranks); the bias is a weight, so graphs serve balanced and skewed routing."""
    return request.param, compiled(skewed(request.param, 0.0))


@pytest.mark.slow
def test_balanced_rows(four):
    config = skewed(four[0], 0.0)
    found = assert_equal(config, four[1], *trained(config, four[1]))
    sent = {"dropless": {"AlltoAll": 1, "AlltoAllV": 5}, "dropless_static": {"AlltoAll": 5}}[four[0]]
    for group in ((0, 1), (2, 3)):
        assert {kind: number for (kind, ranks), number in found.met.items() if ranks == group} == sent


@pytest.mark.slow
def test_every_row_on_one_rank_and_faults(four):
    """Experts 2 and 3, those of ranks 1 and 3, get no row; their weights only decay."""
    config = skewed(four[0], 50.0)
    batches, reference = trained(config, four[1])
    assert_equal(config, four[1], batches, reference)
    name = "layers.1.feed_forward.experts.w_out"
    moment = reference[f"after:moment1.{name}"]
    assert np.abs(moment[:2]).min(axis=0).max() > 0 and (moment[2:] == 0).all()

    def reversed_sources(attributes, held):
        out = all_to_all_v(attributes, held)
        return [np.concatenate(np.split(part, [part.size // 2])[::-1]) for part in out]

    def reversed_ranks(attributes, held):
        return all_to_all(attributes, held) if held[0].ndim == 2 else all_to_all(attributes, held[::-1])

    def without_expert_sums(attributes, held):
        return all_reduce(attributes, held) if len(held) == 4 else list(held)

    faults = {"AllReduce": without_expert_sums}
    faults |= {"AlltoAllV": reversed_sources} if four[0] == "dropless" else {"AlltoAll": reversed_ranks}
    for kind, fault in faults.items():
        found = virtual.compare(config, four[1], batches, reference, exchanges={**EXCHANGES, kind: fault})
        assert not found.largest <= 10 * virtual.TOLERANCE, kind


REFUSING = {"router": "gshard", "second_expert": "threshold", "second_expert_threshold": 0.49}
CASES = {
    "one expert a rank, refused choices, ZeRO, recompute": (
        "dropless",
        {
            "moe": REFUSING | {"expert_num": 2, "groups": 4},
            "optimizer_shard": 1,
            "recompute": True,
        },
    ),
    "SwiGLU, tensor parallel, jitter": (
        "dropless_static",
        {
            "model": {"activation": "swiglu"},
            "moe": {"shared_expert_num": 1, "jitter": 0.1},
            "model_parallel": 2,
        },
    ),
    "SwiGLU, static, jitter": (
        "dropless_static",
        {"model": {"activation": "swiglu"}, "moe": {"shared_expert_num": 1, "jitter": 0.1}},
    ),
    "SwiGLU by its operator": ("dropless", {"model": {"activation": "swiglu"}}),
    "SwiGLU composed": ("dropless", {"model": {"activation": "swiglu"}, "context": {"fused_operators": False}}),
    "as other devices compose": ("dropless", {"context": {"fused_operators": False}}),
    "no expert parallel": ("dropless", {"expert_parallel": 1, "model": {"activation": "gelu"}}),
}


SHORT = ("one expert a rank, refused choices, ZeRO, recompute", "SwiGLU, static, jitter")


@pytest.mark.slow
@pytest.mark.parametrize("name", long_but(CASES, SHORT))
def test_further_layouts(name, monkeypatch):
    form, tree = CASES[name]
    figures, figures_of = [], virtual.figures_of
    monkeypatch.setattr(virtual, "figures_of", lambda *given: figures.append(figures_of(*given)) or figures[-1])
    config = layout(form, **{"data_parallel": 2, "expert_parallel": 2} | tree)
    reports = compiled(config)
    assert_equal(config, reports, *trained(config, reports))
    load, real = metrics.metrics(figures[0][0, STATISTICS:], config.moe.expert_num)["load"], 28  # of 32 tokens
    if "refused" in name:
        assert real < load.sum() < 2 * real
    else:
        assert load.sum() == 2 * real


@pytest.mark.slow
@pytest.mark.parametrize(
    "dispatch, sent", [("dropless", {"AlltoAll": 1, "AlltoAllV": 3}), ("capacity", {"AlltoAll": 3})]
)
def test_evaluation_on_devices_is_that_of_one(workers, graph, dispatch, sent):
    """Losses of each sequence, loads and importances, and choices where they are recorded. Nothing is dropped, whatever
    training drops: there a capacity of half the rows, here buffers of a fixed size. Nothing is replayed."""
    files = {"record": "own.safetensors", "replay": "other.safetensors"}
    config = layout(dispatch, moe={"capacity_factor": 0.5} | files, data_parallel=2, expert_parallel=2)
    reports = simulate.compile_ranks(config, 2, range(2), VOCABULARY, step="oracles.cluster_probe:scores")
    model = create_model(build(one_device(config.model_dump())), VOCABULARY).set_train(False)
    tokens, labels, valid = (virtual.draw_batches(config, VOCABULARY, 1)[name][0, 0] for name in NAMES)  # [B, S]
    scores, stats, choices = EvalStep(model)(*map(Tensor, (tokens, labels, valid)))
    whole, degrees = {each.name: each.asnumpy() for each in model.get_parameters()}, ParallelDims.of(config.parallel)
    weights = [
        {name: virtual.shard_of_rank(name, whole[name], shape, degrees, report.rank) for name, shape in held.items()}
        for report, held in ((report, report.parameters) for report in reports)
    ]
    inputs = [[np.split(part, 2)[rank] for part in (tokens, labels, valid)] for rank in range(2)]
    outputs, met = run_cluster([report.graph for report in reports], inputs, weights)
    one = metrics.metrics(stats.asnumpy(), config.moe.expert_num)
    assert one["load"].sum() == 2 * valid.sum() and one["dropped"] == 0
    for ((found, summed, chosen, *_),) in outputs:
        np.testing.assert_array_equal(chosen, choices.asnumpy())
        np.testing.assert_allclose(found, scores.asnumpy(), rtol=2e-6)
        cluster = metrics.metrics(summed, config.moe.expert_num)
        assert cluster.keys() == one.keys()
        for name, figure in one.items():
            np.testing.assert_allclose(cluster[name], figure, rtol=1e-5, atol=1e-7, err_msg=name)
    assert {kind: number for (kind, _), number in met.items() if kind.startswith("AlltoAll")} == sent


def test_static_buffers_beyond_exact_sort_keys_are_refused():
    """64 ranks of 2**18 rows each: the buffers that could arrive at one rank have 2**24 rows and more."""
    model = {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "seq_length": 64}
    moe = {"router": "switch", "num_experts_chosen": 1, "layers": "all", "expert_num": 64, "groups": 4096}
    tree = {"model": MODEL | model, "moe": moe | {"dispatch": "dropless_static"}, "data": {"batch_size": 2**18}}
    config = build(tree | {"parallel": {"data_parallel": 64, "expert_parallel": 64}})
    with pytest.raises(UserError, match=r"data\.batch_size: 262144; 16777280 rows of a device are sorted at once"):
        simulate.compile_step(config, 64, 0, VOCABULARY)
