"""Images: digits, IDX files, batches that are a function of (seed, index), and clear refusals."""

import gzip

import numpy as np
import pytest

from switchyard.config import build
from switchyard.data import load_data
from switchyard.data.images import Classes, ImageBatches, ImageEvalBatches, load_digits, read_idx
from switchyard.errors import UserError


def config(path=None, **vision):
    return build({"model": {"type": "vision"}, "vision": vision, "data": {"path": path, "batch_size": 4}})


def numbered(count=10, tasks=2):
    """(images that hold their own number, answers that tell number and task)."""
    images = np.arange(count, dtype=np.float32).reshape(-1, 1, 1, 1)
    return images, np.arange(count)[:, None] * 10 + np.arange(tasks)


def write_idx(path, values):
    values = np.asarray(values, np.uint8)
    head = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    data = head + values.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def folder(tmp_path):
    """A folder as MNIST's, of 3 x 3 pixels."""
    random = np.random.default_rng(0)
    for part, count, end in (("train", 9, ""), ("t10k", 5, ".gz")):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{end}", random.integers(0, 256, (count, 3, 3)))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{end}", np.arange(count) % 3)
    return tmp_path


def test_digits():
    images, labels = load_digits()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == np.float32
    assert (images.min(), images.max()) == (0, 1) and set(labels) == set(range(10))
    data = load_data(config())
    assert data.validation_tokens == 180 and data.tokenizer.vocab_size == 10
    assert data.description == "scikit-learn's digits, 1,617 training and 180 validation images; tasks: identity"


def test_the_split_does_not_depend_on_the_seed():
    held = [load_data(build({"model": {"type": "vision"}, "train": {"seed": seed}})).validation() for seed in (1, 2)]
    assert np.array_equal(held[0].at(0).images, held[1].at(0).images)


def test_batches_are_a_function_of_seed_and_index():
    images, answers = numbered()
    one, other = (ImageBatches(images, answers, 3, seed=5) for _ in range(2))
    one.at(7)
    for index in (0, 4, 2):
        for a, b in zip(one.at(index), other.at(index)):
            assert np.array_equal(a, b)
    assert not np.array_equal(one.at(0).images, ImageBatches(images, answers, 3, seed=6).at(0).images)


def test_an_epoch_has_no_image_twice_and_asks_one_task():
    batches = ImageBatches(*numbered(), 3, seed=5)
    epoch = [batches.at(index) for index in range(batches.batches_per_epoch)]
    seen = np.concatenate([batch.images.reshape(-1) for batch in epoch])
    assert len(seen) == len(set(seen)) == 9
    for batch in epoch:
        assert np.array_equal(batch.valid.sum(1), np.ones(3))
        assert np.array_equal(batch.labels[:, 0], 10 * batch.images.reshape(-1))


def test_ranks_share_the_batch_of_one_process():
    whole = ImageBatches(*numbered(), 4, seed=5).at(3).images
    parts = [ImageBatches(*numbered(), 2, seed=5, rank=rank, world=2).at(3).images for rank in range(2)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_evaluation_asks_every_image_every_task_once():
    images, answers = numbered(5, 2)
    batches = ImageEvalBatches(images, answers, 4)
    asked = []
    for batch in batches:
        for image, valid in zip(batch.images, batch.valid):
            asked += [(int(image.reshape(())), int(task)) for task in np.flatnonzero(valid)]
    assert len(batches) == 3 and asked == [(image, task) for image in range(5) for task in range(2)]


def test_answers_of_tasks():
    classes = Classes(("identity", "parity", "half"), (10, 2, 2), 10)
    assert classes.answers(np.array([3, 4, 5])).tolist() == [[3, 1, 0], [4, 0, 0], [5, 1, 1]]


def test_idx_files(folder):
    data = load_data(config(str(folder), image_size=3))
    assert data.validation_tokens == 5 and data.train.batches_per_epoch == 2
    raw = read_idx(folder / "t10k-images-idx3-ubyte.gz")
    assert np.allclose(data.validation().at(0).images[:, 0] * 255, raw[:4], atol=1e-4)


def test_without_test_files_a_part_is_held_out(folder):
    for file in folder.glob("t10k*"):
        file.unlink()
    assert load_data(config(str(folder), image_size=3)).validation_tokens == 1


@pytest.mark.parametrize(
    ("vision", "answer"),
    [
        ({"image_size": 8}, "vision.image_size: 8; the images have 3; set vision.image_size=3"),
        ({"image_size": 3, "channels": 2}, "vision.channels: 2; the images have 1; set vision.channels=1"),
        ({"image_size": 3, "classes": 2}, "vision.classes: 2; labels go up to 2; set vision.classes=3"),
    ],
)
def test_images_that_do_not_fit(folder, vision, answer):
    with pytest.raises(UserError, match=answer):
        load_data(config(str(folder), **vision))


def test_files_that_are_damaged_or_missing(folder):
    images = folder / "train-images-idx3-ubyte"
    whole = images.read_bytes()
    for data, answer in (
        (whole[:-1], "is truncated"),
        (b"\x89PNG", "is not an IDX file"),
        (gzip.compress(whole)[:-9], "cannot be read"),
    ):
        images.write_bytes(data)
        with pytest.raises(UserError, match=answer):
            load_data(config(str(folder), image_size=3))
    images.unlink()
    with pytest.raises(UserError, match="holds no train-images-idx3-ubyte"):
        load_data(config(str(folder), image_size=3))
    with pytest.raises(UserError, match="give a folder"):
        load_data(config(str(folder / "nowhere"), image_size=3))


def test_another_checkpoint(folder):
    held = load_data(config()).tokenizer.to_json()
    with pytest.raises(UserError, match=r"vision\.tasks"):
        load_data(config(tasks=["parity"]), held)


def test_beginning_anywhere_gives_the_same_batches_of_images():
    pictures = np.arange(11, dtype=np.float32).reshape(11, 1, 1, 1)
    answers = np.arange(11, dtype=np.int32).reshape(11, 1)
    whole, later = (ImageBatches(pictures, answers, 2, 1, rank=1, world=2) for _ in range(2))
    for index in range(6):
        later.start_at(index, *whole.course.after(index))
        for ahead in range(index, 8):
            np.testing.assert_array_equal(later.at(ahead).images, whole.at(ahead).images)
    ones = ImageBatches(pictures, answers, 1, 1)
    ones.start_at(2, *whole.course.after(2))  # 8 of 11 were read by both ranks
    left = {int(ones.at(index).images[0, 0, 0, 0]) for index in range(2, 5)}
    read = {
        int(picture)
        for rank in (0, 1)
        for index in (0, 1)
        for picture in ImageBatches(pictures, answers, 2, 1, rank, 2).at(index).images.reshape(-1)
    }
    assert left | read == set(range(11))
