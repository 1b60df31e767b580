"""Steps whose gradient norm is not finite: never applied, the end of a run that cannot lower its loss scale."""

import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn
from oracles.tiny_run import losses_of, run_config, token_batch, write_text

from switchyard.checkpoint import store as checkpoint
from switchyard.distributed.mesh import LOCAL
from switchyard.errors import UserError
from switchyard.models import create_model
from switchyard.training.finite import check_evaluation, check_step
from switchyard.training.loop import train
from switchyard.training.optimizer import OptimizerStep
from switchyard.training.randomness import draw_noise
from switchyard.training.step import TrainStep

SIGMOID = {"expert_num": 4, "router": "sigmoid", "num_experts_chosen": 2, "topk_bias_update_rate": 0.01}
BIAS = "layers.0.feed_forward.router.bias"
STEEP = {"learning_rate": 1000.0, "lr_end": 0.0, "warmup_steps": 0, "type": "constant"}


def _state(step: TrainStep) -> dict[str, np.ndarray]:
    """Weights, what routers keep besides, moments and corrections."""
    found = {parameter.name: parameter for parameter in step.model.get_parameters()} | step.optimizer_state()
    return {name: tensor.asnumpy().copy() for name, tensor in found.items() if name not in ("loss_scale", "good_steps")}


