"""The emulated cluster: whole training steps of a decoder on several ranks equal those of one device, and faults show.

One layout is compiled for the tests of faults, the others are slow tests; what routers add is in test_emulate_routers.
"""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from oracles.marks import long_but
from oracles.workers import start_child

from switchyard import cli
from switchyard.config import build
from switchyard.distributed.compiled_graph import CONSTANT, Node
from switchyard.distributed.placement import ParallelDims
from switchyard.errors import UserError
from switchyard.simulation import compile as simulate
from switchyard.simulation import emulate as virtual
from switchyard.simulation.interpreter import EXCHANGES, ClusterError, NotExecutable, all_reduce, all_to_all

pytestmark = pytest.mark.usefixtures("workers")
VOCABULARY = 32
MODEL = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "seq_length": 8, "intermediate_size": 16}
MOE = {"expert_num": 4, "router": "top_k", "num_experts_chosen": 2, "layers": [1]}


def layout(model=None, moe=None, train=None, optimizer=None, batch_size=4, **degrees):
    """A decoder of a dense and a conditional layer, tied head, cut by these degrees."""
    return build(
        {
            "model": MODEL | {"init_method_std": 0.2} | (model or {}),
            "moe": MOE | (moe or {}),
            "data": {"batch_size": batch_size},
            "train": {"eval_every": 0} | (train or {}),
            "optimizer": optimizer or {},
            "parallel": degrees,
        }
    )


@pytest.fixture(scope="module")
def references(workers):
    """(config) -> (batches, what one device made of them); each number of routing groups is trained once."""
    known = {}

    def of(config, noise_slices=0):
        key = repr((config.model, config.moe, config.groups, config.train, config.micro_batches))
        if key not in known:
            batches = virtual.draw_batches(config, VOCABULARY, 3, noise_slices)
            known[key] = batches, virtual.train_reference(config, VOCABULARY, batches)
        return known[key]

    return of


@pytest.fixture(scope="module")
def four(references):
    """(config, reports, batches, reference) of 4 ranks: 2 expert slices, 2 replicas of each; compiled as users do."""
    config = layout(data_parallel=4, expert_parallel=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "run_child", start_child)
        return config, simulate.compile_ranks(config, 4, range(4), VOCABULARY), *references(config)


def test_four_ranks_equal_one_device(four):
    found = virtual.compare(*four)
    assert found.equal, virtual.render(found)
    assert found.losses[0][0] > 3 and len({loss for loss, _ in found.losses}) == 3
    experts = next(
        moved for name, (_, moved) in found.differences.items() if name == "layers.1.feed_forward.experts.w_in"
    )
    assert experts > 100 * virtual.TOLERANCE  # there was something to be wrong about
    assert found.met["AlltoAll", (0, 1)] == 4 and found.met["AlltoAll", (2, 3)] == 4


def test_what_a_rank_holds_is_said(four):
    report = four[1][3]
    assert report.parameters["layers.1.feed_forward.experts.w_in"] == (2, 16, 16)
    assert simulate.full_shape(report.layouts["layers.1.feed_forward.experts.w_in"], (2, 16, 16)) == (4, 16, 16)
    assert (
        report.count("AlltoAll", "forward", "layers.1") == 2 and report.count("AlltoAll", "backward", "layers.1") == 2
    )
    assert {one.group for one in report.collectives if one.kind == "AlltoAll"} == {(2, 3)}
    text = simulate.render(report, four[0])
    assert "rank 3 of 4: stage 0, outer data shard 1, expert shard 1" in text
    table = next(array for name, array in four[3].items() if name == "before:embedding.table")
    whole = sum(
        array.nbytes for name, array in four[3].items() if name.startswith("before:layers") and "experts" in name
    )
    assert report.held_bytes["weights"] > table.nbytes + whole // 2
    assert 0 < report.seconds < 600 and report.megabytes > 50
    assert simulate.to_json(report)["operators"]["AlltoAll"] == 4


def without_expert_sums(attributes, held):
    """Gradients of experts are not summed over their replicas."""
    return all_reduce(attributes, held) if len(held) == 4 else list(held)


def mean_for_sum(attributes, held):
    return [part / len(held) for part in all_reduce(attributes, held)]


def twice_the_sum(attributes, held):
    """Of gradients; the sums of losses and of the norm stay, so nothing else would tell."""
    return [part * (2 if part.ndim >= 2 else 1) for part in all_reduce(attributes, held)]


def lost_sum_of_the_table(attributes, held):
    """The gradient of the embedding, and nothing else, is not summed."""
    return list(held) if held[0].shape == (VOCABULARY, 16) else all_reduce(attributes, held)


