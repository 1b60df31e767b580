"""The compiled step: accumulation, clip, loss scale, state, replay, and the same in both modes."""

import numpy as np
import pytest
from mindspore import Tensor
from oracles.tiny_run import run_config, token_batch

from switchyard.distributed.mesh import LOCAL
from switchyard.errors import UserError
from switchyard.models import create_model
from switchyard.moe.metrics import metrics
from switchyard.training.loss import TrainLoss
from switchyard.training.randomness import draw_noise
from switchyard.training.scores import EvalStep
from switchyard.training.step import TrainStep

VOCABULARY = 17
MOE = {"moe": {"expert_num": 4, "aux_loss_factor": 0.5, "z_loss_factor": 0.25}}


def _step(config) -> TrainStep:
    return TrainStep(create_model(config, VOCABULARY), config)


def _noise(config, step: TrainStep, number: int = 0):
    count, batch = config.micro_batches, config.data.batch_size * config.model.seq_length
    return draw_noise(1, number, count, step.model.noise_slices, range(1), batch, config.model.hidden_size)


def _train(config, steps: int = 4, batches=None, rate: float = 0.01):
    """(losses, last figures, step) of some steps on one batch."""
    step, losses = _step(config), []
    count = config.train.gradient_accumulation_steps
    inputs = batches or token_batch(count, config.data.batch_size, config.model.seq_length)
    for number in range(steps):
        figures = step(*inputs, _noise(config, step, number), rate)
        losses.append(figures["loss"])
    return losses, figures, step


def _weights(step: TrainStep) -> dict[str, np.ndarray]:
    return {parameter.name: parameter.asnumpy().copy() for parameter in step.model.trainable_params()}


def _held(step: TrainStep) -> tuple[dict, dict]:
    """(weights, optimizer's state) as a checkpoint holds them."""
    weights = {parameter.name: parameter.asnumpy() for parameter in step.model.get_parameters()}
    return weights, {name: tensor.asnumpy() for name, tensor in step.optimizer_state().items()}


def _load(step: TrainStep, **changes) -> None:
    """Goes on from the same state, but for some entries of the optimizer."""
    weights, state = _held(step)
    step.load(weights, state | changes)


def test_a_batch_is_learnt_and_figures_follow(graph):
    """Figures are those of the step at hand, not of the first one; the load counts every choice."""
    losses, figures, _ = _train(run_config(**MOE), steps=30)
    assert losses[-1] < 0.8 * losses[0] and len(set(losses)) == len(losses)
    assert figures["routers"]["load"].shape == (1, 4) and figures["routers"]["load"].sum() == 64
    assert figures["gradient_norm"] > 0 and figures["skipped"] == 0 and figures["loss_scale"] == 1


def test_graph_equals_pynative(graph):
    import mindspore as ms

    config = run_config(model={"dropout": 0.1}, moe={"expert_num": 4, "jitter": 0.1})
    compiled, figures, _ = _train(config)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    plain, plain_figures, _ = _train(config)
    np.testing.assert_allclose(compiled, plain, atol=1e-5)
    assert figures["gradient_norm"] == pytest.approx(plain_figures["gradient_norm"], abs=1e-5)


def _uneven(micro_batches: int):
    """(tokens, labels, valid) of micro-batches with 4, 34 and 64 real tokens, and the same as one batch."""
    batches = token_batch(micro_batches, 4, 16)
    for micro, rows in enumerate([(4, 0, 0, 0), (16, 16, 1, 1)]):
        for row, real in enumerate(rows):
            batches[2][micro, row, real:] = 0
    return batches, tuple(part.reshape(1, -1, 16) for part in batches)


CONDITIONAL = {"expert_num": 4, "aux_loss_factor": 0.5, "z_loss_factor": 0.25, "losses": {"importance": 0.1}}


@pytest.mark.parametrize("mode", ["graph", "pynative"])
def test_three_micro_batches_equal_one_of_three_times_the_size(mode, request):
    """Each is routed for itself, as a group of the joined batch: all figures are the same, weights and gradients too.

    The micro-batches hold different numbers of real tokens, by which every loss counts.
    """
    request.getfixturevalue(mode)
    parts, joined = _uneven(3)
    several = run_config(train={"gradient_accumulation_steps": 3}, moe=CONDITIONAL)
    together = run_config(data={"batch_size": 12}, moe=CONDITIONAL | {"groups": 3})
    split, split_figures, step = _train(several, 2, parts)
    whole, whole_figures, whole_step = _train(together, 2, joined)
    np.testing.assert_allclose(split, whole, atol=1e-6)
    for name in ("gradient_norm", "balance_loss", "z_loss"):
        assert split_figures[name] == pytest.approx(whole_figures[name], rel=1e-5), name
    for name in ("load", "importance", "entropy", "z"):
        np.testing.assert_allclose(
            split_figures["routers"][name], whole_figures["routers"][name], rtol=1e-4, err_msg=name
        )
    assert split_figures["routers"]["load"].sum() == 4 + 34 + 64
    for name, value in _weights(whole_step).items():
        np.testing.assert_allclose(_weights(step)[name], value, atol=2e-5, err_msg=name)


