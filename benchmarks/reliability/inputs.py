"""Does bad input ever end in a traceback? 2,000 generated configurations, command lines, corpora and prompts.

    python benchmarks/reliability/inputs.py [--short] [--seed 1] [--folder DIR] [--json FILE]

- configurations: keys of a small valid one get other values, sections are missing or foreign, the YAML itself is
  damaged; `train.py --print-config` reads them. Of those that are accepted and small, some train two steps.
- command lines: options and values of all programs, right and wrong, with files that are not what they should be.
- corpora: bytes of all kinds, lines of JSON, damaged archives; data.prepare reads them.
- prompts: texts, numbers of tokens and ways of sampling for one exported model, and files of prompts.

Each call must end well or with exit code 2 and one line. No file that was there before may be changed. The short form
has no model, so it trains nothing and reads files of prompts only.
"""

import gzip
import json
import random
import resource
import shutil
import sys
import traceback
import typing
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import campaign
import yaml
from campaign import TRACEBACK, Shown, contents, fault_of
from forked import Forked, called, limited, own_size
from oracles.tiny_run import run_config, write_text

from switchyard.config import Config
from switchyard.errors import UserError
from switchyard.json_text import to_json

COUNTS = {"configurations": 800, "trainings": 40, "command lines": 600, "corpora": 360, "prompts": 200}
SHORT_COUNTS = {"configurations": 40, "command lines": 40, "corpora": 20, "prompts": 20}
MEMORY = 6 << 30  # bytes that a training may take besides what this process has
SECONDS = 120.0  # of a training
VALUES = (
    *(0, 1, 2, 3, 4, 7, -1, 2**31, 2**63, 2**64, 10**30, 0.0, 0.5, 1.0, -0.5, 1e-300, 1e308),
    *(float("nan"), float("inf"), "", " ", "x", "null", "none", "auto", "1e3", "0x10", "a\nb", "\0", "\N{SHEEP}"),
    *("../x", "/", "~", "byte", "char", None, True, False, [], [1], [1, 2], [[1]], ["all"], {}, {"a": 1}, [None]),
    *("all", "cpu", "CPU", "top_k", "hash"),
)
USUAL = {bool: (True, False), int: (1, 2, 4, 8), float: (0.0, 0.1, 0.5, 1.0, 2.0)}  # values that are often right
TEXTS = (
    *("", " ", "\n", "line 1", "\N{SHEEP}" * 3, "\0", "e\u0301\u200b\ufeff", "\ud800", "word " * 40, "\x1b[31m"),
    *("a" * 5000, "%s{}{0}"),
)
EASY = ("line 1", " ", "line 20: 3 sheep", "gates")


def sections() -> dict[str, list[str]]:
    """Returns section -> keys of the configuration."""
    return {name: list(field.annotation.model_fields) for name, field in Config.model_fields.items()}


def likely(section: str, key: str, held: object, draw: random.Random) -> object:
    """Returns a value that a key may well take: one of its words, or of the type of the value that it has."""
    annotation = Config.model_fields[section].annotation.model_fields[key].annotation
    if words := [one for one in typing.get_args(annotation) if isinstance(one, str)]:
        return draw.choice(words)
    return draw.choice(USUAL.get(type(held), (held,)))


def configuration(base: dict, draw: random.Random) -> str:
    """Returns the text of a generated configuration."""
    tree, known = json.loads(to_json(base)), sections()
    for _ in range(draw.randrange(1, 4)):
        section = draw.choice(sorted(known))
        if not isinstance(tree.setdefault(section, {}), dict):
            continue
        key = draw.choice(known[section])
        if draw.random() < 0.75:
            tree[section][key] = likely(section, key, tree[section].get(key), draw)
        elif draw.random() < 0.9:
            tree[section][key] = draw.choice(VALUES)
        else:
            tree[section][f"{key}x"] = {key: draw.choice(VALUES)}
    if draw.random() < 0.05:
        tree[draw.choice([*known, "foreign", 3])] = draw.choice(VALUES)
    text = yaml.safe_dump(tree, allow_unicode=True)
    if draw.random() < 0.1:
        place = draw.randrange(len(text))
        text = (
            text[:place]
            + draw.choice(["", ":", "\t", "{", "&a ", "*a ", "!!python/name:os ", "- ", "\x07"])
            + (text[place + draw.randrange(3) :])
        )
    return text


