"""Tables of docs/performance.md and docs/data.md from what benchmarks have measured.

scripts/renew_docs.py writes them between the marks `<!-- measured NAME: begin -->` and `<!-- measured NAME: end -->`.
Results are decode_step.json, train_step.json, scaling.json, prepare_corpus.json and speed_to_quality*.json of
benchmarks/results, and NAME_amd.json of a second processor; a part that was not measured has no rows.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"
FILES = {  # the others are of scaling
    "decode": "decode_step",
    "step": "train_step",
    "corpus": "prepare_corpus",
    "quality": "speed_to_quality",
    "quality_cpu": "speed_to_quality_cpu",
}
PLACES = {  # steps and seconds whose losses are shown
    "quality": ((1000, 3000, 6000, 10000), (200, 400, 500, 600)),
    "quality_cpu": ((2000, 3000, 4500), (60, 80)),
}
ORIGINS = {"corpus": "once", "quality": "turns", "quality_cpu": "turns"}  # of the others "machine"
OTHER = "_amd"  # ends the names of what was measured on the other processor
OURS, EXPERTS, TRAFFIC = "conditional layer", "expert matrix products", "traffic"
WORDS = {
    "en": {
        "decode": ("Work", "Switchyard", "plain PyTorch loop", "of the loop", "Hugging Face Mixtral", "of it"),
        "work": ("{size}: decode, batch {batch}", "{size}: prefill of 1,024 tokens"),
        "step": ("Step", "Switchyard, ms", "best PyTorch, ms", "of PyTorch", "its way"),
        "kinds": {"dense": "{size}, dense", "moe": "{size}, 8 experts"},
        "layers": (
            "Rows",
            "Width",
            "Experts",
            "k",
            "Layer, ms",
            "best PyTorch, ms",
            "of PyTorch",
            "its products, ms",
            "weights, ms",
        ),
        "memory": ("Model", "Peak of a step, MB", "at a second start, MB", "needed, MB", "of it, first", "second"),
        "compile": ("Layers", "Experts", "Compile, s of CPU time", "a layer", "second start, s"),
        "corpus": (
            "Tokenizer",
            "Text, GB",
            "Tokens",
            "Time, min",
            "Text, MB/s",
            "Memory of all processes, MB",
            "of the largest, MB",
            "Memory of a training's reader, MB",
        ),
        "quality": ("Model", "A step", "Trained", "Loss after {} steps", "after {} s", "Dense model's last loss after"),
        "reached": "{steps:,.0f} steps, {seconds:.0f} s",
        "turns": "{machine}; {versions}; {date}. One model a device at a time.",
        "cases": {},
        "machine": "{machine}; {versions}; {date}, commit {commit}. Smallest times of contenders in turn.",
        "once": "{machine}; {versions}; {date}, commit {commit}. Measured once; memory is the most that was resident.",
        "tokens": "{:,.0f} tokens/s",
    },
    "zh": {
        "decode": ("工作", "Switchyard", "PyTorch 循环", "与循环之比", "Hugging Face Mixtral", "与之比"),
        "work": ("{size}：解码，批大小 {batch}", "{size}：1,024 个词元的预填充"),
        "step": ("训练步", "Switchyard，ms", "最快的 PyTorch，ms", "与 PyTorch 之比", "其方式"),
        "kinds": {"dense": "{size}，稠密", "moe": "{size}，8 个专家"},
        "layers": (
            "行数",
            "宽度",
            "专家数",
            "k",
            "层，ms",
            "最快的 PyTorch，ms",
            "与 PyTorch 之比",
            "其矩阵乘，ms",
            "权重读写，ms",
        ),
        "memory": ("模型", "一步的峰值，MB", "第二次启动时，MB", "所需，MB", "之比，第一次", "第二次"),
        "compile": ("层数", "专家数", "编译，CPU 秒", "每层", "第二次启动，秒"),
        "corpus": (
            "分词器",
            "文本，GB",
            "词元",
            "时间，分钟",
            "文本，MB/s",
            "所有进程的内存，MB",
            "最大进程的内存，MB",
            "训练读取时的内存，MB",
        ),
        "quality": ("模型", "一步", "训练", "{} 步后的损失", "{} 秒后", "达到稠密模型最后的损失"),
        "reached": "{steps:,.0f} 步，{seconds:.0f} 秒",
        "turns": "{machine}；{versions}；{date}。每台设备同时只训练一个模型。",
        "cases": {
            "dense": "稠密",
            "2 experts, 1 chosen": "2 个专家，选 1 个",
            "8 experts, 1 chosen": "8 个专家，选 1 个",
            "32 experts, 1 chosen": "32 个专家，选 1 个",
            "128 experts, 1 chosen": "128 个专家，选 1 个",
            "4 experts of half the width, 2 chosen": "4 个一半宽度的专家，选 2 个",
            "16 experts of half the width, 2 chosen": "16 个一半宽度的专家，选 2 个",
            "16 halves, 2 chosen, capacity factor 1.25": "16 个一半宽度的专家，选 2 个，容量系数 1.25",
            "64 experts of half the width, 2 chosen": "64 个一半宽度的专家，选 2 个",
            "8 experts in layer 0, 1 chosen": "第 0 层 8 个专家，选 1 个",
            "32 experts in layer 0, 1 chosen": "第 0 层 32 个专家，选 1 个",
            "64 quarters in layer 0, 3 chosen, and a shared one": "第 0 层 64 个四分之一宽度，选 3 个，加一个共享专家",
            "8 experts, 1 chosen, capacity factor 1.25": "8 个专家，选 1 个，容量系数 1.25",
            "8 experts, 1 chosen, gates times 8": "8 个专家，选 1 个，门控乘以 8",
            "32 experts by hash": "32 个专家，按哈希",
            "dense, second run": "稠密，第二次运行",
            "dense, third run": "稠密，第三次运行",
            "2 experts, second run": "2 个专家，第二次运行",
            "8 experts, second run": "8 个专家，第二次运行",
            "16 halves, second run": "16 个一半宽度的专家，第二次运行",
            "16 halves, third run": "16 个一半宽度的专家，第三次运行",
        },
        "machine": "{machine}；{versions}；{date}，提交 {commit}。各方轮流运行，取最短时间。",
        "once": "{machine}；{versions}；{date}，提交 {commit}。测量一次；内存为常驻内存的最大值。",
        "tokens": "{:,.0f} 词元/s",
    },
}


def render(name: str, language: str = "en") -> str:
    """Returns a part as Markdown: decode, step, layers, memory, compile, corpus, quality or quality_cpu.

    `step_amd` and the like are the same on another processor, whose results lie beside the first ones.
    """
    part = name.removesuffix(OTHER)
    file, words = FILES.get(part, "scaling") + name[len(part) :], WORDS[language]
    found = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
    head = quality_head(*PLACES[part], words) if part in PLACES else words[part]
    rows = list(PARTS[part](found["rows"], words))
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    origin = words[ORIGINS.get(part, "machine")]
    return "\n".join([*lines, "", origin.format(**{**found, "versions": versions})])


def quality_head(steps: tuple, seconds: tuple, words: dict) -> tuple[str, ...]:
    """Returns the heads of the columns: losses after so many steps, and after so many seconds of training."""
    model, step, trained, after_steps, after_seconds, reached = words["quality"]
    after = [after_steps.format(f"{steps[0]:,}"), *(f"{count:,}" for count in steps[1:])]
    after += [after_seconds.format(count) for count in seconds]
    return model, step, trained, *after, reached


def quality(steps: tuple, seconds: tuple, rows: list[dict], words: dict) -> Iterator[tuple[str, ...]]:
    """Yields a row for each model; a loss between two evaluations is interpolated."""
    for row in rows:
        pace = row["tokens_of_step"] / row["tokens_per_second"]
        losses = [loss_at(row["curve"], 0, count) for count in steps]
        losses += [loss_at(row["curve"], 1, count) for count in seconds]
        reached = ""
        if row["steps_to_dense"] is not None:
            reached = words["reached"].format(steps=row["steps_to_dense"], seconds=row["seconds_to_dense"])
        name = words["cases"].get(row["name"], row["name"])
        yield name, f"{1e3 * pace:.1f} ms", f"{row['seconds']:.0f} s", *losses, reached


def loss_at(curve: list, column: int, place: float) -> str:
    """Returns the loss of a curve of [step, seconds, loss] at a step (column 0) or second (1); empty: beyond it."""
    columns = list(zip(*curve))
    loss = np.interp(place, columns[column], columns[2], left=np.nan, right=np.nan)
    return "" if np.isnan(loss) else f"{loss:.3f}"


def decode(rows: list[dict], words: dict) -> Iterator[tuple[str, ...]]:
    """Yields a row for each size and batch; ratios are of tokens a second."""
    for size, batch in dict.fromkeys((row["size"], row["batch"]) for row in rows):
        least = {row["contender"]: row["min_ms"] for row in rows if (row["size"], row["batch"]) == (size, batch)}
        tokens = batch or 1024
        loops = [ms for name, ms in least.items() if name.startswith("torch plain") and not name.endswith("dense")]
        cells = [words["work"][batch == 0].format(size=size, batch=batch), rate(tokens, least["switchyard"], words)]
        for peer in (min(loops, default=None), least.get("torch mixtral")):
            cells += ["", ""] if peer is None else [rate(tokens, peer, words), f"{peer / least['switchyard']:.2f}"]
        yield tuple(cells)


def rate(tokens: int, ms: float, words: dict) -> str:
    """Returns tokens a second as text."""
    return words["tokens"].format(1e3 * tokens / ms)


def steps(rows: list[dict], words: dict) -> Iterator[tuple[str, ...]]:
    """Yields a row for each size, dense and conditional."""
    for size in dict.fromkeys(row["size"] for row in rows):
        least = {row["contender"].removeprefix(f"{size} "): row["min_ms"] for row in rows if row["size"] == size}
        for kind, text in words["kinds"].items():
            ours = least[f"switchyard {kind}"]
            peers = {name: ms for name, ms in least.items() if name.startswith(f"torch {kind}")}
            best = min(peers, key=peers.get, default=None)
            cells = ("", "", "")
            if best is not None:
                cells = (f"{peers[best]:.1f}", f"{ours / peers[best]:.2f}", best.removeprefix(f"torch {kind} "))
            yield (text.format(size=size), f"{ours:.1f}", *cells)


def layers(rows: list[dict], words: dict) -> Iterator[tuple[str, ...]]:
    """Yields a row for each shape of the layer, once."""
    measured = [row for row in rows if "shape" in row]
    for shape in dict.fromkeys(row["shape"] for row in measured):
        least = {}
        for row in measured:
            if row["shape"] == shape:
                least[row["contender"]] = min(row["min_ms"], least.get(row["contender"], row["min_ms"]))
        count, wide, experts, choices = shape.split(",")
        ways = [ms for name, ms in least.items() if name.startswith("torch ")]
        peer = ("", "") if not ways else (f"{min(ways):.1f}", f"{least[OURS] / min(ways):.2f}")
        floors = tuple(f"{least[name]:.1f}" for name in (EXPERTS, TRAFFIC))
        yield (f"{int(count):,}", wide, experts, choices, f"{least[OURS]:.1f}", *peer, *floors)


def memory(rows: list[dict], words: dict) -> Iterator[tuple[str, ...]]:
    """Yields a row for each model."""
    for row in rows:
        if row["part"] == "memory":
            sizes = (row["peak"], row["second_peak"], row["planned"])
            of_it = (f"{peak / row['planned']:.2f}" for peak in sizes[:2])
            yield row["size"], *(f"{size / 1e6:,.0f}" for size in sizes), *of_it


def compiled(rows: list[dict], words: dict) -> Iterator[tuple[str, ...]]:
    """Yields a row for each number of layers and experts."""
    for row in rows:
        if row["part"] == "compile":
            each = row["seconds"] / row["layers"]
            numbers = (str(row["layers"]), str(row["experts"]))
            yield *numbers, f"{row['seconds']:.1f}", f"{each:.2f}", f"{row['second']:.1f}"


def corpora(rows: list[dict], words: dict) -> Iterator[tuple[str, ...]]:
    """Yields a row for each corpus that was prepared."""
    for row in rows:
        sizes = (row["peak_mb"], row["peak_mb_of_a_process"], row["read_peak_mb"])
        speed = (f"{row['seconds'] / 60:.1f}", f"{row['mb_per_second']:.1f}")
        yield row["tokenizer"], f"{row['text_gb']:.1f}", f"{row['tokens']:,}", *speed, *(f"{mb:,.0f}" for mb in sizes)


PARTS = {"decode": decode, "step": steps, "layers": layers, "memory": memory, "compile": compiled, "corpus": corpora}
PARTS |= {name: partial(quality, *places) for name, places in PLACES.items()}
