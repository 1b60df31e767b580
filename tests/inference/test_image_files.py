"""Images are read by a declared layout and range, each by itself, or refused. No MindSpore here."""

import os

import numpy as np
import pytest

from switchyard.errors import UserError
from switchyard.inference.images import parse_range, read_file

SHAPE = (1, 2, 2)


def images_of(path, values, shape=SHAPE, declared=None):
    np.save(path, values)
    return read_file(path).images(shape, declared)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "images.npy"


def test_a_bright_pixel_in_one_image_is_refused_and_changes_no_other(path):
    """1.001 in the third image once divided all of them by 255."""
    values = np.full((3, 1, 2, 2), 0.5, np.float32)
    np.testing.assert_array_equal(images_of(path, values), values)
    values[2, 0, 1, 1] = 1.001
    with pytest.raises(UserError, match=r"image 2 holds 1.001, outside 0 to 1: declare the range with --value-range"):
        images_of(path, values)
    found = images_of(path, values, declared=(0.0, 2.0))
    np.testing.assert_allclose(found[:2], 0.25)


@pytest.mark.parametrize(
    ("values", "declared", "expected"),
    [
        (np.array([[0, 255], [51, 102]], np.uint8), None, [[0, 1], [0.2, 0.4]]),
        (np.array([[0, 1], [1, 0]], np.uint8), None, [[0, 1 / 255], [1 / 255, 0]]),  # dark bytes are still bytes
        (np.array([[0, 16], [8, 4]], np.uint8), (0.0, 16.0), [[0, 1], [0.5, 0.25]]),
        (np.array([[0, 16], [8, 4]], np.int64), (0.0, 16.0), [[0, 1], [0.5, 0.25]]),
        (np.array([[-1, 1], [0, 0.5]], ">f4"), (-1.0, 1.0), [[0, 1], [0.5, 0.75]]),
        (np.array([[0, 1], [0.5, 0.25]], np.float64), None, [[0, 1], [0.5, 0.25]]),
    ],
)
def test_the_range_is_that_of_the_type_or_the_one_that_is_given(path, values, declared, expected):
    np.testing.assert_allclose(images_of(path, values, declared=declared)[0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.array([[[[0, np.nan], [0, 0]]]], np.float32), "image 0 holds nan: every value must be finite"),
        (np.array([[[[0, 0], [0, 0]]], [[[0, 0], [0, np.inf]]]]), "image 1 holds inf: every value must be finite"),
        (np.array([[0, -0.5], [0, 0]], np.float32), "image 0 holds -0.5, outside 0 to 1"),
        (np.zeros((2, 2), np.int32), "int32 says no range of values: declare it, such as --value-range 0,2147483647"),
        (np.zeros((2, 2), np.uint16), "uint16 says no range of values: declare it, such as --value-range 0,65535"),
        (np.zeros((2, 2), bool), "values of type bool"),
        (np.zeros((2, 2), complex), "values of type complex128"),
        (np.full((2, 2), "a"), "values of type <U1"),
        (np.zeros((3, 2, 2), np.uint8), r"an array of \[3, 2, 2\]; the model takes \[1, 2, 2\] or \[N, 1, 2, 2\]"),
        (np.zeros((1, 2, 2, 1), np.uint8), r"an array of \[1, 2, 2, 1\]"),  # channels last
        (np.zeros((0, 1, 2, 2), np.uint8), r"an array of \[0, 1, 2, 2\]"),
        (np.zeros((4,), np.uint8), r"an array of \[4\]"),
        (np.uint8(3), r"an array of \[\]"),
    ],
)
def test_what_is_not_declared_is_refused(path, values, said):
    with pytest.raises(UserError, match=said) as caught:
        images_of(path, values)
    assert str(caught.value).startswith("--image: '") and "\n" not in str(caught.value)


def test_one_image_of_three_channels_is_not_three_of_one(path):
    assert images_of(path, np.zeros((3, 2, 2), np.uint8), (3, 2, 2)).shape == (1, 3, 2, 2)
    with pytest.raises(UserError, match=r"\[2, 2, 3\]; the model takes \[3, 2, 2\]"):
        images_of(path, np.zeros((2, 2, 3), np.uint8), (3, 2, 2))


def test_files_that_are_no_arrays(path, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        images_of(path, np.array([{}, {}]))  # object arrays are pickled
    np.savez(tmp_path / "several", a=np.zeros(1))
    (tmp_path / "several.npz").rename(path)
    with pytest.raises(UserError, match="several arrays"):
        read_file(path)
    path.write_bytes(b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999,), }")
    with pytest.raises(UserError, match="cannot be read"):
        read_file(path)
    for content in (b"", b"\x89PNG"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            read_file(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="cannot be read: is not a regular file"):
        read_file(path)


def test_pictures(tmp_path):
    from matplotlib.image import imsave

    grey = np.array([[0, 1], [0.2, 0.4]])
    imsave(tmp_path / "grey.png", np.repeat(grey[..., None], 3, -1))
    np.testing.assert_allclose(read_file(tmp_path / "grey.png").images(SHAPE)[0, 0], grey, atol=1e-6)
    colour = np.zeros((2, 2, 3))
    colour[..., 0] = 1
    imsave(tmp_path / "red.png", colour)
    assert read_file(tmp_path / "red.png").images((3, 2, 2))[0, 0].min() == 1
    with pytest.raises(UserError, match="is in colour, the model takes 1 channel: convert it to grey"):
        read_file(tmp_path / "red.png").images(SHAPE)
    imsave(tmp_path / "clear.png", np.concatenate([colour, np.full((2, 2, 1), 0.5)], -1))
    with pytest.raises(UserError, match="is transparent in places"):
        read_file(tmp_path / "clear.png")


@pytest.mark.parametrize("text", ["", "1", "1,0", "0,nan", "0,inf", "a,b", "0,1,2", "1,1"])
def test_ranges_that_are_none(text):
    assert parse_range("0,255") == (0.0, 255.0)
    with pytest.raises(UserError, match=r"^--value-range: "):
        parse_range(text)