def reversed_ranks(attributes, held):
    return all_to_all(attributes, held[::-1])


@pytest.mark.parametrize(
    "kind, fault",
    [
        ("AllReduce", without_expert_sums),
        ("AllReduce", mean_for_sum),
        ("AllReduce", twice_the_sum),
        ("AllReduce", lost_sum_of_the_table),
        ("AlltoAll", reversed_ranks),
    ],
)
def test_a_broken_collective_shows(four, kind, fault):
    try:
        found = virtual.compare(*four, exchanges={**EXCHANGES, kind: fault})
    except ClusterError as error:
        assert "loss: the ranks differ" in str(error)  # refused is noticed, too
        return
    assert not found.equal, virtual.render(found)


def test_a_broken_collective_shows_at_a_tiny_learning_rate(four):
    """Parameters hardly move there, so they cannot tell; gradients do."""
    config, reports, batches, _ = four
    slow = {name: array * 0 + 1e-9 if name == "rates" else array for name, array in batches.items()}
    still = virtual.train_reference(config, VOCABULARY, slow)
    assert virtual.compare(config, reports, slow, still).equal
    broken = virtual.compare(config, reports, slow, still, exchanges={**EXCHANGES, "AllReduce": without_expert_sums})
    assert broken.largest < virtual.TOLERANCE and not broken.equal
    assert any("gradient of layers.1.feed_forward.experts" in line for line in broken.reasons)


def test_experts_that_were_not_cut_show(four):
    """Every rank holds the first expert slice."""
    first = four[3]["before:layers.1.feed_forward.experts.w_in"][:2]

    def spoil(rank, weights):
        weights["layers.1.feed_forward.experts.w_in"] = first.copy()

    assert virtual.compare(*four, spoil=spoil).largest > 10 * virtual.TOLERANCE


def test_a_constant_that_was_not_cut_shows(four, monkeypatch):
    """Every rank reads the first slice of the batch, as it would if the batch were a constant of the graph."""
    real = virtual.batch_of
    monkeypatch.setattr(
        virtual, "batch_of", lambda batches, step, degrees, rank, noisy: real(batches, step, degrees, 0, noisy)
    )
    assert virtual.compare(*four).largest > 10 * virtual.TOLERANCE


def with_constant(report, valid):
    """The report, in whose graph the mask of real tokens is a constant."""
    graph = report.graph
    constant = Node(CONSTANT, (), graph.inputs[2], {"value": valid})
    nodes = replace(graph, nodes=[constant, *graph.nodes])
    return SimpleNamespace(graph=nodes, parameters=report.parameters, rank=report.rank)


def test_a_constant_inside_a_graph_that_was_not_cut_shows(four):
    """Of what is real of the batch every rank has its own part as a constant, then every rank the first rank's."""
    config, reports, batches, reference = four
    own = [virtual.batch_of(batches, 0, ParallelDims.of(config.parallel), rank, False)[2][0] for rank in range(4)]
    assert (own[0] != own[3]).any()
    right = [with_constant(report, valid) for report, valid in zip(reports, own)]
    assert virtual.compare(config, right, batches, reference).equal
    wrong = [with_constant(report, own[0]) for report in reports]
    assert virtual.compare(config, wrong, batches, reference).largest > 10 * virtual.TOLERANCE


def test_members_that_meet_different_collectives_are_named(four):
    config, reports, batches, reference = four
    with pytest.raises(ClusterError, match=r"rank 0 is at|deadlock"):
        virtual.compare(config, [reports[0], reports[2], reports[1], reports[3]], batches, reference)


