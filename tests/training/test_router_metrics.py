"""The metrics of every conditional layer: in metrics.jsonl, in TensorBoard's events, in the log, in the evaluation."""

import numpy as np
import pytest
from oracles.tiny_run import metrics_of, run_config, write_text

from switchyard.training.loop import train
from switchyard.training.metrics import MetricsLog
from switchyard.training.router_metrics import MOST_SCALARS, layer_line, layer_metrics, scalars

LAYER = {
    "layer": 3,
    "load": [6, 2],
    "importance": [5.0, 3.0],
    "dropped": 0.125,
    "entropy": 0.5,
    "max_violation": 0.5,
    "z": 0.25,
}
FIGURES = ("dropped", "entropy", "max_violation", "z")


def events_of(run) -> dict[str, list[tuple[int, float | None]]]:
    """Tag -> [(step, number; None of a histogram)] of a run's TensorBoard events, by the format of their records."""
    from tensorboardX.proto.event_pb2 import Event  # after MindSpore, which chooses protobuf's implementation

    found = {}
    for path in sorted(run.glob("events.out.tfevents*")):
        data, place = path.read_bytes(), 0
        while place < len(data):
            size = int.from_bytes(data[place : place + 8], "little")  # then 4 bytes of checksum, and 4 after the record
            event = Event.FromString(data[place + 12 : place + 12 + size])
            place += 16 + size
            for value in event.summary.value:
                number = value.simple_value if value.WhichOneof("value") == "simple_value" else None
                found.setdefault(value.tag, []).append((event.step, number))
    return found


def test_arrays_of_a_step_are_told_apart_by_layer():
    line = {"load": [[6, 2], [1, 3]], "importance": [[5.0, 3.0], [2.0, 2.0]], "layer_dropped": [0.125, 0.25]}
    line |= {"entropy": [0.5, 0.75], "max_violation": [0.5, 0.5], "z": [0.25, 1.0], "dropped": 0.1875}
    first, second = layer_metrics(line, (3, 5))
    assert first == LAYER
    assert (second["layer"], second["load"], second["dropped"], second["z"]) == (5, [1, 3], 0.25, 1.0)
    assert layer_metrics({"kind": "train", "loss": 1.0}, ()) == []  # a dense model


def test_scalars_are_named_by_layer_and_expert_in_the_words_of_the_evaluation():
    assert dict(scalars("train", [LAYER])) == {
        "train/layer_3/dropped": 0.125,
        "train/layer_3/entropy": 0.5,
        "train/layer_3/max_violation": 0.5,
        "train/layer_3/z": 0.25,
        "train/layer_3/load/expert_0": 6,
        "train/layer_3/load/expert_1": 2,
        "train/layer_3/importance/expert_0": 5.0,
        "train/layer_3/importance/expert_1": 3.0,
    }


def test_a_line_shows_each_expert_or_where_they_are_many_the_range():
    shown = "layer 3: load / mean 1.50 0.50  MaxVio 0.50  dropped 12.5 %  entropy 0.50 nats  z 0.25"
    assert layer_line(LAYER) == layer_line(LAYER, most=2) == shown
    assert layer_line(LAYER, most=1) == shown.replace("1.50 0.50", "0.50..1.50")
    assert layer_line(LAYER | {"load": [0, 0]}).startswith("layer 3: load / mean 0.00 0.00  ")


def test_more_experts_than_a_page_of_charts_can_hold_become_one_histogram(tmp_path):
    many = [1] * (MOST_SCALARS + 1)
    log = MetricsLog(tmp_path)
    log.write({"kind": "evaluation", "step": 1, "layers": [LAYER | {"load": many, "importance": many}]})
    log.close()
    found = events_of(tmp_path)
    assert found["evaluation/layer_3/load"] == [(1, None)] and found["evaluation/layer_3/importance"] == [(1, None)]
    assert found["evaluation/layer_3/entropy"] == [(1, 0.5)]
    assert not [tag for tag in found if "expert_" in tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(run folder, what was printed): layer 1 of 2 conditional, 4 steps, an evaluation in the middle."""
    folder = tmp_path_factory.mktemp("metrics")
    write_text(folder)
    config = run_config(
        folder,
        model={"num_layers": 2},
        moe={"expert_num": 4, "layers": [1], "num_experts_chosen": 2, "router": "top_k"},
        train={"steps": 4, "eval_every": 2, "eval_batches": 2, "gradient_accumulation_steps": 2},
    )
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("switchyard.training.metrics.Progress.say", lambda self, text: said.append(text))
        train(config)
    return folder / "runs" / "tiny", said


@pytest.mark.parametrize("kind", ["train", "evaluation"])
def test_every_layer_of_every_line_is_in_the_events(run, kind):
    folder, events = run[0], events_of(run[0])
    lines = metrics_of(folder, kind)
    assert len(lines) >= 2
    for place, line in enumerate(lines):
        layers = layer_metrics(line, (1,))
        assert [layer["layer"] for layer in layers] == [1]
        for layer in layers:
            prefix = f"{kind}/layer_{layer['layer']}"
            for name in FIGURES:
                step, value = events[f"{prefix}/{name}"][place]
                assert step == line["step"] and value == pytest.approx(layer[name])
            for name in ("load", "importance"):
                values = [events[f"{prefix}/{name}/expert_{expert}"][place][1] for expert in range(4)]
                assert values == pytest.approx(layer[name])


def test_the_figures_of_a_line_belong_together(run):
    for line in metrics_of(run[0]):
        load = np.array(line["load"], float)  # [M, E]
        assert load.shape == (1, 4) and load.sum(1) == pytest.approx(2 * 2 * 4 * 16)  # A micro-batches, K, B, S
        assert line["max_violation"] == pytest.approx(load.max(1) / load.mean(1) - 1)
        assert line["dropped"] == pytest.approx(np.mean(line["layer_dropped"]))


def test_the_log_shows_every_layer_at_each_evaluation(run):
    folder, said = run
    evaluations = metrics_of(folder, "evaluation")
    places = [place for place, text in enumerate(said) if "validation loss" in text]
    assert len(places) == len(evaluations) == 3  # in the middle, at the end, and the end over the whole set
    for place, line in zip(places, evaluations):
        assert said[place + 1 : place + 2] == [layer_line(layer) for layer in line["layers"]]
