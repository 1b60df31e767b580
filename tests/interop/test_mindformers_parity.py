"""Training through MindFormers' Trainer against `train.py`, and MindFormers' experts against those of this package.

One process imports MindFormers, for seconds, and does everything; see oracles.mindformers_probe.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from switchyard.interop.mindformers.sections import SPEED
from switchyard.optional import is_installed

ROOT = Path(__file__).resolve().parents[2]
CLOSE = 1e-5

pytestmark = pytest.mark.skipif(
    not is_installed("mindformers"), reason="needs mindformers: pip install mindformers==1.9.0"
)


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """Returns (what the process has found, what it has printed)."""
    folder, current = tmp_path_factory.mktemp("probe"), tmp_path_factory.mktemp("current")
    path = os.pathsep.join((str(ROOT / "src"), str(ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-m", "oracles.mindformers_probe", folder]
    done = subprocess.run(command, cwd=current, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text()), done.stdout


def test_importing_and_training_leave_the_current_folder_and_stdout_clean(probe):
    found, printed = probe
    assert found["after import"] == found["after training"] == []
    assert {line.split()[0] for line in printed.splitlines()} == {"run:", "step", "done:"}


def test_the_log_of_mindformers_is_in_the_run_folder(probe):
    found, _ = probe
    assert {"mindformers.log", "mindformers.yaml", "metrics.jsonl"} <= set(found["run folder"])
    assert "modules" not in found["run folder"]  # the copies that `auto_register` makes
    assert any("Training Over" in line for line in found["log"])


@pytest.mark.parametrize("figure", ["loss", "balance_loss", "z_loss", "gradient_norm"])
def test_twenty_steps_equal_train_py(probe, figure):
    """The same weights, text, order, AdamW and rates; auxiliary losses and the gradient norm, too."""
    own, theirs = probe[0]["own"], probe[0]["theirs"]
    assert [line["step"] for line in own] == [line["step"] for line in theirs] == list(range(1, 21))
    assert own[-1]["loss"] < own[0]["loss"] - 1  # it learns
    assert max(abs(a[figure] - b[figure]) for a, b in zip(own, theirs)) <= CLOSE


def test_the_rates_of_mindformers_schedule_are_those_of_train_py(probe):
    own, theirs = probe[0]["own"], probe[0]["theirs"]
    assert max(abs(a["learning_rate"] - b["learning_rate"]) for a, b in zip(own, theirs)) <= 1e-8


def test_loads_and_drops_are_those_of_train_py(probe):
    own, theirs = probe[0]["own"], probe[0]["theirs"]
    assert [line["load"] for line in own] == [line["load"] for line in theirs]
    assert own[0]["dropped"] == pytest.approx(theirs[0]["dropped"])
    assert own[0]["dropped"] > 0


def test_keys_that_cannot_be_followed_are_refused_in_one_line(probe):
    assert probe[0]["refused"] == {
        "taken": "4",
        "unknown": "model.model_config.colour: 'red'; unknown key",
        "two places": "model.model_config.moe: given beside moe_config; describe the experts in one of the two",
        "speed": f"moe_config.comp_comm_parallel: True; {SPEED}; leave it out",
        "context": "parallel_config.context_parallel: 2; sequences are not split over devices; leave it out",
        "per token": "calculate_per_token_loss: True; the loss of this model is a mean already: set it to False",
        "law": "model.num_heads: 4; must divide model.hidden_size (30)",
    }


def test_layers_equal_mindformers_moev2(probe):
    """Output, auxiliary loss, and the gradients of tokens, router and experts, for every case."""
    layers = probe[0]["layers"]
    assert {case.split(",")[0] for case in layers} == {"k=1", "k=2", "k=4"}
    worst = {case: max(value for name, value in found.items() if name not in ("dropped", "scale"))
             for case, found in layers.items()}  # fmt: skip
    assert {case: value for case, value in worst.items() if value > CLOSE} == {}


def test_cases_with_capacity_drop_choices(probe):
    for case, found in probe[0]["layers"].items():
        assert (found["dropped"] > 0) == ("capacity" in case), case
        assert found["scale"] > 0.1, case  # gradients that could differ


def test_token_by_token_is_another_order_than_position(probe):
    """For two choices of a token the orders keep other choices: both equal MindFormers', one each."""
    layers = probe[0]["layers"]
    kdrop, sdrop = (layers[f"k=2, softmax, capacity 1.0 {order}"] for order in ("kdrop", "sdrop"))
    assert kdrop["scale"] != sdrop["scale"]


def test_the_router_of_parallel_core_chooses_and_weighs_alike(probe):
    for case, found in probe[0]["core"].items():
        assert found["choices"] == 0, case
        assert max(found.values()) <= CLOSE, case


def test_a_bias_is_left_out_of_mindformers_balance_loss(probe):
    """MindFormers counts the choices without the bias (DeepSeek-V3, eq. 18), this package those that were made."""
    found = probe[0]["differ"]["k=2, sigmoid, dropless, bias, balance loss"]
    assert found["output"] <= CLOSE
    assert found["loss"] > CLOSE


def test_mindformers_leaves_the_groups_where_all_scores_are_negative(probe):
    """It sets the scores of other groups to 0, which is more than a negative score; here they are out of reach."""
    found = probe[0]["differ"]["k=2, sigmoid, dropless, groups 2 of 4, bias"]
    assert found["output"] > 0.1


def test_mindformers_first_router_makes_a_single_gate_1(probe):
    """TopkRouterV1 divides a gate by itself: no router learns from the task. Here the gate is the probability."""
    found = probe[0]["V1"]
    assert found["V1 gate"] == pytest.approx(1)
    assert found["V1 gradient"] < 1e-6
    assert found["own gate - probability"] == 0
    assert found["own gradient"] > 0.1
