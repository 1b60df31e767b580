"""Folding to rows and back loses nothing, and each unit has the values that it should."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mindspore import Tensor

from switchyard.config import build
from switchyard.errors import UserError
from switchyard.moe import granularity

pytestmark = pytest.mark.usefixtures("pynative")
SMALL = st.integers(1, 3)


def numbered(*shape: int) -> np.ndarray:
    """Every value another, so that a misplaced one shows."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@given(batch=SMALL, parts=SMALL, high=SMALL, wide=SMALL, channels=SMALL)
def test_regions_and_back(batch, parts, high, wide, channels):
    maps = numbered(batch, parts * high, parts * wide, channels)
    rows = granularity.to_regions(Tensor(maps), parts)
    assert rows.shape == (batch * parts**2, high, wide, channels)
    assert np.array_equal(granularity.from_regions(rows, parts).asnumpy(), maps)


@given(batch=SMALL, parts=SMALL, side=SMALL, channels=SMALL)
def test_channel_groups_and_back(batch, parts, side, channels):
    maps = numbered(batch, side, side, parts * channels)
    rows = granularity.to_channel_groups(Tensor(maps), parts)
    assert rows.shape == (batch * parts, side, side, channels)
    assert np.array_equal(granularity.from_channel_groups(rows, parts).asnumpy(), maps)


@given(windows=SMALL, length=SMALL, width=SMALL)
def test_slices_and_back(windows, length, width):
    rows = numbered(windows * length, width)
    folded = granularity.to_slices(Tensor(rows), length)
    assert folded.shape == (windows, length * width)
    assert np.array_equal(granularity.from_slices(folded, length).asnumpy(), rows)


@pytest.mark.parametrize("kind", ["sample", "task", "region", "channel"])
def test_image_fold_and_back(kind):
    config = vision(granularity=kind, layers=[1], router="task" if kind == "task" else "switch", task_num=2)
    fold, maps = granularity.ImageFold(config), numbered(3, 8, 8, 8)
    rows = fold(Tensor(maps))
    assert rows.shape == (3 * config.units, *fold.row_shape(8, 8, 8))
    assert np.array_equal(fold.back(rows).asnumpy(), maps)
    repeated = fold.repeat_per_row(Tensor(np.array([5, 6, 7], np.int32))).asnumpy()
    assert np.array_equal(repeated, np.repeat([5, 6, 7], config.units))


def vision(**moe):
    """A network of images with two tasks."""
    model = {"type": "vision", "hidden_size": 8, "num_layers": 2}
    return build({"model": model, "moe": {"expert_num": 4} | moe, "vision": {"tasks": ["identity", "parity"]}})


def test_quadrants_in_reading_order():
    maps = np.array([[1, 2], [3, 4]], np.float32).repeat(2, 0).repeat(2, 1)[None, :, :, None]  # [1, 4, 4, 1]
    rows = granularity.to_regions(Tensor(maps), 2).asnumpy()
    assert [set(row.reshape(-1)) for row in rows] == [{1}, {2}, {3}, {4}]


def test_channel_groups_are_neighbours():
    rows = granularity.to_channel_groups(Tensor(np.array([1, 2, 3, 4], np.float32).reshape(1, 1, 1, 4)), 2).asnumpy()
    assert rows.reshape(2, 2).tolist() == [[1, 2], [3, 4]]


def test_a_window_goes_where_its_first_token_goes():
    assert granularity.first_of_slices(Tensor(np.arange(6)), 3).asnumpy().tolist() == [0, 3]


@pytest.mark.parametrize(
    ("sections", "answer"),
    [
        ({"moe": {"granularity": "region"}}, "moe.granularity: region; regions are parts of images"),
        ({"moe": {"granularity": "sample"}}, "moe.granularity: sample; a decoder must not route by the full sample"),
        ({"moe": {"granularity": "slice", "slice_length": 7}}, "moe.slice_length: 7; must divide seq_length (64)"),
        ({"model": {"type": "vision"}, "moe": {"granularity": "token"}}, "moe.granularity: token; images have no"),
        ({"model": {"type": "vision"}, "moe": {"granularity": "task"}}, "moe.router: switch; moe.granularity 'task'"),
        (
            {"model": {"type": "vision"}, "moe": {"granularity": "region"}, "vision": {"regions": 3}},
            "vision.regions: 3",
        ),
        (
            {"model": {"type": "cascade"}, "moe": {"expert_num": 2}},
            "moe.expert_num: 2; must be 1: the experts of a cascade",
        ),
    ],
)
def test_what_is_impossible_is_refused(sections, answer):
    with pytest.raises(UserError) as refused:
        build(sections)
    assert str(refused.value).startswith(answer)
    assert "\n" not in str(refused.value)
