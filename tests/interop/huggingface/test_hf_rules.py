"""What becomes of each tensor, against loops over heads and experts, and against the parameters of the models."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles.hf_models import CASES, FIXTURES, config_of
from safetensors.numpy import load_file

from switchyard.checkpoint import store
from switchyard.interop.huggingface.families import FAMILIES
from switchyard.interop.huggingface.folder import Folder
from switchyard.interop.huggingface.pieces import Importing


@pytest.mark.parametrize("case", CASES)
def test_the_rules_name_every_parameter_of_the_model_with_its_shape(case, pynative):
    from switchyard.models import create_model

    tree = config_of(FIXTURES / case)
    family = FAMILIES[tree["model_type"]]
    config, _ = family.read(tree)
    found = {one.name: one.shape for one in family.parameters(config, 64)}
    assert found == {one.name: tuple(one.shape) for one in create_model(config, 64, drawn=False).get_parameters()}


def test_queries_keys_and_values_stand_key_value_head_by_key_value_head(imported):
    """Qwen3: D = 16, 4 query heads of 8 columns, 2 key/value heads; the columns of ours are rows of theirs."""
    theirs = load_file(FIXTURES / "qwen3" / "model.safetensors")
    ours = store.read(imported("qwen3")).weights["layers.1.attention.qkv.weight"]
    query, key, value = (theirs[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv")
    columns = []
    for kv_head in range(2):
        for head in (2 * kv_head, 2 * kv_head + 1):
            columns += [query[8 * head + column] for column in range(8)]
        columns += [key[8 * kv_head + column] for column in range(8)]
        columns += [value[8 * kv_head + column] for column in range(8)]
    np.testing.assert_array_equal(ours, np.stack(columns, axis=1))


def test_experts_are_stacked_and_turned(imported):
    theirs = load_file(FIXTURES / "olmoe" / "model.safetensors")
    ours = store.read(imported("olmoe")).weights
    names = {"w_gate": "gate_proj", "w_in": "up_proj", "w_out": "down_proj"}
    for expert in range(4):
        for name, their_name in names.items():
            matrix = theirs[f"model.layers.1.mlp.experts.{expert}.{their_name}.weight"]
            np.testing.assert_array_equal(ours[f"layers.1.feed_forward.experts.{name}"][expert], matrix.T)
    np.testing.assert_array_equal(
        ours["layers.1.feed_forward.router.weight"], theirs["model.layers.1.mlp.gate.weight"].T
    )


def test_the_gate_of_the_shared_expert_and_the_bias_of_the_router(imported):
    theirs, ours = load_file(FIXTURES / "qwen2_moe" / "model.safetensors"), store.read(imported("qwen2_moe")).weights
    gate = ours["layers.1.feed_forward.shared.gate"]
    np.testing.assert_array_equal(gate[0, :, 0], theirs["model.layers.1.mlp.shared_expert_gate.weight"][0])
    theirs, ours = load_file(FIXTURES / "glm4_moe" / "model.safetensors"), store.read(imported("glm4_moe")).weights
    bias = theirs["model.layers.1.mlp.gate.e_score_correction_bias"]
    np.testing.assert_array_equal(ours["layers.1.feed_forward.router.bias"], bias)


@given(st.sampled_from(["glm4_moe", "mixtral", "qwen2"]), st.data())
def test_any_part_of_a_parameter_is_that_part_of_the_whole(imported, case, data):
    folder = Folder(FIXTURES / case)
    folder.open_tensors()
    family = FAMILIES[folder.config["model_type"]]
    config, _ = family.read(folder.config)
    importing = Importing(folder, family.parameters(config, 64))
    whole = store.read(imported(case)).weights
    for name in data.draw(st.lists(st.sampled_from(sorted(importing.entries)), min_size=1, max_size=4)):
        box = []
        for size in importing.entries[name].shape:
            start = data.draw(st.integers(0, size - 1))
            box.append(slice(start, data.draw(st.integers(start + 1, size))))
        np.testing.assert_array_equal(importing.read(name, tuple(box)), whole[name][tuple(box)])
