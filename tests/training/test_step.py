"""The compiled step: its loss, accumulation, clip, loss scale, state, and the same in both modes."""

import numpy as np
import pytest
from mindspore import Tensor
from oracles.tiny_run import run_config, token_batch

from switchyard.errors import UserError
from switchyard.models import create_model
from switchyard.training.randomness import draw_noise
from switchyard.training.step import EvalStep, LossCell, TrainStep

VOCABULARY = 17
MOE = {"moe": {"expert_num": 4, "aux_loss_factor": 0.5, "z_loss_factor": 0.25}}


def _step(config) -> TrainStep:
    return TrainStep(create_model(config, VOCABULARY), config)


def _noise(config, step: TrainStep, number: int = 0):
    model, batch = step.graph.loss.model, config.data.batch_size * config.model.seq_length
    count = config.train.gradient_accumulation_steps
    return draw_noise(1, number, count, model.noise_slices, range(1), batch, config.model.hidden_size)


def _train(config, steps: int = 4, batches=None, rate: float = 0.01):
    """(losses, last figures as arrays, step) of some steps on one batch."""
    step, losses = _step(config), []
    count = config.train.gradient_accumulation_steps
    inputs = batches or token_batch(count, config.data.batch_size, config.model.seq_length)
    for number in range(steps):
        figures = step(*inputs, _noise(config, step, number), rate)
        losses.append(float(figures["loss"].asnumpy()))
    audit = {name: value.asnumpy() for name, value in figures.pop("audit").items()}
    return losses, {name: value.asnumpy() for name, value in figures.items()} | {"audit": audit}, step


def _weights(step: TrainStep) -> dict[str, np.ndarray]:
    return {parameter.name: parameter.asnumpy() for parameter in step.graph.optimizer.parameters}


def test_total_is_cross_entropy_plus_weighted_losses_of_layers(pynative):
    """Two conditional layers: the factors weigh sums over layers, the figures are means; padding costs nothing."""
    config = run_config(model={"num_layers": 2}, **MOE)
    model = create_model(config, VOCABULARY)
    cell = LossCell(model, config).set_train(True)
    tokens, labels, valid = (part[0] for part in token_batch(1, 4, 16))
    valid[1, 5:] = 0
    nothing = Tensor(np.zeros((1, 1, 1), np.float32))
    total, figures = cell(Tensor(tokens), Tensor(labels), Tensor(valid), nothing)
    logits, (balance, z, *_), _ = model(Tensor(tokens), Tensor(valid), nothing)
    logits = logits.asnumpy().astype(np.float64)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(64), labels.reshape(-1)]
    wanted = (losses * valid.reshape(-1)).sum() / valid.sum()
    assert figures[0].asnumpy() == pytest.approx(wanted, abs=1e-5)
    assert figures[1].asnumpy() == pytest.approx(balance.asnumpy().mean(), abs=1e-6)
    assert figures[2].asnumpy() == pytest.approx(z.asnumpy().mean(), abs=1e-6)
    wanted += 0.5 * balance.asnumpy().sum() + 0.25 * z.asnumpy().sum()
    assert total.asnumpy() == pytest.approx(wanted, abs=1e-5)


def test_a_batch_is_learnt_and_figures_follow(graph):
    """Figures are those of the step at hand, not of the first one; the audit counts every choice."""
    losses, figures, _ = _train(run_config(**MOE), steps=30)
    assert losses[-1] < 0.8 * losses[0] and len(set(losses)) == len(losses)
    assert figures["audit"]["load"].shape == (1, 4) and figures["audit"]["load"].sum() == 64
    assert figures["gradient_norm"] > 0 and figures["skipped"] == 0 and figures["loss_scale"] == 1


def test_graph_equals_pynative(graph):
    import mindspore as ms

    config = run_config(model={"dropout": 0.1}, moe={"expert_num": 4, "jitter": 0.1})
    compiled, figures, _ = _train(config)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    plain, plain_figures, _ = _train(config)
    np.testing.assert_allclose(compiled, plain, atol=1e-5)
    assert figures["gradient_norm"] == pytest.approx(plain_figures["gradient_norm"], abs=1e-5)


@pytest.mark.parametrize("mode", ["graph", "pynative"])
def test_two_micro_batches_equal_one_of_twice_the_size(mode, request):
    """Also where the micro-batches hold different numbers of real tokens."""
    request.getfixturevalue(mode)
    tokens, labels, valid = token_batch(2, 4, 16)
    valid[0, 1:, 3:] = 0
    joined = tuple(part.reshape(1, 8, 16) for part in (tokens, labels, valid))
    split, split_figures, step = _train(
        run_config(train={"gradient_accumulation_steps": 2}), batches=(tokens, labels, valid)
    )
    whole, whole_figures, whole_step = _train(run_config(data={"batch_size": 8}), batches=joined)
    np.testing.assert_allclose(split, whole, atol=1e-6)
    assert split_figures["gradient_norm"] == pytest.approx(whole_figures["gradient_norm"], rel=1e-5)
    for name, value in _weights(whole_step).items():
        np.testing.assert_allclose(_weights(step)[name], value, atol=2e-5)


