"""The decoder with every router that it can take: it learns, and no token changes what stands before it."""

import numpy as np
import pytest
from mindspore import Tensor
from oracles.marks import long_but
from oracles.tiny_decoder import VOCABULARY, decoder_config, random_tokens, run_decoder
from oracles.tiny_run import run_config, token_batch

from switchyard.errors import UserError
from switchyard.models import create_model
from switchyard.moe.routing import known_routers
from switchyard.training.randomness import draw_noise
from switchyard.training.scores import EvalStep
from switchyard.training.step import TrainStep

MOE = {
    "random": {"random_draw": "step"},
    "mixture_of_depths": {"expert_num": 1, "capacity_factor": 0.5},
    "two_level": {"n_group": 2},
    "gshard": {"num_experts_chosen": 2},
}
CAUSAL = [name for name, router in known_routers().items() if router.causal and "task_ids" not in router.needs]
REFUSED = sorted(set(known_routers()) - set(CAUSAL))


def _moe(name):
    return {"router": name, "expert_num": 4} | MOE.get(name, {})


def learn_by_heart(name: str) -> tuple[list[float], float]:
    """(losses of 30 training steps on one batch, loss of the same batch at evaluation)."""
    config = run_config(moe=_moe(name))
    model = create_model(config, VOCABULARY)
    step, evaluate = TrainStep(model, config), EvalStep(model)
    tokens, labels, valid = token_batch(1, 4, 16, VOCABULARY)
    losses = []
    for number in range(30):
        noise = draw_noise(1, number, 1, model.noise_slices, range(1), 64, 16)
        losses.append(step(tokens, labels, valid, noise, 0.02)["loss"])
    evaluate.set_train(False)
    total, count, _ = evaluate(*(Tensor(part[0]) for part in (tokens, labels, valid)))[0].asnumpy().sum(0)
    return losses, total / count


@pytest.mark.parametrize("name", long_but(CAUSAL, set(CAUSAL) - {"base"}))  # its auction takes as long as all others
def test_the_loss_falls(name, pynative):
    """One batch learnt by heart in training mode, and known at evaluation too, whatever decides there."""
    losses, evaluated = learn_by_heart(name)
    assert np.mean(losses[-5:]) < 0.7 * losses[0], losses
    assert evaluated < 0.8 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", long_but(CAUSAL, ["sigmoid", "mixture_of_depths"]))  # a state, and no experts chosen
def test_the_loss_falls_compiled(name, graph):
    losses, evaluated = learn_by_heart(name)
    assert np.mean(losses[-5:]) < 0.7 * losses[0], losses
    assert evaluated < 0.8 * losses[0]


@pytest.mark.parametrize("name", CAUSAL)
def test_a_token_changes_nothing_before_it(name, pynative):
    decoder = create_model(decoder_config(moe=_moe(name)), VOCABULARY).set_train(False)
    tokens = random_tokens()
    logits = run_decoder(decoder, tokens)[0]
    for place in (1, 4, 7):
        changed = tokens.copy()
        changed[:, place] = (changed[:, place] + 1) % VOCABULARY
        np.testing.assert_allclose(run_decoder(decoder, changed)[0][:, :place], logits[:, :place], atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_the_others_are_refused_in_one_line(name):
    with pytest.raises(UserError) as caught:
        create_model(decoder_config(moe=_moe(name)), VOCABULARY)
    reason = "task id" if known_routers()[name].causal else "looks at the whole sequence, later tokens too"
    assert str(caught.value).startswith(f"moe.router: '{name}'; ") and reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dense_model_asks_no_router():
    create_model(decoder_config(moe={"router": "soft", "expert_num": 1}), VOCABULARY)
