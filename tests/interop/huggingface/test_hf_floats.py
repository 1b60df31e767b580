"""Types of numbers: bfloat16 by its bits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchyard.errors import UserError
from switchyard.interop.huggingface.floats import from_float32, to_float32


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_finite_number_of_a_type_comes_back(dtype):
    bits = np.arange(1 << 16, dtype=np.uint16)
    numbers = to_float32(bits if dtype == "BF16" else bits.view(np.float16), dtype)
    finite = np.isfinite(numbers)
    assert finite.sum() == (1 << 16) - (2 * 128 if dtype == "BF16" else 2 * 1024)
    np.testing.assert_array_equal(from_float32(numbers[finite], dtype, "x").view(np.uint16), bits[finite])


def test_known_numbers_of_bfloat16():
    bits = np.array([0x3F80, 0xC000, 0x0000, 0x8000, 0x4049], np.uint16)
    np.testing.assert_array_equal(to_float32(bits, "BF16"), np.array([1, -2, 0, -0.0, 3.140625], np.float32))


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2.0**127, min_value=-(2.0**127)))
def test_rounding_takes_the_nearest_and_the_even_one_of_two(number):
    number = np.float32(number)
    found = from_float32(np.array([number]), "BF16", "x")
    near = [np.uint16(max(0, min(0xFFFF, int(found[0]) + step))) for step in (-1, 0, 1)]
    values = to_float32(np.array(near, np.uint16), "BF16").astype(np.float64)
    distances = np.abs(values - np.float64(number))
    best = np.nanmin(np.where(np.isfinite(distances), distances, np.nan))
    assert distances[1] == best
    if np.sum(distances == best) > 1 and number != 0:
        assert found[0] % 2 == 0


@pytest.mark.parametrize(("number", "dtype"), [(3.4e38, "BF16"), (70000.0, "F16")])
def test_a_number_that_the_type_cannot_hold_is_refused(number, dtype):
    with pytest.raises(
        UserError, match=r"^'lm_head\.weight': holds numbers that b?float16 cannot; use --dtype float32"
    ):
        from_float32(np.array([1.0, number], np.float32), dtype, "lm_head.weight")