def test_accumulation_of_a_conditional_model_sums_loads(graph):
    config = run_config(train={"gradient_accumulation_steps": 3}, moe={"expert_num": 4, "jitter": 0.1})
    losses, figures, _ = _train(config, steps=3)
    assert len(set(losses)) == 3
    assert figures["audit"]["load"].sum() == 3 * 64
    assert 0 <= figures["audit"]["dropped"][0] < 1 and 0 < figures["audit"]["entropy"][0] <= np.log(4) + 1e-6


def test_clip_bounds_the_update_but_not_the_figure(pynative):
    """With a learning rate of one and eps that swamps the moments, the update is the clipped gradient times 1 / eps."""
    optimizer = {"weight_decay": 0.0, "eps": 1e3}
    config = run_config(optimizer=optimizer | {"clip_grad": 0.01})
    step = _step(config)
    before = {name: value.copy() for name, value in _weights(step).items()}
    figures = step(*token_batch(1, 4, 16), _noise(config, step), 1.0)
    moved = np.sqrt(sum(((_weights(step)[name] - before[name]).astype(np.float64) ** 2).sum() for name in before))
    assert figures["gradient_norm"].asnumpy() > 0.1
    assert moved == pytest.approx(0.01 / 1e3, rel=0.02)


def test_overflow_skips_the_update_and_halves_the_scale(graph):
    """A scale far too large: weights and moments stay, the scale comes down until a step is good."""
    config = run_config(model={"compute_dtype": "float16"}, train={"init_loss_scale": 2.0**60})
    step = _step(config)
    inputs, before = token_batch(1, 4, 16), _weights(step)
    before = {name: value.copy() for name, value in before.items()}
    for expected in (2.0**60, 2.0**59, 2.0**58):
        figures = step(*inputs, _noise(config, step), 0.01)
        assert figures["skipped"].asnumpy() == 1 and figures["loss_scale"].asnumpy() == expected
        assert np.isfinite(figures["loss"].asnumpy())
    for name, value in before.items():
        np.testing.assert_array_equal(_weights(step)[name], value)
    state = step.optimizer_state()
    assert all(not value.asnumpy().any() for name, value in state.items() if name.startswith("moment"))
    step.load_optimizer_state({name: value.asnumpy() for name, value in state.items()} | {"loss_scale": np.float32(8)})
    figures = step(*inputs, _noise(config, step), 0.01)
    assert figures["skipped"].asnumpy() == 0 and step.optimizer_state()["good_steps"].asnumpy() == 1
    assert any((_weights(step)[name] != value).any() for name, value in before.items())


def test_good_steps_double_the_scale(pynative):
    config = run_config(model={"compute_dtype": "float16"}, train={"init_loss_scale": 64.0})
    step = _step(config)
    held = {name: value.asnumpy() for name, value in step.optimizer_state().items()}
    step.load_optimizer_state(held | {"good_steps": np.int32(1999)})
    step(*token_batch(1, 4, 16), _noise(config, step), 0.01)
    state = step.optimizer_state()
    assert state["loss_scale"].asnumpy() == 128 and state["good_steps"].asnumpy() == 0


def test_state_is_strict(pynative):
    step = _step(run_config())
    held = {name: value.asnumpy() for name, value in step.optimizer_state().items()}
    weights = {name.removeprefix("moment1.") for name in held if name.startswith("moment1.")}
    assert weights == set(_weights(step)) and {"loss_scale", "good_steps"} <= set(held)
    missing = {name: value for name, value in held.items() if name != "loss_scale"}
    with pytest.raises(UserError, match=r"'loss_scale': missing in the checkpoint"):
        step.load_optimizer_state(missing)
    with pytest.raises(UserError, match=r"'moment1.x': unknown"):
        step.load_optimizer_state(held | {"moment1.x": np.zeros(1, np.float32)})
    with pytest.raises(UserError, match=r"'loss_scale': shape \(2,\) in the checkpoint, \(\) by this"):
        step.load_optimizer_state(held | {"loss_scale": np.zeros(2, np.float32)})


def test_evaluation_between_steps_neither_disturbs_nor_recompiles(graph):
    """The same model, two graphs: dropout and capacity are off in one of them only."""
    config = run_config(model={"dropout": 0.5}, moe={"expert_num": 4})
    step = _step(config)
    evaluation = EvalStep(step.graph.loss.model)
    tokens, labels, valid = token_batch(1, 4, 16)
    batch = [Tensor(part[0]) for part in (tokens, labels, valid)]
    totals, losses = [], []
    for _ in range(2):
        evaluation.set_train(False)
        total, count, *audit = evaluation(*batch)
        totals.append(total.asnumpy())
        assert count.asnumpy().tolist() == [16.0] * 4 and audit[2].asnumpy().tolist() == [0.0]  # nothing dropped
        losses.append(float(step(tokens, labels, valid, _noise(config, step), 0.0)["loss"].asnumpy()))
    np.testing.assert_array_equal(*totals)  # a learning rate of 0: the weights have not moved
    assert losses[0] == losses[1] != pytest.approx(totals[0].sum() / 64, abs=1e-4)
    assert len(step.graph.compile_cache) == len(evaluation.compile_cache) == 1
