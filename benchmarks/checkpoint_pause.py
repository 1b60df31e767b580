"""How long does a training wait for a checkpoint? Written at once, and in the background from a copy in host memory.

    python benchmarks/checkpoint_pause.py [--short] [--rounds 5] [--megabytes 16 128 512] [--folder DIR] [--json FILE]

One process; a decoder whose weights and moments have so many megabytes in all, made by `create_step`; `Saver` of the
training writes it into --folder. Rounds alternate, so what else the machine does hits both alike. The pause is what the
training thread waits in `save`; `first` is that of the first save, after the memory was taken as at the beginning of a
run; `written` is the time until the checkpoint is there.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

SHARE = 0.10  # of a save at once, which the pause must not exceed


def create(megabytes: float):
    """Returns (configuration, step) of a decoder with about so many megabytes of weights and moments."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("GLOG_v", "3")
    import mindspore as ms

    from switchyard.config import build
    from switchyard.training.step import create_step

    ms.set_context(mode=ms.PYNATIVE_MODE)
    width, layers = 256, 4
    experts = max(1, round((megabytes * 1e6 / 12 / layers - 12 * width**2) / (8 * width**2)) + 1)
    model = {"num_layers": layers, "hidden_size": width, "num_heads": 4, "seq_length": 64, "activation": "gelu"}
    config = build({"model": model, "moe": {"expert_num": experts}, "train": {"keep_checkpoints": 1}})
    step = create_step(config, 256)
    step.initialise()
    return config, step


def content(step, number: int):
    """Returns what a checkpoint is made of, as the training hands it over."""
    from switchyard.training.saver import Content

    weights = {parameter.name: parameter.asnumpy() for parameter in step.model.get_parameters()}
    optimizer = {name: parameter.asnumpy() for name, parameter in step.optimizer_state().items()}
    return Content("{}", weights, optimizer, {"step": number, "data_index": number}, step.shapes)


def savers(config, folder: Path) -> dict:
    """Returns name -> Saver: one that writes at once, and one in the background."""
    from switchyard.checkpoint.health import Healthy
    from switchyard.training.saver import Saver

    found = {}
    for name, background in (("at once", False), ("background", True)):
        train = config.train.model_copy(update={"async_checkpoint": background})
        found[name] = Saver(folder / name, config.model_copy(update={"train": train}), Healthy())
    return found


def measure(megabytes: float, rounds: int, folder: Path) -> dict:
    """Returns the figures of one size."""
    config, step = create(megabytes)
    size = sum(array.nbytes for part in content(step, 0)[1:3] for array in part.values())
    pauses: dict[str, list[float]] = {"at once": [], "background": []}
    written: dict[str, list[float]] = {"at once": [], "background": []}
    both = savers(config, folder)  # the same in every round, as in a run: copies share their memory
    started = time.perf_counter()
    both["background"].prepare(*content(step, 0)[1:3])
    prepared = time.perf_counter() - started
    for number in range(1, rounds + 2):
        for name, saver in both.items():
            started = time.perf_counter()
            saver.save(content(step, number))
            pauses[name].append(time.perf_counter() - started)
            saver.wait()
            written[name].append(time.perf_counter() - started)
    usual = {name: statistics.median(seconds[1:]) for name, seconds in pauses.items()}
    return {
        "megabytes": size / 1e6,
        "seconds_at_once": usual["at once"],
        "pause_seconds": usual["background"],
        "share": usual["background"] / usual["at once"],
        "prepare_seconds": prepared,
        "first_pause_seconds": pauses["background"][0],
        "first_share": pauses["background"][0] / usual["at once"],
        "written_seconds": statistics.median(written["background"][1:]),
        "pauses": pauses,
    }


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="16 MB, 3 rounds: seconds")
    parser.add_argument("--megabytes", nargs="+", type=float, default=[16.0, 128.0, 512.0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where checkpoints are written (default: a temporary folder)")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    sizes, rounds = ([16.0], 3) if args.short else (args.megabytes, args.rounds)
    found = []
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            found.append(measure(size, rounds, Path(folder)))
        one = found[-1]
        print(
            f"{one['megabytes']:8.1f} MB  at once {one['seconds_at_once']:7.3f} s  pause {one['pause_seconds']:7.4f} s "
            f"({100 * one['share']:.1f} %; the first {100 * one['first_share']:.1f} %)  written after "
            f"{one['written_seconds']:.3f} s",
            flush=True,
        )
    if args.json:
        from switchyard.json_text import to_json

        Path(args.json).write_text(to_json({"limit": SHARE, "sizes": found}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
