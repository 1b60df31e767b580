"""The rule by which a cluster and one device agree: near-zero gradients are explained, wrong ones are found."""

from collections import Counter

import numpy as np
import pytest

from switchyard.config import OptimizerConfig
from switchyard.nn.adamw import plain_adamw
from switchyard.simulation.verdict import Comparison, Judge

OPTIMIZER = OptimizerConfig(weight_decay=0.1)
RIGHT = {"a": [[1.0, -0.5], [0.25, 1e-6]], "b": [1e-9, -2e-9]}  # gradients: the last of a, and all of b, are rounding


def state(gradients: dict | None, rate: float) -> dict[str, np.ndarray]:
    """Parameters and moments before the first step (None), or after one by these gradients."""
    found = {"correction1": np.float32(0), "correction2": np.float32(0)}
    for name, values in (gradients or RIGHT).items():
        start, zero = np.full(np.shape(values), 0.5, np.float32), np.zeros(np.shape(values), np.float32)
        parts = (start, zero, zero)
        if gradients is not None:
            decay = 0.1 if start.ndim == 2 else 0.0
            optimizer = (rate, OPTIMIZER.beta1, OPTIMIZER.beta2, OPTIMIZER.eps, decay)
            parts = plain_adamw(*parts, np.array(values), 1, *optimizer)
        found |= dict(zip((name, f"moment1.{name}", f"moment2.{name}"), (part.astype(np.float32) for part in parts)))
    if gradients is not None:
        found |= {"correction1": np.float32(1 - OPTIMIZER.beta1), "correction2": np.float32(1 - OPTIMIZER.beta2)}
    return found


def judged(changes: dict, rate: float = 1e-3, spoil=lambda own: None, ranks: int = 2) -> Comparison:
    """One step on some ranks, of which the last has other gradients."""
    judge = Judge(OPTIMIZER, lambda name, whole, shape, rank: whole)
    own = [state(RIGHT, rate) for _ in range(ranks - 1)] + [state(RIGHT | changes, rate)]
    spoil(own[-1])
    before, after = state(None, rate), state(RIGHT, rate)
    judge.judge(own, before, after, rate)
    moved = {name: float(np.abs(after[name] - before[name]).max()) for name in after}
    return judge.found([(3.0, 3.0)], [(1.0, 1.0)], moved, Counter(), 0)


def test_the_same_is_equal():
    found = judged({})
    assert found.equal and not found.explained and found.largest < 1e-7


def test_a_gradient_near_zero_of_the_other_sign_is_explained():
    """The last entry of a moves by twice the learning rate the other way."""
    found = judged({"a": [[1.0, -0.5], [0.25, -1e-6]]})
    assert found.equal and found.explained == {"a": 1}
    assert found.differences["a"][0] == pytest.approx(2e-3, rel=0.05) and found.largest < 1e-7


def test_a_tensor_whose_gradients_are_all_rounding_is_explained():
    found = judged({"b": [-3e-9, 1e-9]})
    assert found.equal and found.explained == {"b": 2}


WRONG = {
    "a factor of 2": {"a": [[2.0, -1.0], [0.5, 2e-6]]},
    "half of a sum is missing": {"a": [[0.5, -0.25], [0.125, 5e-7]]},
    "another slice": {"a": [[0.25, 1e-6], [1.0, -0.5]]},
    "one entry of a thousandth": {"a": [[1.0, -0.5], [0.25, 1e-3]]},
    "another sign of one entry": {"a": [[1.0, 0.5], [0.25, 1e-6]]},
    "nothing": {"a": [[0.0, 0.0], [0.0, 0.0]]},
    "something in place of rounding": {"b": [1e-3, -2e-9]},
    "no number": {"a": [[np.nan, -0.5], [0.25, 1e-6]]},
}


@pytest.mark.parametrize("rate", [1e-3, 1e-9])
@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_gradient_is_found_whatever_the_learning_rate(fault, rate):
    found = judged(WRONG[fault], rate)
    (name,) = WRONG[fault]
    assert not found.equal and name not in found.explained
    assert any(line.startswith(f"gradient of {name}: ") for line in found.reasons)


def test_a_gradient_where_one_device_has_none_at_all_is_found():
    judge = Judge(OPTIMIZER, lambda name, whole, shape, rank: whole)
    judge.judge(
        [state({"a": [1e-9]}, 1e-3)], state(None, 1e-3) | state({"a": [0.0]}, 0.0), state({"a": [0.0]}, 1e-3), 1e-3
    )
    assert judge.gradients == {"a": np.inf}


def test_a_parameter_that_adamw_did_not_move_is_found():
    def spoil(own):
        own["a"] = np.full((2, 2), 0.5, np.float32)

    found = judged({}, spoil=spoil)
    assert not found.equal and "a" in found.wrong and "a: 1.0" in " ".join(found.reasons)


def test_another_state_than_parameters_is_compared_as_it_is():
    def spoil(own):
        own["correction1"] = np.float32(0.2)

    found = judged({}, spoil=spoil)
    assert found.reasons == ["correction1: 1.00e-01 apart, allowed 1e-05"]


@pytest.mark.parametrize(
    ("losses", "norms", "says"),
    [
        ([(500.0, 500.004)], [], None),  # relative to its size
        ([(500.0, 500.006)], [], "loss of step 1: 500.006"),
        ([(3.0, 3.0), (3.0, 3.0001)], [], "loss of step 2"),
        ([(3.0, float("nan"))], [], "loss of step 1: nan"),
        ([(3.0, 3.0)], [(2.0, 2.0001)], None),
        ([(3.0, 3.0)], [(2.0, 4.0)], "norm of the gradients of step 1: 4, one device 2"),  # a clip would hide it
    ],
)
def test_losses_and_norms_are_compared_relative_to_their_size(losses, norms, says):
    found = Comparison(losses, {}, Counter(), norms)
    assert found.equal == (says is None) and (says is None or found.reasons[0].startswith(says))