def _changed(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    return {name for name, value in before.items() if not np.array_equal(value, after[name], equal_nan=True)}


def _names(step: TrainStep) -> set[str]:
    return {parameter.name for parameter in step.model.get_parameters()}


def _step(config) -> tuple[TrainStep, tuple]:
    """(step, its batch)."""
    step, micro_batches = TrainStep(create_model(config, 17), config), config.train.gradient_accumulation_steps
    noise = draw_noise(1, 0, micro_batches, step.model.noise_slices, range(1), config.rows, config.model.hidden_size)
    return step, (*token_batch(micro_batches, 4, 16), noise)


@pytest.mark.parametrize("mode, micro_batches", [("graph", 2), ("pynative", 1)])
def test_float32_refuses_a_gradient_that_is_not_finite(mode, micro_batches, request):
    """With a last norm of 1e25 the loss is finite and the gradient's norm is not; without it the step is applied."""
    request.getfixturevalue(mode)
    step, batch = _step(run_config(moe=SIGMOID, train={"gradient_accumulation_steps": micro_batches}))
    step(*batch, 0.01)  # moments and bias are not 0 any more
    gain = next(parameter for parameter in step.model.get_parameters() if parameter.name == "norm.gain")
    kept = gain.asnumpy().copy()
    gain.set_data(Tensor(np.full_like(kept, 1e25)))
    before = _state(step)
    figures = step(*batch, 0.01)
    assert np.isfinite(figures["loss"])
    assert not np.isfinite(figures["gradient_norm"]) and figures["skipped"] == 1
    assert not _changed(before, _state(step))
    gain.set_data(Tensor(kept))
    before = _state(step)
    figures = step(*batch, 0.01)
    assert figures["skipped"] == 0
    assert {BIAS, "embedding.table", "correction1"} <= _changed(before, _state(step))
    if mode == "graph":
        assert len(step.graph.compile_cache) == 1  # one program for every micro-batch


def test_a_refused_micro_batch_in_the_middle_refuses_the_step_and_leaves_nothing_behind(pynative):
    """The second of three reads a weight that is NaN; the step after it is that of a run without the refused one."""
    model, accumulation = {"tie_word_embeddings": False}, {"gradient_accumulation_steps": 3}
    step, batch = _step(run_config(moe=SIGMOID, model=model, train=accumulation))
    tokens, *rest = batch
    tokens = tokens % 16
    bad = tokens.copy()
    bad[1, 2, 5] = 16  # the one token that reads this row of the table
    table = next(parameter for parameter in step.model.get_parameters() if parameter.name == "embedding.table")
    whole, start = table.asnumpy().copy(), _state(step)
    harmed = whole.copy()
    harmed[16] = np.nan
    table.set_data(Tensor(harmed))
    figures = step(bad, *rest, 0.01)
    assert figures["skipped"] == 1 and not np.isfinite(figures["gradient_norm"])
    table.set_data(Tensor(whole))
    assert not _changed(start, _state(step))
    figures = step(tokens, *rest, 0.01)
    assert figures["skipped"] == 0
    after, weights = _state(step), {name: value for name, value in start.items() if name in _names(step)}
    state = {name: value for name, value in start.items() if name not in weights}
    step.load(weights, state | {"loss_scale": np.float32(1), "good_steps": np.int32(0)})
    again = step(tokens, *rest, 0.01)
    assert not _changed(after, _state(step)) and again["gradient_norm"] == figures["gradient_norm"]


def test_float16_moves_the_bias_only_by_steps_that_it_applies(pynative):
    config = run_config(moe=SIGMOID, model={"compute_dtype": "float16"}, train={"init_loss_scale": 2.0**60})
    step, batch = _step(config)
    before = _state(step)
    figures = step(*batch, 0.01)
    assert figures["skipped"] == 1 and np.isfinite(figures["loss"])
    assert not _changed(before, _state(step))
    step.scale.value = 8.0
    assert step(*batch, 0.01)["skipped"] == 0
    assert {BIAS, "embedding.table"} <= _changed(before, _state(step))


class _Model(nn.Cell):
    def __init__(self):
        super().__init__()
        self.w = Parameter(Tensor(np.ones((3, 2), np.float32)), name="w")


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_device_refuses_it_by_the_norm_of_all(dtype, clip, pynative):
    config = run_config(model={"compute_dtype": dtype}, optimizer={"clip_grad": clip})
    end = OptimizerStep(_Model().trainable_params(), config, LOCAL)
    end.set(learning_rate=0.1)
    everything = [*end.adamw.parameters, *end.state().values()]
    gradient = Tensor(np.full((3, 2), 0.5, np.float32))
    end.update((gradient,), Tensor(np.float32(1.2)))
    before = [parameter.asnumpy().copy() for parameter in everything]
    for norm in (np.nan, np.inf):  # of a rank whose own shard may be finite
        for own in (gradient, Tensor(np.full((3, 2), np.nan, np.float32))):
            assert not np.isfinite(end.update((own,), Tensor(np.float32(norm))).asnumpy())
            for parameter, value in zip(everything, before):
                np.testing.assert_array_equal(parameter.asnumpy(), value)
    end.update((gradient,), Tensor(np.float32(1.2)))
    assert (everything[0].asnumpy() != before[0]).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_run_ends_at_once_and_names_a_good_checkpoint(dtype, tmp_path, pynative):
    """Also where the loss scale is 1 and cannot fall; one checkpoint is kept, and it can be read."""
    write_text(tmp_path)
    config = run_config(
        tmp_path,
        model={"compute_dtype": dtype},
        moe={"expert_num": 4, "router": "top_k", "num_experts_chosen": 2},
        schedule=STEEP | {"learning_rate": 1e4},
        train={"steps": 40, "checkpoint_every": 1, "keep_checkpoints": 1, "init_loss_scale": 1.0},
        context={"mode": "pynative"},
    )
    run = tmp_path / "runs" / "tiny"
    words = r"train: the (loss|gradient norm) is (nan|inf) at step \d+.*step-\d+' is unchanged and good; reduce"
    with pytest.raises(UserError, match=words) as first:
        train(config)
    held = checkpoint.read(run)
    assert f"at step {held.step + 1}" in str(first.value) and f"'{held.path}'" in str(first.value)
    assert [path.name for path in checkpoint.listed(run)] == [held.path.name]
    assert all(np.isfinite(array).all() for kind in (held.weights, held.optimizer) for array in kind.values())
    assert not (run / "result.json").exists() and list(losses_of(run)) == list(range(1, held.step + 1))
    with pytest.raises(UserError) as again:  # it recovers the checkpoint, and the same batch has the same gradient
        train(config, resume=True)
    assert str(again.value) == str(first.value)


def _figures(norm: float, scale: float = 1.0) -> dict:
    return {"gradient_norm": norm, "loss_scale": scale}


@pytest.mark.parametrize(
    "loss, norm, scale, says",
    [
        (1.0, 2.0, 1.0, None),
        (1.0, np.nan, 1.0, "the gradient norm is nan at step 6, which was not applied; KEPT; reduce"),
        (1.0, np.inf, 1.0, "the gradient norm is inf at step 6, which was not applied; KEPT; reduce"),
        (1.0, np.inf, 2.0, None),  # the loss scale has refused it
        (np.nan, np.nan, 2.0, None),
        (np.nan, np.nan, 1.0, "the loss is nan at step 6, which was not applied; KEPT; reduce"),
        (np.nan, 2.0, 64.0, "the loss is nan at step 6; KEPT; reduce"),
    ],
)
def test_what_ends_a_run(loss, norm, scale, says):
    if says is None:
        return check_step(6, loss, _figures(norm, scale), str)
    with pytest.raises(UserError, match=says):
        check_step(6, loss, _figures(norm, scale), lambda: "KEPT")


def test_an_evaluation_is_refused_wherever_it_is_not_finite():
    good = {"loss": 1.0, "loss_ci95": [0.5, 1.5], "tokens": 7, "layers": [{"layer": 0, "load": [3, 4], "z": 0.25}]}
    check_evaluation(good, "step 3", "train again")
    bad = good | {"layers": [{"layer": 0, "load": [3, 4], "z": float("inf")}]}
    with pytest.raises(UserError, match=r"^evaluation: layers\[0\]\.z is inf for step 3; train again$"):
        check_evaluation(bad, "step 3", "train again")
    with pytest.raises(UserError, match=r"loss_ci95\[1\] is nan"):
        check_evaluation(good | {"loss_ci95": [0.5, float("nan")]}, "step 3", "train again")