LAYOUTS = {
    "dp2": {"data_parallel": 2},
    "ep2": {"data_parallel": 2, "expert_parallel": 2},
    "ep4": {"data_parallel": 4, "expert_parallel": 4},
    "tp2": {"model_parallel": 2},
    "dp2-ep2-tp2": {"data_parallel": 2, "expert_parallel": 2, "model_parallel": 2},
    "zero1": {"data_parallel": 2, "expert_parallel": 2, "optimizer_shard": 1},
    "zero3": {"data_parallel": 2, "expert_parallel": 2, "optimizer_shard": 3},
    "sequence-parallel, keys of attention": {
        "data_parallel": 2,
        "model_parallel": 2,
        "sequence_parallel": True,
        "model": {
            **{"head_size": 8, "qk_norm": "head", "attention_bias": "all", "partial_rotary": 0.5},
            **{"sliding_window": 3, "window_layers": [1]},
        },
    },
    "norms of all heads": {"data_parallel": 2, "model_parallel": 2, "model": {"qk_norm": "full", "head_size": 6}},
    "recompute": {"data_parallel": 2, "expert_parallel": 2, "recompute": True},
    "zero3, recompute": {"data_parallel": 2, "expert_parallel": 2, "optimizer_shard": 3, "recompute": True},
    "sinkhorn, re-routing, further losses": {
        "data_parallel": 2,
        "expert_parallel": 2,
        "model": {"activation": "gelu", "norm": "layernorm", "position": "learned", "tie_word_embeddings": False},
        "moe": {
            "router": "sinkhorn",
            "drop_order": "batch_priority",
            "reroute": 2,
            "capacity_factor": 0.5,
            "shared_expert_num": 1,
            "losses": {"sequence": 0.1, "mutual_information": 0.1},
        },
    },
    "zero1, one expert on a rank with two replicas": {
        "data_parallel": 4,
        "expert_parallel": 2,
        "optimizer_shard": 1,
        "moe": {"expert_num": 2, "shared_expert_num": 1},
        "model": {"activation": "swiglu"},
    },
    "zero3, three experts on a rank with two replicas, buffers": {
        "data_parallel": 4,
        "expert_parallel": 2,
        "optimizer_shard": 3,
        "moe": {"expert_num": 6, "dispatch": "dropless_static"},
    },
    "stages of two layers and of one, zero1": {
        "data_parallel": 2,
        "expert_parallel": 2,
        "pipeline_stage": 2,
        "micro_batch_num": 2,
        "optimizer_shard": 1,
        "model": {"num_layers": 3, "tie_word_embeddings": False},
        "moe": {"layers": [1, 2]},
    },
    "sigmoid in groups, dropless, zero3, tensor slices": {
        "data_parallel": 2,
        "expert_parallel": 2,
        "model_parallel": 2,
        "sequence_parallel": True,
        "recompute": True,
        "optimizer_shard": 3,
        "model": {"tie_word_embeddings": False},
        "moe": {
            "router": {"name": "sigmoid", "n_group": 4, "topk_group": 2},
            "expert_num": 8,
            "dispatch": "dropless",
            "shared_expert_num": 1,
            "aux_loss_factor": 0.0,
            "losses": {"sequence": 0.01},
        },
    },
    "accumulation, zero1": {
        "data_parallel": 2,
        "expert_parallel": 2,
        "optimizer_shard": 1,
        "train": {"gradient_accumulation_steps": 2},
    },
}


# what the four ranks above do not have: tensor slices, ZeRO, recomputing
SHORT = ("zero3, recompute",)


@pytest.mark.slow
@pytest.mark.parametrize("name", long_but(LAYOUTS, SHORT))
def test_every_layout_equals_one_device(name, references):
    config = layout(**LAYOUTS[name])
    reports = simulate.compile_ranks(config, config.devices, range(config.devices), VOCABULARY)
    found = virtual.compare(config, reports, *references(config))
    assert found.equal, virtual.render(found)


@pytest.mark.long
@pytest.mark.slow
def test_eight_expert_slices_and_a_router_with_noise(references):
    """One expert a rank; the router's input is noisy, and second experts are drawn by lot."""
    moe = {"router": "gshard", "second_expert": "sampling", "jitter": 0.2, "expert_num": 8, "layers": [0]}
    config = layout({"num_layers": 1}, moe, batch_size=8, data_parallel=8, expert_parallel=8)
    reports = simulate.compile_ranks(config, 8, range(8), VOCABULARY)
    assert virtual.noise_slices(config, reports[0]) == 2
    found = virtual.compare(config, reports, *references(config, 2))
    assert found.equal, virtual.render(found)
    assert found.met["AlltoAll", tuple(range(8))] == 4


@pytest.mark.long
@pytest.mark.slow
def test_float16_equals_one_device_but_for_rounding(references):
    """With a loss scale, and fused attention for heads of 16 columns, which see 3 tokens in one layer. The large eps
    makes AdamW's step follow the gradient's size: of a tiny one it would else make a whole step of the rounding error.
    Of six seeds three have a ReLU so near its kink that rounding decides; this is one of the others."""
    model = {"compute_dtype": "float16", "hidden_size": 32, "init_method_std": 0.1}
    model |= {"sliding_window": 3, "window_layers": [1]}
    train = {"init_loss_scale": 64.0, "seed": 3}
    config = layout(model, train=train, optimizer={"eps": 1e-2}, data_parallel=2, expert_parallel=2)
    reports = simulate.compile_ranks(config, 2, range(2), VOCABULARY)
    assert reports[0].operators["FlashAttentionScore"] == 2
    found = virtual.compare(config, reports, *references(config))
    assert all(abs(one - cluster) < 3e-4 for one, cluster in found.losses), virtual.render(found)  # logits of about 4
    far, moved = zip(*[each for name, each in found.differences.items() if not name.startswith("moment")])
    assert max(far) < 2e-5 and max(moved) > 1e-3, virtual.render(found)


