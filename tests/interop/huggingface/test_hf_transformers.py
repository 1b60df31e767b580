"""Against torch and transformers, where both are installed: exports load there and compute the same.

The differences that docs/interop.md gives are printed with -s.
"""

import runpy
from pathlib import Path

import numpy as np
import pytest
from oracles.hf_models import CASES, FIXTURES, bits_of, config_of, references, run
from safetensors.numpy import load_file

from switchyard.interop.huggingface.exporter import export_model
from switchyard.interop.huggingface.importer import import_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "make_interop_fixtures.py"
BOUND = 1e-4
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def script() -> dict:
    """Gives the functions of scripts/make_interop_fixtures.py."""
    return runpy.run_path(str(SCRIPT))


def _logits(folder: Path, script: dict) -> tuple[np.ndarray, np.ndarray | None]:
    """Loads a folder strictly and returns (logits [T, V], choices [M, T, K]) of the reference's batch."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    arrays = script["reference"](model.eval())
    return arrays["logits"], arrays.get("choices")


@pytest.mark.parametrize("case", CASES)
def test_an_export_loads_in_transformers_and_computes_the_same(case, imported, script, tmp_path, pynative):
    export_model(imported(case), tmp_path / "out", say=lambda line: None)
    expected = references(case)
    ours, _ = run(imported(case), expected["tokens"], expected["valid"])
    theirs, choices = _logits(tmp_path / "out", script)
    there, back = np.abs(ours - expected["logits"]).max(), np.abs(theirs - ours).max()
    print(f"{case}: import {there:.1e}, export {back:.1e}")
    assert there <= BOUND and back <= BOUND
    np.testing.assert_array_equal(theirs, expected["logits"])  # its own numbers, bit for bit
    if choices is not None:
        np.testing.assert_array_equal(choices, expected["choices"])


def test_a_tokenizer_goes_along_with_its_template(imported, tmp_path):
    export_model(imported("mixtral"), tmp_path / "out", say=lambda line: None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert text == "user: hello\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer) == 59  # those that fill up the model are out again


@pytest.mark.parametrize("case", CASES)
def test_the_script_makes_the_fixtures_again(case, script, tmp_path):
    script["write"](case, tmp_path / case)
    assert bits_of(tmp_path / case) == bits_of(FIXTURES / case)
    assert config_of(tmp_path / case) == config_of(FIXTURES / case)
    found = load_file(tmp_path / case / "reference.safetensors")
    for name, array in references(case).items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5)
    names = sorted(path.name for path in (FIXTURES / case).iterdir())
    assert sorted(path.name for path in (tmp_path / case).iterdir()) == names
    assert sum(path.stat().st_size for path in (FIXTURES / case).iterdir()) <= 60_000


def test_a_model_that_was_trained_here_is_one_of_transformers(script, tmp_path, pynative):
    """GLM by weights of ours with a byte tokenizer, over a window of text that both read."""
    from switchyard import config as configuration
    from switchyard.checkpoint import store
    from switchyard.data.tokenizer import ByteTokenizer
    from switchyard.models import create_model

    model = {"num_layers": 2, "hidden_size": 16, "num_heads": 4, "intermediate_size": 24, "activation": "swiglu"}
    moe = {
        "router": {"name": "sigmoid"},
        "expert_num": 4,
        "num_experts_chosen": 2,
        "layers": [1],
        "shared_expert_num": 1,
    }
    config = configuration.build({"model": model | {"init_method_std": 0.4}, "moe": moe | {"aux_loss_factor": 0}})
    weights = {one.name: one.asnumpy() for one in create_model(config, 256).get_parameters()}
    state = {"step": 1, "seconds": 0.0}
    store.save(tmp_path / "run", config, ByteTokenizer().to_json(), weights, {}, state)
    assert export_model(tmp_path / "run", tmp_path / "out", say=lambda line: None).model_type == "glm4_moe"
    theirs, choices = _logits(tmp_path / "out", script)
    expected = references("glm4_moe")
    ours, found = run(tmp_path / "run", expected["tokens"], expected["valid"])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=BOUND)
    np.testing.assert_array_equal(np.sort(found, -1), np.sort(choices, -1))
    import_model(tmp_path / "out", tmp_path / "again", say=lambda line: None)
    again, _ = run(tmp_path / "again", expected["tokens"], expected["valid"])
    np.testing.assert_array_equal(again, ours)
