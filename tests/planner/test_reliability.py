"""What a day of a run reads, writes and loses, against numbers by hand."""

import pytest

from switchyard import cli
from switchyard.config import build
from switchyard.planner import search
from switchyard.planner.costs import costs
from switchyard.planner.reliability import DAY, READ_RATE, SAVE_RATE, Assumptions, best_interval, day_of, render_day
from switchyard.planner.sizes import parameter_count

TREE = {"data": {"batch_size": 4}, "train": {"checkpoint_every": 100, "steps": 10**6}}


def day(step=1.0, **assumed):
    config = build(TREE)
    return day_of(config, costs(config, 256), 256, step, Assumptions(**assumed))


def test_a_day_without_failures():
    """100 steps of a second and a checkpoint after each: of a disk of a byte a second, as many seconds as bytes."""
    size = 3 * 4 * parameter_count(build(TREE), 256)
    found = day(failures=0.0, disk=size / 60)  # a minute to write
    assert found.checkpoint == size and found.save == pytest.approx(60)
    assert found.steps == pytest.approx(DAY * 100 / 160)
    assert found.saving == pytest.approx(DAY * 60 / 160) and found.written == pytest.approx(DAY / 160 * size)
    assert found.text == pytest.approx(found.steps * 4 * 65 * 4)  # 4 sequences of 64 tokens and the next one
    assert found.lost == pytest.approx(60 / 160) and found.repeated == found.restarting == found.best_interval == 0


def test_a_failure_costs_half_an_interval_and_a_start():
    size = 3 * 4 * parameter_count(build(TREE), 256)
    found = day(failures=2.0, disk=size / 60, restart=600.0)
    assert found.repeated == pytest.approx(2 * 160 / 2)
    assert found.restarting == pytest.approx(2 * (600 + found.read))
    assert found.read == pytest.approx(60, rel=1e-4)  # one device reads all
    left = DAY - found.repeated - found.restarting
    assert found.steps == pytest.approx(left * 100 / 160)
    assert found.restored == pytest.approx(2 * size, rel=1e-4)
    assert found.steps * 1.0 + found.saving + found.repeated + found.restarting == pytest.approx(DAY)


def test_a_fast_disk_leaves_what_a_process_does():
    config = build(TREE)
    share = costs(config, 256).weights * 3 + 12  # with three scalars of the optimizer
    found = day(failures=1.0, disk=1e15)
    assert found.save == pytest.approx(share / SAVE_RATE) and found.read == pytest.approx(share / READ_RATE)


def test_more_failures_than_a_day_holds_leave_no_step():
    found = day(failures=1000.0, restart=3600.0)
    assert found.steps == found.repeated == 0 and found.lost == pytest.approx(1)


def test_the_best_interval_is_youngs():
    """sqrt(2 * 50 s * 86,400 s) = 2,939 s, of 2 seconds a step."""
    assert best_interval(2.0, 50.0, 1.0) == 1470
    lines = "\n".join(render_day(day(failures=1.0), Assumptions(1.0)))
    assert "1 failures a day, disk 20 GB/s for all processes together, 900 s to start again" in lines
    assert "train.checkpoint_every=" in lines and "checkpoints written, one in 100 steps" in lines


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--failures-per-day", "-1"], "--failures-per-day: -1.0; must be positive"),
        (["--failures-per-day", "1", "--disk", "0"], "--disk: 0; must be positive"),
        (["--failures-per-day", "1", "--disk", "much"], "--disk: much; a number and MB"),
        (["--failures-per-day", "1", "--restart-seconds", "1e9"], "--restart-seconds: 1000000000.0; must be"),
        (["--failures-per-day", "1", "--devices", "2"], "--failures-per-day: 1; is said of the configuration's own"),
    ],
)
def test_assumptions_that_cannot_be(tmp_path, capsys, more, says):
    path = tmp_path / "small.yaml"
    path.write_text("data: {batch_size: 4}\n")
    assert cli.run(search.main, ["--config", str(path), "--devices", "1", "--memory", "64GB", *more]) == 2
    assert says in capsys.readouterr().err


def test_the_command_says_what_a_day_costs(tmp_path, capsys):
    path = tmp_path / "small.yaml"
    path.write_text("data: {batch_size: 4}\n")
    command = ["--config", str(path), "--devices", "1", "--memory", "64GB", "--failures-per-day", "3"]
    assert cli.run(search.main, command) == 0
    text = capsys.readouterr().out
    assert "steps done again after failures" in text and "assumed: 3 failures a day" in text