@pytest.fixture(scope="module")
def staged(references):
    """The same of 4 ranks in 2 stages of 2 expert slices, a conditional layer each; micro-batches of unequal tokens."""
    degrees = {"pipeline_stage": 2, "micro_batch_num": 2, "data_parallel": 2, "expert_parallel": 2}
    config = layout({"tie_word_embeddings": False}, {"layers": "all"}, **degrees)
    return config, simulate.compile_ranks(config, 4, range(4), VOCABULARY), *references(config)


@pytest.mark.slow
def test_a_pipeline_equals_one_device(staged):
    found = virtual.compare(*staged)
    assert found.equal, virtual.render(found)
    moved = found.differences["layers.0.feed_forward.router.weight"][1]  # by the task, and by a loss of the last stage
    assert moved > 100 * virtual.TOLERANCE
    assert found.met["Send", (0, 2)] == found.met["Send", (3, 1)] == 2 * 2  # rows and tallies of each micro-batch
    assert not any(name.startswith("accu_grads") for name in found.differences)


@pytest.mark.slow
def test_a_pipeline_written_out_for_gpus_equals_one_device(references):
    """Without a function that the micro-batches share, without operators of Ascend, a stage a device."""
    config = layout({"tie_word_embeddings": False}, {"layers": "all"}, pipeline_stage=2, micro_batch_num=2)
    reports = simulate.compile_ranks(config, 2, range(2), VOCABULARY, step="oracles.written_out:step")
    assert not any(report.graph.functions or report.operators["RmsNorm"] for report in reports)
    found = virtual.compare(config, reports, *references(config))
    assert found.equal, virtual.render(found)
    assert found.met["Send", (0, 1)] == found.met["Send", (1, 0)] == 2 * 2  # rows and tallies of each micro-batch


@pytest.mark.slow
def test_a_pipeline_for_gpus_compiles_with_the_operators_that_are_fast_there():
    """Half precision, two experts chosen: nothing runs here, for NumPy does not know these operators."""
    model = {"tie_word_embeddings": False, "compute_dtype": "float16", "activation": "swiglu", "norm": "layernorm"}
    moe = {"layers": "all", "router": "top_k", "num_experts_chosen": 2}
    config = layout(model, moe, pipeline_stage=2, micro_batch_num=2)
    (report,) = simulate.compile_ranks(config, 2, [1], VOCABULARY, step="oracles.written_out:fast_step")
    assert report.operators["SiLU"] and report.operators["LayerNorm"] and report.operators["Softmax"]


def lost_gradients_of_tallies(attributes, held):
    """What comes back to the first stage for its balance loss is lost."""
    return [np.zeros_like(part) if part.ndim == 2 and len(part) == 1 else part for part in held]


def lost_rows(attributes, held):
    return [np.zeros_like(part) if len(part) > 1 else part for part in held]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, fault", [("Send", lost_gradients_of_tallies), ("Send", lost_rows), ("AllReduce", mean_for_sum)]
)
def test_a_broken_pipeline_shows(staged, kind, fault):
    assert virtual.compare(*staged, exchanges={**EXCHANGES, kind: fault}).largest > 10 * virtual.TOLERANCE


def test_the_command_line_says_whether_they_are_equal(tmp_path, monkeypatch, capsys):
    path = tmp_path / "two.yaml"
    path.write_text("parallel: {data_parallel: 2}\ndata: {batch_size: 2}\n")
    arguments = ["--config", str(path), "--devices", "2"]
    for far, code in ((1e-6, 0), (2e-5, 1), (float("nan"), 1)):
        found = virtual.Comparison([(3.5, 3.5)], {"norm.gain": (far, 0.1)}, Counter())
        monkeypatch.setattr(virtual, "prove", lambda *_, found=found: found)
        assert cli.run(virtual.main, arguments) == code
    assert "DIFFERENT" in capsys.readouterr().out
    assert cli.run(virtual.main, [*arguments, "--steps", "0"]) == 2


