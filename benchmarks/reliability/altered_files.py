"""Is an altered file ever read? 1,000 single bytes, and truncated, swapped and foreign files, of checkpoint and export.

    python benchmarks/reliability/altered_files.py [--short] [--seed 1] [--folder DIR] [--json FILE]

Three folders are altered, one change at a time: a checkpoint of one device and one of four, which the command
`python -m switchyard.checkpoint convert` reads as a whole, and an export, which `infer.py` reads. The changes:

- byte: one byte of one file gets another value.
- truncated: a file loses its end.
- swapped: two files of the folder change places, or a file comes from another checkpoint.
- outside: the manifest, with a right checksum of its own, names a path out of the folder; or a file is a link to
  outside.

Each must be refused in one line that names the file, without a traceback. A byte of white space in a JSON file may be
another white space, which changes nothing that is read: such a change is counted by itself, and must be accepted.
The short form leaves the export out, which takes long to make.
"""

import hashlib
import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import campaign
from campaign import TRACEBACK, Shown, contents
from forked import Forked, called

from switchyard.json_text import to_json

MANIFEST = "manifest.json"
BYTES, OTHERS = 1000, 60  # changes of a kind, over all folders
SHORT_BYTES, SHORT_OTHERS = 60, 12
OUTSIDE = ("../{name}", "/etc/hostname", "../../etc/hostname", "folder/../../{name}", "{name}/../../{name}", "~/{name}")
Change = tuple[str, Callable[[], None]]  # the file that must be named, what alters it