class Inputs:
    """Calls the programs with generated input, and counts what became of it.

    Args:
        folder: to work in.
        draw: random numbers.
        shown: counts the calls.
    """

    def __init__(self, folder: Path, draw: random.Random, shown: Shown):
        self.folder, self.draw, self.shown = folder, draw, shown
        self.kept = folder / "kept"
        self.accepted: list[Path] = []
        self.kept.mkdir()
        write_text(self.kept)
        (self.kept / "empty").mkdir()
        (self.kept / "random.bin").write_bytes(draw.randbytes(2000))
        (self.kept / "empty.txt").write_text("")
        (self.kept / "manifest").mkdir()
        (self.kept / "manifest" / "manifest.json").write_text('{"format": 3, "files": []}')
        tree = yaml.safe_load(run_config(self.kept).to_yaml())
        tree["train"] |= {"steps": 2, "output_dir": str(folder / "runs"), "checkpoint_every": 1}
        tree["context"]["mode"] = "pynative"
        self.base = tree
        (self.kept / "config.yaml").write_text(yaml.safe_dump(tree))
        self.before = contents(self.kept)

    def called(self, main: Callable, words: list[str], found: Counter) -> int:
        """Calls a program, judges how it ends, and returns its exit code."""
        code, said = called(main, words)
        self.judge(code, said, str(words), found)
        if contents(self.kept) != self.before:
            found["overwritten"] += 1
            print(f"BROKEN: a file was changed by {words}", flush=True)
            self.before = contents(self.kept)
        return code

    def judge(self, code: int, said: str, what: str, found: Counter) -> None:
        """Counts how a call has ended."""
        found["calls"] += 1
        self.shown.advance()
        fault = fault_of(said) if code else ("traceback" if TRACEBACK in said else None)
        if fault or code not in (0, 2):
            found["tracebacks" if fault == "traceback" else "unclear"] += 1
            print(f"BROKEN: {what[:1500]}: {fault}, code {code}: {said[-800:]}", flush=True)
        else:
            found["refused" if code else "accepted"] += 1

    def configurations(self, count: int, found: Counter) -> None:
        """Has configurations read."""
        from switchyard.commands import train_main

        for number in range(count):
            path = self.folder / f"config-{number}.yaml"
            path.write_text(configuration(self.base, self.draw), encoding="utf-8", errors="surrogatepass")
            if self.called(train_main, ["--config", str(path), "--print-config"], found) == 0:
                self.accepted.append(path)

    def trainings(self, count: int, found: Counter) -> None:
        """Trains two steps by accepted configurations of small models."""
        from switchyard.commands import train_main
        from switchyard.config import load

        small = [path for path in self.accepted if is_small(load(path))]
        for path in self.draw.sample(small, min(count, len(small))):
            words = ["--config", str(path), "train.steps=2", f"train.name={path.stem}"]
            words += [f"train.output_dir={self.folder / 'runs'}", "context.mode=pynative"]
            limit = limited(resource.RLIMIT_AS, own_size() + MEMORY)
            job = Forked(train_main, words, self.folder / f"{path.stem}.log", before=limit)
            self.judge(job.wait(SECONDS), job.said, path.read_text(encoding="utf-8"), found)

    def command_lines(self, count: int, found: Counter) -> None:
        """Calls all programs with right and wrong options."""
        from switchyard import commands
        from switchyard.checkpoint.store import main as checkpoint_main
        from switchyard.data.prepare import main as prepare_main
        from switchyard.planner.search import main as planner_main

        programs = {
            commands.train_main: ("--config", "--resume", "--init", "--restarted"),
            commands.eval_main: ("--checkpoint", "--json", "--trust-code"),
            commands.export_main: ("--checkpoint", "--out", "--key-file", "--trust-code"),
            commands.infer_main: (
                *("--model", "--prompt", "--prompts-file", "--image", "--value-range", "--task", "--top-k", "--json"),
                *("--max-new-tokens", "--temperature", "--top-p", "--seed", "--key-file", "--chat", "--system"),
            ),
            checkpoint_main: ("convert", "merge", "--to", "--out"),
            prepare_main: (
                *("--input", "--out", "--field", "--vocab-size", "--seq-length", "--val-fraction", "--val-path"),
                *("--format", "--shard-tokens", "--on-error", "--instructions", "--tokenizer"),
            ),
            planner_main: ("--config", "--devices", "--memory", "--vocab", "--top", "--tflops", "--failures-per-day"),
        }
        for _ in range(count):
            main = self.draw.choice(list(programs))
            words = self._words(programs[main])
            if main in (commands.train_main, planner_main) and self.draw.random() < 0.5:
                words = ["--config", str(self.kept / "config.yaml"), *words]
            if main is commands.train_main:
                words.append("--print-config")
            if main is prepare_main:
                words += ["--workers", "1"]
            if main is planner_main and "--devices" in words:
                words += ["--devices", "2"]
            self.called(main, words, found)

    def _words(self, options: tuple[str, ...]) -> list[str]:
        words: list[str] = []
        paths = [str(path) for path in self.kept.iterdir()] + [str(self.folder / "absent"), "", "/dev/null", "/proc/1"]
        texts = [str(value).replace("\0", "") for value in VALUES]
        for option in self.draw.sample(options, self.draw.randrange(len(options) // 2 + 1)):
            words.append(option)
            if self.draw.random() < 0.85:
                words.append(self.draw.choice(self.draw.choice([paths, texts])))
        for _ in range(self.draw.randrange(3)):
            section = self.draw.choice(sorted(sections()))
            key, value = self.draw.choice(sections()[section]), str(self.draw.choice(VALUES))
            value = str(likely(section, key, 1, self.draw)) if self.draw.random() < 0.7 else value
            words.append(f"{section}.{key}={value}" if self.draw.random() < 0.95 else self.draw.choice(TEXTS))
        if self.draw.random() < 0.2:
            self.draw.shuffle(words)
        return words

    def corpora(self, count: int, found: Counter) -> None:
        """Has bytes of all kinds prepared."""
        from switchyard.data.prepare import main

        for number in range(count):
            source = self.folder / f"corpus-{number}"
            source.mkdir()
            for index in range(self.draw.randrange(1, 4)):
                suffix, data = self._corpus()
                (source / f"{index}{suffix}").write_bytes(data)
            words = ["--input", str(source), "--out", str(self.folder / f"made-{number}"), "--seq-length", "8"]
            words += ["--tokenizer", self.draw.choice(["byte", "char"]), "--workers", "1"]
            words += self.draw.choice([[], [], ["--instructions"], ["--field", "a"], ["--on-error", "skip"]])
            self.called(main, words, found)
            shutil.rmtree(source), shutil.rmtree(self.folder / f"made-{number}", ignore_errors=True)

    def _corpus(self) -> tuple[str, bytes]:
        draw = self.draw
        texts = TEXTS if draw.random() < 0.1 else [text for text in TEXTS if text != "\ud800"]
        lines = "".join(f"line {number}: {draw.choice(texts)}\n" for number in range(draw.randrange(60)))
        text = lines.encode("utf-8", "surrogatepass")
        records = [draw.choice(VALUES) for _ in range(draw.randrange(1, 20))]
        rows = [to_json({draw.choice(["text", "a", "prompt", "messages"]): one}).encode() for one in records]
        jsonl = b"\n".join(rows)
        kind = draw.randrange(12)
        if kind == 0:
            return ".txt", draw.randbytes(draw.randrange(3000))
        if kind == 1:
            wide = lines.encode("utf-16", "surrogatepass")
            return ".txt", draw.choice([b"", b"\n", b"\xef\xbb\xbf", wide, text[:-1]])
        if kind in (2, 3):
            return ".jsonl", jsonl[: draw.randrange(1, len(jsonl) + 1)] if kind == 2 else jsonl
        if kind == 4:
            packed = gzip.compress(text)
            return ".txt.gz", packed[: draw.randrange(len(packed) + 1)]
        if kind == 5:
            return draw.choice([".parquet", ".zst", ".jsonl.zst", ".jsonl.gz"]), draw.choice([text, jsonl, b""])
        return ".txt", text

    def prompts(self, count: int, found: Counter) -> None:
        """Has a model continue texts of all kinds, in one process; without a model only files of prompts are read."""
        from switchyard.inference.generate import read_prompts

        for number in range(count if not (self.folder / "out").exists() else 0):
            path = self.folder / f"prompts-{number}"
            path.write_bytes(self.draw.choice([self.draw.randbytes(50), self._corpus()[1]]))
            self.called(lambda words: read_prompts(words[0]) and 0, [str(path)], found)
        if (self.folder / "out").exists():
            report = self.folder / "prompts.json"
            job = Forked(lambda words: self._prompt(count, report), [], self.folder / "prompts.log")
            code = job.wait(3000.0)
            outcomes = json.loads(report.read_text()) if report.exists() else []
            for words, outcome, said in outcomes:
                self.judge(outcome, said, words, found)
            if code or len(outcomes) != count:
                self.judge(1, job.said, f"{len(outcomes)} of {count} prompts", found)

    def _prompt(self, count: int, report: Path) -> int:
        """Writes [input, exit code, what was said] of each prompt."""
        from switchyard.inference.generate import generate
        from switchyard.inference.mindir import open_model
        from switchyard.inference.sampling import Sampling

        model, found = open_model(self.folder / "out", None, lambda line: None), []
        for _ in range(count):
            numbers = [value for value in VALUES if isinstance(value, (int, float)) and not isinstance(value, bool)]
            whole = [value for value in numbers if isinstance(value, int)]
            drawn = tuple(self.draw.choice(some) for some in (numbers, whole, numbers, whole))
            temperature, top_k, top_p, seed = self.draw.choice([(1.0, 0, 1.0, 1), (0.0, 0, 1.0, 1), drawn])
            texts = TEXTS if self.draw.random() < 0.5 else EASY
            prompts = [self.draw.choice(texts) for _ in range(self.draw.randrange(1, 4))]
            length = self.draw.choice([1, 2, 2, 4, 8, 0, -1, 2**40])
            code, said = 0, ""
            try:
                sampling = Sampling(temperature, top_k, top_p, seed)
                generate(model, prompts, length, sampling)
            except UserError as error:
                code, said = 2, f"error: {error}"
            except Exception:
                code, said = 1, traceback.format_exc()
            found.append([repr((prompts, length, temperature, top_k, top_p, seed))[:600], code, said])
            report.write_text(to_json(found))
        return 0


def is_small(config: Config) -> bool:
    """Returns whether two steps of a model take seconds."""
    model, moe, data = config.model, config.moe, config.data
    sizes = (model.hidden_size * model.num_layers, model.seq_length, moe.expert_num * 8, data.batch_size * 4)
    return config.reads_text and max(sizes) <= 256 and config.micro_batches <= 4 and config.devices == 1


def save_model(folder: Path) -> None:
    """Exports a small model (RuntimeError: that has failed)."""
    from oracles.tiny_export import save_export

    made = Forked(lambda words: save_export(folder, model={"num_layers": 1}) and 0, [], folder / "export.log")
    if made.wait() != 0:
        raise RuntimeError(made.said)


def call_everything(folder: Path, short: bool, draw: random.Random) -> list[dict]:
    """Generates all inputs, and returns the rows."""
    counts = SHORT_COUNTS if short else COUNTS
    inputs, rows = Inputs(folder, draw, Shown("inputs", sum(counts.values()))), []
    if not short:
        save_model(folder)
    for kind, count in counts.items():
        found = Counter()
        getattr(inputs, kind.replace(" ", "_"))(count, found)
        names = ("calls", "accepted", "refused", "tracebacks", "unclear", "overwritten")
        row = {"input": kind} | {name: found[name] for name in names}
        rows.append(row | {"broken": found["tracebacks"] + found["unclear"] + found["overwritten"]})
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Runs the campaign."""
    return campaign.run_campaign("inputs", __doc__, call_everything, arguments)


if __name__ == "__main__":
    sys.exit(main())
