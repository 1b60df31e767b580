"""Sparse upcycling: every expert a copy of the dense feed-forward, and the first loss that of the dense model."""

import mindspore as ms
import numpy as np
import pytest
from oracles.tiny_run import losses_of, run_config, token_batch, write_text

from switchyard import cli
from switchyard.checkpoint import store as checkpoint
from switchyard.errors import UserError
from switchyard.interop.promise import why_not_equal
from switchyard.interop.upcycle import check_upcyclable, copies, main, upcycle
from switchyard.models import create_model
from switchyard.training.loop import train

PYNATIVE, SHORT = {"mode": "pynative"}, {"val_fraction": 0.01}
TOP_2 = {"router": "top_k", "expert_num": 4, "num_experts_chosen": 2, "dispatch": "dropless"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a text, and a dense run of two steps on it."""
    path = tmp_path_factory.mktemp("upcycle")
    write_text(path)
    train(sparse(path, "dense", {}, steps=2))
    return path


def sparse(folder, name: str, moe: dict, steps: int = 3, **sections):
    train_keys = {"train": {"name": name, "steps": steps}}
    large = {"init_method_std": 0.3}  # outputs that a wrong gate would change
    return run_config(folder, model=large, moe=moe, data=SHORT, context=PYNATIVE, **train_keys, **sections)


def logits_of(path) -> np.ndarray:
    """What a checkpoint's model says to one batch while it trains, as its first step would see it."""
    held = checkpoint.read(path)
    model = create_model(held.config, len(held.weights["embedding.table"])).set_train()
    checkpoint.load_weights(model, held.weights)
    tokens, _, valid = (ms.Tensor(part[0]) for part in token_batch(1, 4, 16, 29))
    return model(tokens, valid, ms.Tensor(np.zeros((1, 1, 1), np.float32)))[0].asnumpy()


@pytest.mark.parametrize(
    "moe",
    [
        TOP_2,
        TOP_2 | {"router": "sigmoid", "aux_loss_factor": 0, "shared_expert_num": 1},
        TOP_2 | {"moe_intermediate_size": 32, "expert_num": 8, "num_experts_chosen": 4},  # two copies of two slices
        pytest.param({"router": "hash", "expert_num": 4, "dispatch": "dropless"}, marks=pytest.mark.long),
        pytest.param({"router": "dense", "expert_num": 4}, marks=pytest.mark.long),
    ],
    ids=["top_2", "sigmoid and shared", "finer experts", "hash", "dense"],
)
def test_the_first_outputs_are_those_of_the_dense_model(folder, moe, tmp_path, pynative):
    config, dense = sparse(folder, "up", moe), folder / "runs" / "dense"
    _, reasons = upcycle(checkpoint.read(dense), config, tmp_path / "up")
    assert reasons == []
    np.testing.assert_allclose(logits_of(tmp_path / "up"), logits_of(dense), atol=1e-4, rtol=0)


def test_it_says_so_where_they_are_not(folder, tmp_path, pynative):
    """A switch gate is a probability: the experts' share of the output is about a quarter of the dense one."""
    config, dense = sparse(folder, "up", {"router": "switch", "expert_num": 4}), folder / "runs" / "dense"
    _, reasons = upcycle(checkpoint.read(dense), config, tmp_path / "up")
    assert [reason.partition(";")[0] for reason in reasons] == ["moe.router: switch", "moe.dispatch: capacity"]
    assert np.abs(logits_of(tmp_path / "up") - logits_of(dense)).max() > 1e-4


@pytest.mark.parametrize(
    "moe, noise, key",
    [
        ({"num_experts_chosen": 1}, 0, "moe.num_experts_chosen: 1"),
        ({"dispatch": "capacity"}, 0, "moe.dispatch: capacity"),
        ({"router": {"name": "top_k", "norm_topk_prob": False}}, 0, "moe.router.norm_topk_prob: False"),
        ({"router": {"name": "top_k", "routed_scaling_factor": 2.5}}, 0, "moe.router.routed_scaling_factor: 2.5"),
        ({"router": {"name": "gshard", "second_expert": "sampling"}}, 0, "moe.router.second_expert: sampling"),
        ({"copies": 2}, 0, "moe.copies: 2"),
        ({}, 0.1, "--noise: 0.1"),
    ],
)
def test_each_option_that_breaks_the_promise_is_named(moe, noise, key):
    found = why_not_equal(run_config(moe=TOP_2 | moe), 1, noise)
    assert [reason.partition(";")[0] for reason in found] == [key]


def test_slices_of_a_copy_must_be_chosen_together():
    assert why_not_equal(run_config(moe=TOP_2), 2) == []
    assert "not a multiple of the 4 slices" in why_not_equal(run_config(moe=TOP_2), 4)[0]
    assert "may choose some slices" in why_not_equal(run_config(moe=TOP_2 | {"router": "cosine"}), 2)[0]


def test_copies_by_hand():
    """Two copies of two slices: the hidden width is divided, and w_out is doubled for gates of one half."""
    w_in = np.arange(8, dtype=np.float32).reshape(1, 2, 4)  # [1, D, F]
    first, second = w_in[0][:, :2], w_in[0][:, 2:]
    np.testing.assert_array_equal(copies(w_in, "w_in", 4, 2), [first, second, first, second])
    w_out = w_in.transpose(0, 2, 1)
    np.testing.assert_array_equal(copies(w_out, "w_out", 4, 2)[1], 2 * w_out[0][2:])
    np.testing.assert_array_equal(copies(w_out, "moment1.w_out", 4, 2, scaled=False)[1], w_out[0][2:])


def test_training_goes_on_with_the_moments_of_the_dense_model(folder, capsys):
    """--resume takes the step and the place in the data; the moments of the router begin at 0."""
    config = sparse(folder, "resumed", TOP_2)
    path = folder / "resumed.yaml"
    path.write_text(config.to_yaml())
    assert cli.run(main, ["--from", str(folder / "runs" / "dense"), "--to", str(path)]) == 0
    assert "upcycle: the first loss equals that of the dense model" in capsys.readouterr().out
    run = folder / "runs" / "resumed"
    dense, start = checkpoint.read(folder / "runs" / "dense"), checkpoint.read(run)
    assert start.step == 2 and start.optimizer["correction1"] == dense.optimizer["correction1"]
    for moment in ("moment1", "moment2"):
        name = f"{moment}.layers.0.feed_forward."
        assert (start.optimizer[name + "experts.w_in"] == dense.optimizer[name + "w_in"]).all()
        assert not start.optimizer[name + "router.weight"].any()
    train(config, resume=True)
    train(sparse(folder, "dense", {}, steps=3), resume=True)
    losses = [losses_of(folder / "runs" / name)[3] for name in ("resumed", "dense")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)  # the same batch: the first loss is that of the dense run


def test_noise_makes_the_copies_different_and_fresh_moments_begin_at_step_0(folder, tmp_path):
    config, dense = sparse(folder, "up", TOP_2), checkpoint.read(folder / "runs" / "dense", with_optimizer=False)
    upcycle(dense, config, tmp_path / "up", noise=0.1, moments="fresh")
    found = checkpoint.read(tmp_path / "up")
    experts, matrix = (
        one.weights[f"layers.0.feed_forward.{name}w_in"] for one, name in ((found, "experts."), (dense, ""))
    )
    assert (experts[0] != experts[1]).any()
    assert (experts - matrix).std() == pytest.approx(0.1 * matrix.std(), rel=0.1)
    assert found.step == 0 and not any(value.any() for name, value in found.optimizer.items() if "moment" in name)


@pytest.mark.parametrize(
    "moe, message",
    [
        ({}, r"moe\.expert_num: 1; --to names a model with experts"),
        (TOP_2 | {"moe_intermediate_size": 48}, r"moe\.moe_intermediate_size: 48; must divide .*\(64\)"),
        (TOP_2 | {"moe_intermediate_size": 8}, r"moe\.expert_num: 4; must be a multiple of the 8 slices"),
    ],
)
def test_models_that_do_not_fit_are_refused_by_key(moe, message):
    with pytest.raises(UserError, match=message):
        check_upcyclable(run_config(moe=moe), run_config(), "runs/dense")


def test_the_source_must_be_dense_and_of_the_same_sizes():
    with pytest.raises(UserError, match=r"^--from: 'x' is not a dense decoder"):
        check_upcyclable(run_config(moe=TOP_2), run_config(moe=TOP_2), "x")
    with pytest.raises(UserError, match=r"^--from: model\.hidden_size: 32; the weights of 'x' have 16"):
        check_upcyclable(run_config(model={"hidden_size": 32}, moe=TOP_2), run_config(), "x")


def test_a_folder_that_is_there_is_left_alone(folder, tmp_path):
    with pytest.raises(UserError, match=r"^--out: '.*' already exists"):
        upcycle(checkpoint.read(folder / "runs" / "dense"), sparse(folder, "up", TOP_2), tmp_path)
