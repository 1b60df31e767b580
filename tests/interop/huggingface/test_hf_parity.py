"""Imported models compute what transformers computed: logits and chosen experts of a ragged batch with padding."""

import numpy as np
import pytest
from oracles.hf_models import CASES, references, run

BOUND = 1e-4  # of a logit, float32


def _difference(case, imported, **changes) -> float:
    expected = references(case)
    logits, _ = run(imported(case), expected["tokens"], expected["valid"], **changes)
    return float(np.abs(logits - expected["logits"]).max())


@pytest.mark.parametrize("case", CASES)
def test_logits_and_experts_are_those_of_transformers(case, imported, pynative):
    expected = references(case)
    logits, choices = run(imported(case), expected["tokens"], expected["valid"])
    assert expected["logits"].std() > 0.5  # a model whose logits say something
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=BOUND)
    assert (choices is None) == ("choices" not in expected)
    if choices is not None:  # as sets: transformers does not order them in GLM
        np.testing.assert_array_equal(np.sort(choices, -1), np.sort(expected["choices"], -1))
        assert len(np.unique(expected["choices"])) == 4  # every expert is reached


def _router(**options) -> dict:
    return {"moe": {"router": options}}


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("llama2", {"model": {"rotary_scaling": None}}),
        ("llama3", {"model": {"rotary_scaling": None}}),
        ("mistral", {"model": {"sliding_window": None, "window_layers": "all"}}),
        ("qwen2", {"model": {"window_layers": "all"}}),
        ("qwen2", {"model": {"rotary_scaling": None}}),
        ("qwen3", {"model": {"theta": 500.0}}),
        ("mixtral", _router(name="top_k", norm_topk_prob=False)),
        ("olmoe", _router(name="top_k", norm_topk_prob=True)),
        ("glm4_moe", _router(name="sigmoid", routed_scaling_factor=1.5)),  # without the limit to the best group
        ("glm4_moe", _router(name="sigmoid", n_group=2, topk_group=1)),  # without the factor
        ("glm4_moe", {"model": {"partial_rotary": 1.0}}),
    ],
)
def test_another_value_of_a_key_would_be_noticed(case, changes, imported, pynative):
    assert _difference(case, imported, **changes) > 100 * BOUND
