"""The loss scale of float16, on the host."""

from switchyard.config import build
from switchyard.training.loss_scale import GROWTH_INTERVAL, MAX_LOSS_SCALE, LossScale


def scale_of(value: float, dtype: str = "float16") -> LossScale:
    return LossScale(build({"model": {"compute_dtype": dtype}, "train": {"init_loss_scale": value}}))


def test_a_refused_step_halves_it_down_to_one():
    scale, found = scale_of(4.0), []
    for _ in range(4):
        scale.adjust(False)
        found.append(scale.factor)
    assert found == [2.0, 1.0, 1.0, 1.0]


def test_good_steps_in_a_row_double_it_up_to_the_limit():
    scale = scale_of(1.0)
    for _ in range(GROWTH_INTERVAL - 1):
        scale.adjust(True)
    assert (scale.factor, scale.good_steps) == (1.0, GROWTH_INTERVAL - 1)
    scale.adjust(True)
    assert (scale.factor, scale.good_steps) == (2.0, 0)
    scale.value, scale.good_steps = MAX_LOSS_SCALE, GROWTH_INTERVAL - 1
    scale.adjust(True)
    assert scale.factor == MAX_LOSS_SCALE


def test_a_refused_step_begins_the_count_again():
    scale = scale_of(8.0)
    scale.adjust(True)
    scale.adjust(False)
    assert (scale.factor, scale.good_steps) == (4.0, 0)


def test_its_state_comes_back():
    scale, other = scale_of(8.0), scale_of(65536.0)
    scale.adjust(True)
    other.load(scale.state())
    assert (other.factor, other.good_steps) == (8.0, 1)
    assert {name: (array.shape, array.dtype.name) for name, array in scale.state().items()} == {
        "loss_scale": ((), "float32"),
        "good_steps": ((), "int32"),
    }


def test_other_precisions_have_none():
    scale = scale_of(64.0, "float32")
    scale.adjust(False)
    assert (scale.factor, scale.value) == (1.0, 64.0)  # what a checkpoint says stays
