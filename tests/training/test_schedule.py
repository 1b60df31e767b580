"""The learning rate of chosen steps, typed by hand."""

import pytest

from switchyard.config import build
from switchyard.training.schedule import learning_rate

# peak 1.0, end 0.1, 10 steps of warm-up, curve over 100: (curve, step, value)
VALUES = [
    ("cosine", 1, 0.1),
    ("cosine", 5, 0.5),
    ("cosine", 10, 1.0),
    ("cosine", 55, 0.55),  # half way: the mean of peak and end
    ("cosine", 100, 0.1),
    ("cosine", 101, 0.1),
    ("cosine", 5000, 0.1),
    ("linear", 9, 0.9),
    ("linear", 10, 1.0),
    ("linear", 19, 0.91),  # a tenth of the way down
    ("linear", 55, 0.55),
    ("linear", 100, 0.1),
    ("constant", 3, 0.3),
    ("constant", 10, 1.0),
    ("constant", 5000, 1.0),
]


def _config(kind: str, **schedule):
    base = {"type": kind, "learning_rate": 1.0, "lr_end": 0.1, "warmup_steps": 10}
    return build({"schedule": base | schedule, "train": {"steps": 100}})


@pytest.mark.parametrize("kind, step, value", VALUES)
def test_values(kind, step, value):
    assert learning_rate(_config(kind), step) == pytest.approx(value, abs=1e-12)


def test_total_steps_rules_over_train_steps():
    config = _config("linear", total_steps=20)
    assert learning_rate(config, 15) == pytest.approx(0.55)
    assert learning_rate(config, 20) == pytest.approx(0.1)


def test_without_warm_up_the_curve_starts_at_once():
    assert learning_rate(_config("linear", warmup_steps=0), 50) == pytest.approx(0.55)


def test_a_warm_up_longer_than_the_run_only_rises():
    rates = [learning_rate(_config("cosine", warmup_steps=400), step) for step in (1, 50, 100)]
    assert rates == pytest.approx([1 / 400, 50 / 400, 100 / 400])
