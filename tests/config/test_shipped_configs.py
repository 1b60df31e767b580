"""What the first comment of a shipped configuration says of layouts is what the configuration resolves to."""

import itertools
import re
import shlex
from pathlib import Path

import pytest

from switchyard.config import load
from switchyard.distributed.processes import must_block
from switchyard.training.limits import check_mesh, with_defaults

FOLDER = Path(__file__).parents[2] / "config"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
NUMBERS = {"one": 1, "two": 2}
# claim -> what the resolved configuration has in its place
CLAIMS = {
    r"(\d+) sequences a device": lambda config: config.data.batch_size // config.parallel.data_parallel,
    r"(\w+) experts? (?:of each layer on )?a device": lambda config: (
        config.moe.expert_num // config.parallel.expert_parallel
    ),
    r"ZeRO (\d)": lambda config: config.parallel.optimizer_shard,
    r"for ([\d,]+) Ascend": lambda config: config.devices,
    r"(\d+) micro-batches": lambda config: config.micro_batches,
    r"micro-batches of (\d+) sequences": lambda config: config.data.batch_size,
    r"(\d+) sequences a step": lambda config: config.data.batch_size * config.micro_batches,
}
COUNTS = {"moe_1b_gpu": 6, "switch_base_8_ascend": 3, "switch_base_128_ascend_64": 3, "switch_c_1t_ascend_1024": 3}
COUNTS |= {"switch_decoder_8_ascend": 3, "mixtral_8x7b_ascend_64": 3, "deepseek_v3_like_ascend_256": 2}


def comments(name: str) -> str:
    """The comments of a configuration as one line."""
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return " ".join(line.split("#", 1)[1].strip() for line in lines if "#" in line)


def jobs(name: str) -> list[tuple[str, int, list[str], str]]:
    """(what starts training, devices, overrides, what is said in brackets behind) of each command in the comments."""
    found, text = [], comments(name)
    pattern = (
        rf"(python train\.py|bash scripts/run_\w+\.sh)((?: --config config/{name}\.yaml)?[^()#]*?)(\([^)]*\)|Cost:)"
    )
    for program, rest, remark in re.findall(pattern, text):
        words = shlex.split(rest)
        flags = dict(itertools.pairwise(words))
        count = int(flags.get("--devices", 1)) * int(flags.get("--nodes", 1))
        found.append((program, count, [word for word in words if re.match(r"\w+\.\w+=", word)], remark))
    return found


def resolved(name: str, program: str, count: int, overrides: list[str]):
    """(the configuration as training would run it, its devices), once nothing is refused."""
    target = "Ascend" if "ascend" in program else "GPU" if "gpu" in program else "CPU"
    config = load(FOLDER / f"{name}.yaml", overrides)
    assert check_mesh(config, count, target) is None or target == "CPU"
    return with_defaults(config, target), target


@pytest.mark.parametrize("name", NAMES)
def test_every_command_of_a_comment_trains(name):
    found = jobs(name)
    assert found or "run_quickstart" in comments(name)
    for program, count, overrides, _ in found:
        config, _ = resolved(name, program, count, overrides)
        assert config.devices == count


@pytest.mark.parametrize("name", COUNTS)
def test_claims_of_layouts_hold(name):
    """Of a remark behind a command for that command, of the rest for the largest job."""
    held, found, rest = 0, jobs(name), comments(name)
    said_of = [(job[3], job) for job in found if job[3].startswith("(")]
    for remark, _ in said_of:
        rest = rest.replace(remark, "")
    said_of.append((rest, max(found, key=lambda job: job[1])))
    for text, job in said_of:
        config, _ = resolved(name, *job[:3])
        for pattern, value in CLAIMS.items():
            for said in re.findall(pattern, text):
                assert NUMBERS.get(said, said.replace(",", "")) in (value(config), str(value(config))), pattern
                held += 1
    assert held == COUNTS[name]


def test_eight_gpus_do_not_wait_for_kernels_and_one_keeps_its_step():
    one, eight = (resolved("moe_1b_gpu", *job[:3])[0] for job in jobs("moe_1b_gpu"))
    assert not must_block(eight) and eight.parallel.optimizer_shard == 1
    assert one.data.batch_size * one.micro_batches == eight.data.batch_size * eight.micro_batches == 64
    slow = load(FOLDER / "moe_1b_gpu.yaml", ["parallel.data_parallel=8"])
    assert with_defaults(slow, "GPU").parallel.optimizer_shard == 1  # although it accumulates