def test_what_is_explained_is_said_and_what_cannot_be_executed_is_no_verdict(tmp_path, monkeypatch, capsys):
    path = tmp_path / "two.yaml"
    path.write_text("parallel: {data_parallel: 2}\ndata: {batch_size: 2}\n")
    arguments = ["--config", str(path), "--devices", "2"]
    differences = {"norm.gain": (2e-3, 0.1)}
    found = virtual.Comparison([(3.5, 3.5)], differences, Counter(), explained={"norm.gain": 2}, strayed=1)
    monkeypatch.setattr(virtual, "prove", lambda *_: found)
    assert cli.run(virtual.main, arguments) == 0
    said = capsys.readouterr().out
    assert "explained (2)" in said and "2 entries differ, as gradients near zero explain" in said
    assert said.rstrip().endswith("1 expert choices differ: equal")
    for error, code, says in (
        (
            NotExecutable("operator Fancy: cannot be executed (x)"),
            2,
            "error: cluster emulation: operator Fancy: cannot",
        ),
        (ClusterError("deadlock: {}"), 1, "cluster emulation: deadlock: {}: DIFFERENT"),
    ):
        monkeypatch.setattr(virtual, "prove", lambda *_, error=error: raised(error))
        assert cli.run(virtual.main, arguments) == code
        assert says in "".join(capsys.readouterr())


def raised(error):
    raise error


def test_a_tie_of_experts_is_drawn_again_and_a_fault_is_not_forgiven(monkeypatch):
    """Loads that differ ask for other batches, as long as the verdict is DIFFERENT."""
    config, draws = layout(data_parallel=2), []
    monkeypatch.setattr(virtual.simulate, "compile_ranks", lambda *_: [None])
    monkeypatch.setattr(virtual, "noise_slices", lambda *_: 0)
    monkeypatch.setattr(virtual, "train_reference", lambda *_: {})
    monkeypatch.setattr(virtual, "compare", lambda config, reports, batches, _: draws.append(batches) or results.pop(0))
    wrong, right = [(3.0, 4.0)], [(3.0, 3.0)]
    for losses, strayed, count in (([wrong, right], 1, 2), ([wrong] * 3, 1, 3), ([wrong], 0, 1), ([right], 1, 1)):
        draws.clear()
        results = [virtual.Comparison(each, {}, Counter(), strayed=strayed) for each in losses]
        assert virtual.prove(config, 2, vocab=VOCABULARY).equal == (losses[-1] is right) and len(draws) == count
    assert (virtual.draw_batches(config, 9, 1)["tokens"] != virtual.draw_batches(config, 9, 1, draw=1)["tokens"]).any()


def test_the_kink_of_relu_is_compared_with_gelu_and_a_fault_is_not_forgiven(monkeypatch):
    """Only where losses agree, gradients do not, and the activation is ReLU."""
    asked, results, wrong, right = [], [], {"w_in": 1e-2}, {"w_in": 1e-6}

    def once(config, devices, steps, vocab):
        asked.append(config.model.activation)
        losses, gradients = results.pop(0)
        return virtual.Comparison(losses, {}, Counter(), gradients=gradients)

    monkeypatch.setattr(virtual, "prove_once", once)
    agree, differ = [(3.0, 3.0)], [(3.0, 4.0)]
    for activation, given, activations, equal in (
        ("relu", [(agree, wrong), (agree, right)], ["relu", "gelu"], True),
        ("relu", [(agree, wrong), (agree, wrong)], ["relu", "gelu"], False),
        ("relu", [(differ, wrong)], ["relu"], False),
        ("relu", [(agree, right)], ["relu"], True),
        ("swiglu", [(agree, wrong)], ["swiglu"], False),
    ):
        asked.clear()
        results[:] = given
        found = virtual.prove(layout(data_parallel=2, model={"activation": activation}), 2, vocab=VOCABULARY)
        assert (asked, found.equal) == (activations, equal)
        assert (virtual.SMOOTH in virtual.render(found)) == (len(activations) > 1)


def test_what_training_refuses_is_not_emulated():
    config = layout({"tie_word_embeddings": False}, train={"eval_every": 5}, pipeline_stage=2, micro_batch_num=2)
    with pytest.raises(UserError, match=r"^train\.eval_every: 5; 0 with parallel\.pipeline_stage \(2\)"):
        virtual.prove(config, 2)


def test_other_types_than_float32_are_refused():
    config = layout(data_parallel=2, model={"compute_dtype": "bfloat16"})
    with pytest.raises(UserError, match=r"model\.compute_dtype: bfloat16"):
        virtual.prove(config, 2)


def test_moments_do_not_count_as_parameters():
    found = virtual.Comparison([(1.0, 1.0)], {"moment1.a": (1.0, 1.0), "a": (1e-7, 1.0)}, Counter())
    assert found.largest == np.float64(1e-7) and found.equal
