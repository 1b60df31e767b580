"""Runs everything that needs MindFormers in one process: `python -m oracles.mindformers_probe FOLDER` in a folder.

Writes FOLDER/found.json. The test says what must stand there.
"""

import json
import sys
from pathlib import Path

from switchyard.interop.mindformers import quiet

BIAS = (0.3, -0.1, 0.2, 0.0, -0.3, 0.15, 0.05, -0.2)
POSITIVE, NEGATIVE = tuple(0.5 + one for one in BIAS), tuple(one - 2.0 for one in BIAS)


def layers() -> dict:
    """Compares the layers, operator by operator: every case is used once."""
    import mindspore as ms
    from oracles.mindformers_layers import Case, compare, core_router, gate_of_one_choice

    ms.set_context(mode=ms.PYNATIVE_MODE, pynative_synchronize=True)
    rooms = ({}, {"room": 1.0}, {"room": 1.0, "token_by_token": True})
    cases = [Case(k, score, **room) for k in (1, 2, 4) for score in ("softmax", "sigmoid") for room in rooms]
    cases += [Case(k, "sigmoid", bias=BIAS, balance=0.0, **room) for k in (1, 2, 4) for room in rooms[::2]]
    cases += [Case(k, "sigmoid", groups=(4, 2), **room) for k in (2, 4) for room in rooms[::2]]
    cases += [Case(2, "sigmoid", groups=(4, 2), bias=POSITIVE, factor=2.5, balance=0.0)]
    cases += [Case(2, normalised=False), Case(2, factor=2.5, room=1.0)]
    core = [Case(k, score) for k in (1, 2, 4) for score in ("softmax", "sigmoid")]
    core += [Case(2, "sigmoid", bias=BIAS, balance=0.0), Case(4, "sigmoid", groups=(4, 2), bias=POSITIVE, balance=0.0)]
    differ = [Case(2, "sigmoid", bias=BIAS), Case(2, "sigmoid", groups=(4, 2), bias=NEGATIVE, balance=0.0)]
    return {
        "layers": {case.name: compare(case) for case in cases},
        "core": {case.name: core_router(case) for case in core},
        "differ": {case.name: compare(case) for case in differ},
        "V1": gate_of_one_choice(),
    }


def main(folder: Path) -> None:
    """Does all of it."""
    quiet.load()
    found = layers()
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