class Target:
    """Holds a folder that is altered, and the command that reads all of it.

    Args:
        name: in the rows.
        folder: with manifest.json.
        other: a folder of the same kind with other content; None where there is none.
        command: returns (exit code, what was said) of reading the folder.
    """

    def __init__(self, name: str, folder: Path, other: Path | None, command: Callable[[], tuple[int, str]]):
        self.name, self.folder, self.other, self.command = name, folder, other, command
        self.before = contents(folder)
        self.spare = folder.with_name(f"{folder.name}-spare")
        shutil.copytree(folder, self.spare)

    def restore(self) -> None:
        """Brings the folder back to what it was."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.spare, self.folder)

    def means_the_same(self) -> bool:
        """Returns whether only the writing of the manifest differs, with all other files as they were."""
        now = contents(self.folder)
        if {key: data for key, data in now.items() if key != MANIFEST} != {
            key: data for key, data in self.before.items() if key != MANIFEST
        }:
            return False
        try:
            return json.loads(now[MANIFEST]) == json.loads(self.before[MANIFEST])
        except (KeyError, ValueError):
            return False


def byte_changes(target: Target, draw: random.Random) -> Iterator[Change]:
    """Yields changes of one byte; every file is as likely as any other."""
    while True:
        name = draw.choice(sorted(target.before))
        data = bytearray(target.before[name])
        data[draw.randrange(len(data))] ^= draw.randrange(1, 256)
        yield name, lambda name=name, data=bytes(data): _write(target.folder / name, data)


def truncations(target: Target, draw: random.Random) -> Iterator[Change]:
    """Yields files without their end, or empty."""
    while True:
        name = draw.choice(sorted(target.before))
        data = target.before[name][: draw.randrange(len(target.before[name]))]
        yield name, lambda name=name, data=data: _write(target.folder / name, data)


def swaps(target: Target, draw: random.Random) -> Iterator[Change]:
    """Yields pairs of files that change places, and files of another checkpoint."""
    names = sorted(set(target.before) - {MANIFEST})
    while True:
        one, two = draw.sample(names, 2)
        foreign = target.other and (target.other / one).read_bytes()
        if foreign and foreign != target.before[one] and draw.random() < 0.5:
            yield one, lambda one=one, foreign=foreign: _write(target.folder / one, foreign)
        elif target.before[one] != target.before[two]:
            yield f"{one}|{two}", lambda one=one, two=two: _swap(target, one, two)


def ways_out(target: Target, draw: random.Random) -> Iterator[Change]:
    """Yields manifests that name a path out of the folder, and links out of it."""
    while True:
        name = draw.choice(sorted(set(target.before) - {MANIFEST}))
        if draw.random() < 0.5:
            yield name, lambda name=name: _link(target, name)
        else:
            path = draw.choice(OUTSIDE).format(name=name)
            yield MANIFEST, lambda name=name, path=path: _rename_in_manifest(target, name, path)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _swap(target: Target, one: str, two: str) -> None:
    _write(target.folder / one, target.before[two])
    _write(target.folder / two, target.before[one])


def _link(target: Target, name: str) -> None:
    """Puts a link to the same file, outside of the folder, in the place of a file."""
    (target.folder / name).unlink()
    (target.folder / name).symlink_to((target.spare / name).absolute())


def _rename_in_manifest(target: Target, name: str, path: str) -> None:
    """Lets the manifest name another path, and gives it the checksum that goes with it."""
    tree = json.loads(target.before[MANIFEST])
    tree.pop("sha256")
    tree["files"][path] = tree["files"].pop(name)
    tree["sha256"] = hashlib.sha256(to_json(tree, sort_keys=True).encode()).hexdigest()
    (target.folder / MANIFEST).write_text(to_json(tree, indent=1), encoding="utf-8")


KINDS = {"byte": byte_changes, "truncated": truncations, "swapped": swaps, "outside": ways_out}


def alter(target: Target, kind: str, count: int, draw: random.Random, shown: Shown) -> Counter:
    """Makes changes of one kind, one at a time, and returns the counts."""
    found, changes = Counter(), KINDS[kind](target, draw)
    while found["changes"] < count and not shown.over:
        name, change = next(changes)
        change()
        found["changes"] += 1
        same = target.means_the_same() if kind == "byte" else False
        code, said = target.command()
        outcome = outcome_of(code, said, name, same)
        found[outcome] += 1
        if outcome not in ("refused", "same_content"):
            print(f"BROKEN: {target.name}, {kind} of {name}: {outcome}: code {code}: {said[-600:]}", flush=True)
        target.restore()
        shown.advance(f"({target.name}, {kind})")
    return found


def outcome_of(code: int, said: str, name: str, same: bool) -> str:
    """Returns what became of a change: refused by name, or what is wrong."""
    if TRACEBACK in said:
        return "tracebacks"
    if code == 0:
        return "same_content" if same else "accepted"
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    named = any(part in line for line in lines for part in name.split("|"))
    return "refused" if code == 2 and len(lines) == 1 and named and not same else "unnamed"


def checkpoints(folder: Path) -> list[Target]:
    """Returns a checkpoint of one device and one of four, each with another one of the same kind."""
    from oracles.tiny_checkpoint import save_whole

    from switchyard.checkpoint.store import main

    degrees = "{data_parallel: 4, expert_parallel: 2}"
    targets = []
    for name in ("one device", "four devices"):
        pair = []
        for step in (3, 4):
            place, *_ = save_whole(folder / f"{name.split()[0]}-{step}", step=step)
            if name == "four devices":
                out = folder / f"four-{step}-sharded" / "checkpoints" / place.name
                out.parent.mkdir(parents=True)
                called(main, ["convert", str(place), "--to", degrees, "--out", str(out)])
                place = out
            pair.append(place)

        def read(place: Path = pair[0]) -> tuple[int, str]:
            out = folder / "converted"
            shutil.rmtree(out, ignore_errors=True)
            return called(main, ["convert", str(place), "--to", "{}", "--out", str(out)])

        targets.append(Target(f"checkpoint, {name}", *pair, read))
    return targets


def export_of(folder: Path) -> Target:
    """Returns an export."""
    from oracles.tiny_export import save_export

    from switchyard.commands import infer_main

    made = Forked(lambda words: save_export(folder, model={"num_layers": 1}) and 0, [], folder / "export.log")
    if made.wait() != 0:
        raise RuntimeError(made.said)
    words = ["--model", str(folder / "out"), "--prompt", "line", "--max-new-tokens", "1"]

    def read() -> tuple[int, str]:
        if target.means_the_same():  # the model is run, in a process of its own
            job = Forked(infer_main, words, folder / "infer.log")
            return job.wait(), job.said
        return called(infer_main, words)

    target = Target("export", folder / "out", None, read)
    return target


def alter_everything(folder: Path, short: bool, draw: random.Random) -> list[dict]:
    """Alters all folders, and returns the rows."""
    targets = checkpoints(folder) + ([] if short else [export_of(folder)])
    for target in targets:
        code, said = target.command()
        if code:
            raise RuntimeError(f"{target.name}: {said}")
    bytes_, others = (SHORT_BYTES, SHORT_OTHERS) if short else (BYTES, OTHERS)
    counts = {kind: bytes_ if kind == "byte" else others for kind in KINDS}
    shown, rows = Shown("altered_files", sum(counts.values())), []
    for number, target in enumerate(targets):
        for kind, count in counts.items():
            part = count // len(targets) + (number < count % len(targets))
            found = alter(target, kind, part, draw, shown)
            names = ("changes", "refused", "same_content", "accepted", "unnamed", "tracebacks")
            row = {"folder": target.name, "kind": kind} | {name: found[name] for name in names}
            rows.append(row | {"broken": found["accepted"] + found["unnamed"] + found["tracebacks"]})
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Runs the campaign."""
    return campaign.run_campaign("altered_files", __doc__, alter_everything, arguments)


if __name__ == "__main__":
    sys.exit(main())
