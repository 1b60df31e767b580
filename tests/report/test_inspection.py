"""What counts as a choice, for a Routing of every form, typed by hand."""

import numpy as np
import pytest

from switchyard.errors import UserError
from switchyard.report import inspection

# one group of two tokens, three experts
PROBABILITIES = np.array([[[0.2, 0.7, 0.1], [0.5, 0.2, 0.3]]], np.float32)
FORMS = {
    "token choice": (
        {"expert_index": [[[1, 0], [3, 3]]], "gates": [[[0.7, 0.2], [0.0, 0.0]]]},  # 3 is no expert
        [[1, 0], [-1, -1]],
        [[0.7, 0.2], [0.0, 0.0]],
        inspection.CHOSEN,
    ),
    "expert choice": (  # experts 0 and 2 take token 1, expert 1 takes token 0
        {"token_index": [[[1], [0], [1]]], "gates": [[[0.5], [0.7], [0.3]]], "slot_mask": [[[1], [1], [1]]]},
        [[1, -1], [0, 2]],
        [[0.7, 0.0], [0.5, 0.3]],
        inspection.TAKEN,
    ),
    "slot that nobody fills": (
        {"token_index": [[[1], [0], [0]]], "gates": [[[0.5], [0.7], [0.3]]], "slot_mask": [[[1], [1], [0]]]},
        [[1], [0]],
        [[0.7], [0.5]],
        inspection.TAKEN,
    ),
    "dense": ({"gates": [[[0.2, 0.7, 0.1], [0.5, 0.2, 0.3]]]}, [[1], [0]], [[0.7], [0.5]], inspection.LARGEST),
    "soft": (
        {"combine": [[[[0.1, 0.1], [0.3, 0.4], [0.1, 0.0]], [[0.5, 0.0], [0.1, 0.1], [0.2, 0.1]]]]},
        [[1], [0]],
        [[0.7], [0.5]],
        inspection.LARGEST,
    ),
    "merged": ({"gates": [[0.2, 0.7, 0.1]]}, [[1], [1]], [[0.7], [0.7]], inspection.LARGEST),
}


@pytest.mark.parametrize("form", FORMS)
def test_choices_of_every_form(form):
    routing, choices, gates, counting = FORMS[form]
    routing = {name: np.array(value, np.int32 if "index" in name else np.float32) for name, value in routing.items()}
    found = inspection._choices_of(routing | {"probabilities": PROBABILITIES})
    assert found[0].tolist() == choices
    np.testing.assert_allclose(found[1], gates, rtol=1e-6)
    np.testing.assert_allclose(found[2], [0.7, 0.5])  # the largest probability
    assert found[3] == counting


def test_batches_with_different_numbers_of_choices_are_joined():
    one = {"choices": np.array([[[1], [0]]]), "gates": np.ones((1, 2, 1)), "losses": np.ones(2)}
    other = {"choices": np.array([[[1, 2]]]), "gates": np.ones((1, 1, 2)), "losses": np.zeros(1)}
    assert inspection._joined([one, other], "choices").tolist() == [[[1, -1], [0, -1], [1, 2]]]
    assert inspection._joined([one, other], "losses").tolist() == [1, 1, 0]


@pytest.mark.parametrize(("count", "wanted"), [(100, 4), (5, 5), (3, 9), (1, 1), (2, 1), (7, 6)])
def test_batches_lie_over_the_set_and_begin_with_neighbours(count, wanted):
    places = inspection._middle(count, wanted)
    assert len(set(places)) == len(places) and set(places) <= set(range(count))
    assert len(places) >= min(count, wanted) - 1
    if len(places) > 1:
        assert places[1] == places[0] + 1


class OfBytes:
    """A tokenizer whose ids are bytes."""

    kind = "byte"

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("token", "label"), [(65, "A"), (32, "␣"), (10, "⏎"), (0, "␀"), (27, "\\x1b"), (0xC3, "0xC3"), (60, "<")]
)
def test_label_of_a_token(token, label):
    assert inspection.label_of(OfBytes(), token) == label


def test_checkpoint_that_is_larger_than_the_memory_is_refused(tmp_path, monkeypatch):
    (tmp_path / "weights.safetensors").write_bytes(bytes(3000))
    inspection.require_memory(tmp_path)
    monkeypatch.setattr(inspection, "COPIES", 1 << 50)
    with pytest.raises(UserError, match="GB of memory to look at it"):
        inspection.require_memory(tmp_path)