def test_accumulated_gradients_are_those_of_the_joined_batch(pynative):
    parts, joined = _uneven(3)
    step = _step(run_config(train={"gradient_accumulation_steps": 3}, moe=CONDITIONAL))
    loss = TrainLoss(step.model, run_config(data={"batch_size": 12}, moe=CONDITIONAL | {"groups": 3})).set_train(True)
    inputs = [Tensor(part[0]) for part in joined]
    call = LOCAL.differentiate(loss, step.graph.optimizer.adamw.parameters)
    step.model.groups = 3
    _, wanted = call(*inputs, Tensor(np.zeros((1, 1, 1), np.float32)), Tensor(np.ones((1, 1), np.float32)))
    step.model.groups = 1
    step(*parts, _noise(step.config, step), 0.01)
    for gradient, total in zip(wanted, step.graph.optimizer.accumulated):
        np.testing.assert_allclose(total.asnumpy(), gradient.asnumpy(), atol=1e-6, rtol=1e-4, err_msg=total.name)


def test_clip_bounds_the_update_but_not_the_figure(pynative):
    """With a learning rate of one and eps that swamps the moments, the update is the clipped gradient times 1 / eps."""
    optimizer = {"weight_decay": 0.0, "eps": 1e3}
    config = run_config(optimizer=optimizer | {"clip_grad": 0.01})
    step = _step(config)
    before = _weights(step)
    figures = step(*token_batch(1, 4, 16), _noise(config, step), 1.0)
    moved = np.sqrt(sum(((_weights(step)[name] - before[name]).astype(np.float64) ** 2).sum() for name in before))
    assert figures["gradient_norm"] > 0.1
    assert moved == pytest.approx(0.01 / 1e3, rel=0.02)


def test_overflow_skips_the_update_and_halves_the_scale(graph):
    """A scale far too large: weights and moments stay, the scale comes down until a step is good."""
    config = run_config(model={"compute_dtype": "float16"}, train={"init_loss_scale": 2.0**60})
    step = _step(config)
    inputs, before = token_batch(1, 4, 16), _weights(step)
    for expected in (2.0**60, 2.0**59, 2.0**58):
        figures = step(*inputs, _noise(config, step), 0.01)
        assert figures["skipped"] == 1 and figures["loss_scale"] == expected
        assert np.isfinite(figures["loss"])
    for name, value in before.items():
        np.testing.assert_array_equal(_weights(step)[name], value)
    state = step.optimizer_state()
    assert all(not value.asnumpy().any() for name, value in state.items() if name.startswith("moment"))
    _load(step, loss_scale=np.float32(8))
    figures = step(*inputs, _noise(config, step), 0.01)
    assert figures["skipped"] == 0 and step.optimizer_state()["good_steps"].asnumpy() == 1
    assert any((_weights(step)[name] != value).any() for name, value in before.items())


def test_good_steps_double_the_scale(pynative):
    config = run_config(model={"compute_dtype": "float16"}, train={"init_loss_scale": 64.0})
    step = _step(config)
    _load(step, good_steps=np.int32(1999))
    step(*token_batch(1, 4, 16), _noise(config, step), 0.01)
    state = step.optimizer_state()
    assert state["loss_scale"].asnumpy() == 128 and state["good_steps"].asnumpy() == 0


def test_state_is_strict(pynative):
    step = _step(run_config())
    weights, held = _held(step)
    own = {name.removeprefix("moment1.") for name in held if name.startswith("moment1.")}
    assert own == set(_weights(step)) and {"loss_scale", "good_steps"} <= set(held)
    missing = {name: value for name, value in held.items() if name != "loss_scale"}
    with pytest.raises(UserError, match=r"'loss_scale': missing in the checkpoint"):
        step.load(weights, missing)
    with pytest.raises(UserError, match=r"'moment1.x': unknown"):
        step.load(weights, held | {"moment1.x": np.zeros(1, np.float32)})
    with pytest.raises(UserError, match=r"'loss_scale': shape \(2,\) in the checkpoint, \(\) by this"):
        step.load(weights, held | {"loss_scale": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match=r"'norm.gain': missing in the checkpoint"):
        step.load({name: value for name, value in weights.items() if name != "norm.gain"}, held)


def test_evaluation_between_steps_neither_disturbs_nor_recompiles(graph):
    """The same model, two graphs: dropout and capacity are off in one of them only."""
    config = run_config(model={"dropout": 0.5}, moe={"expert_num": 4})
    step = _step(config)
    evaluation = EvalStep(step.model)
    tokens, labels, valid = token_batch(1, 4, 16)
    batch = [Tensor(part[0]) for part in (tokens, labels, valid)]
    totals, losses = [], []
    for _ in range(2):
        evaluation.set_train(False)
        scores, stats, _ = evaluation(*batch)
        totals.append(scores.asnumpy()[:, 0])
        assert scores.asnumpy()[:, 1].tolist() == [16.0] * 4
        assert metrics(stats.asnumpy(), 4)["dropped"].tolist() == [0.0]
        losses.append(step(tokens, labels, valid, _noise(config, step), 0.0)["loss"])
    np.testing.assert_array_equal(*totals)  # a learning rate of 0: the weights have not moved
    assert losses[0] == losses[1] != pytest.approx(totals[0].sum() / 64, abs=1e-4)
    assert len(step.graph.compile_cache) == len(evaluation.compile_cache) == 1
