"""Further jobs of two processes against one: what keeps a state of its own, what forces and records choices and drops
nothing, what scales its loss, what reads images."""

from pathlib import Path

import pytest
from oracles.jobs import largest_difference, run
from oracles.marks import long_but
from oracles.tiny_run import losses_of, metrics_of, run_config, write_text
from safetensors.numpy import load_file

from switchyard.training.loop import train

STEPS = 6
HALF, IMAGES, FORCED = "random order, float16", "expert choice of images", "forced choices, recorded, dropless"
DROPLESS = {"router": "top_k", "expert_num": 4, "num_experts_chosen": 2, "dispatch": "dropless"}
CASES = {
    "sigmoid, slices": {  # its bias follows the load of all processes, until the router is frozen
        "moe": {
            "router": "sigmoid",
            "expert_num": 4,
            "num_experts_chosen": 2,
            "topk_bias_update_rate": 0.01,
            "router_freeze_step": 4,
            "granularity": "slice",
            "slice_length": 4,
        },
    },
    FORCED: {"moe": DROPLESS},
    HALF: {
        "model": {"compute_dtype": "float16"},
        "moe": {"router": "switch", "expert_num": 4, "drop_order": "random", "capacity_factor": 0.5},
    },
    IMAGES: {
        "model": {"type": "vision", "num_layers": 2, "hidden_size": 8, "intermediate_size": 8},
        "moe": {"router": "expert_choice", "expert_num": 4, "layers": [1], "granularity": "region"},
    },
}


# float16 rounds a matrix's gradient once for all rows, or once for each process's: a relative 5e-4, which Adam turns
# into a part of a step of 0.01 where the gradient is next to nothing
TOLERANCE = {(HALF, "weights"): 5e-3, (HALF, "optimizer"): 1e-4, (HALF, "loss"): 1e-4, (HALF, "evaluation"): 3e-4}


def config_of(folder: Path, name: str, case: str, **parallel):
    """A few steps; without degrees one process with two routing groups."""
    sections = {section: dict(keys) for section, keys in CASES[case].items()}
    if case == FORCED:  # those of a run with another learning rate, and so with other choices
        forced, recorded = (str(folder / f"{run}.safetensors") for run in ("other", name))
        sections["moe"] |= {"record": recorded} | ({"replay": forced} if name != "other" else {})
        sections["schedule"] = {"learning_rate": 0.1 if name == "other" else 0.01}
    if not parallel:
        sections["moe"]["groups"] = 2
    config = run_config(
        folder, **sections, data={"batch_size": 8}, train={"steps": STEPS, "name": name}, parallel=parallel
    )
    if config.model.type != "vision":
        return config
    data = config.data.model_copy(update={"path": None})
    return config.model_copy(update={"data": data})


@pytest.mark.slow
@pytest.mark.parametrize("case", long_but(CASES, [FORCED]))
def test_two_processes_equal_one(tmp_path, graph, case):
    write_text(tmp_path)
    if case == FORCED:
        train(config_of(tmp_path, "other", case))
    train(config_of(tmp_path, "alone", case))
    experts = 1 if case == IMAGES else 2  # of images, experts are not cut: see laws.parallel_laws
    done = run(config_of(tmp_path, "two", case, data_parallel=2, expert_parallel=experts), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    one, other = (tmp_path / "runs" / name for name in ("alone", "two"))
    losses, others = losses_of(one), losses_of(other)
    assert losses.keys() == others.keys() and len(losses) == STEPS
    found = {"loss": max(abs(losses[step] - others[step]) for step in losses)} | largest_difference(one, other)
    assert [line["load"] for line in metrics_of(one)] == [line["load"] for line in metrics_of(other)]
    first, second = (metrics_of(path, "evaluation")[-1] for path in (one, other))
    found["evaluation"] = abs(first["loss"] - second["loss"])
    if case == FORCED:
        other, alone, two = (
            load_file(tmp_path / f"{name}.safetensors")["experts"] for name in ("other", "alone", "two")
        )
        assert (alone == two).all() and (alone == other).all()  # what was forced is what is recorded
    if "accuracy" in first:
        assert first["accuracy"] == second["accuracy"]
    print(case, found)
    assert all(value <= TOLERANCE.get((case, what), 1e-5) for what, value in found.items()), found
