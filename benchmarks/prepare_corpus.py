"""How much memory does a corpus need that is larger than memory? Prepared by two processes, then read by a training.

    python benchmarks/prepare_corpus.py [--short] [--gigabytes 20] [--bpe-gigabytes 1] [--folder DIR] [--json FILE]

The corpus is made of random words: JSON lines in files of 500 MB of text, compressed with zstd. Each tokenizer is a
row: bytes, whose text fills twice its size on the disk, and a BPE, which is trained first. `python -m
switchyard.data.prepare` runs in a process of its own; the resident memory of that process and of those that it starts
is read twice a second. Shared pages count in each process. `data.load_data` then opens the folder in another process,
and returns training batches of a shuffled order.
"""

import argparse
import contextlib
import json
import multiprocessing
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from workers import newest_commit, record

from switchyard.json_text import to_json

FILE_BYTES, SENTENCES, WORDS = 500_000_000, 2_000, 5_000  # of a file
IN_A_DOCUMENT = 40  # sentences, about 3 kB
EVERY = 0.5  # seconds between two readings of the memory
SHORT = 0.04  # GB: enough for `prepare` to start processes
BATCHES, BATCH_SIZE, SEQ_LENGTH = 1_000, 8, 1_024


def sentences(draw: random.Random) -> list[bytes]:
    """Returns sentences of made-up words, of which few are frequent and many are rare."""
    syllables = [consonant + vowel for consonant in "bcdfghklmnprstvw" for vowel in "aeiou"]
    known = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(WORDS)]
    weights = [1 / rank for rank in range(1, WORDS + 1)]
    made = (draw.choices(known, weights, k=draw.randint(6, 18)) for _ in range(SENTENCES))
    return [f"{' '.join(words).capitalize()}. ".encode() for words in made]


def write_file(job: tuple[str, int, int]) -> int:
    """Writes a file of JSON lines, (path, bytes of text, seed), and returns how many bytes of text it holds."""
    import zstandard

    path, size, seed = job
    draw, written = random.Random(seed), 0
    known = sentences(draw)
    with open(path, "wb") as raw, zstandard.ZstdCompressor(level=1).stream_writer(raw) as file:
        while written < size:
            text = b"".join(draw.choices(known, k=IN_A_DOCUMENT))
            file.write(b'{"text": "%b"}\n' % text)
            written += len(text)
    return written


def write_corpus(folder: Path, size: int, seed: int) -> int:
    """Writes a corpus of about `size` bytes of text, and returns how many there are."""
    folder.mkdir()
    sizes = [FILE_BYTES] * (size // FILE_BYTES) + [size % FILE_BYTES] * (size % FILE_BYTES > 0)
    jobs = [(str(folder / f"{number:03}.jsonl.zst"), one, seed + number) for number, one in enumerate(sizes)]
    with multiprocessing.get_context("spawn").Pool(min(2, len(jobs))) as pool:
        return sum(pool.imap_unordered(write_file, jobs))


def watched(command: list[str], log: Path) -> dict[str, float]:
    """Runs a command, and returns its seconds and the most memory that it and the processes it starts have held."""
    most: dict[str, float] = {"peak_mb": 0.0, "peak_mb_of_a_process": 0.0, "processes": 0}
    begun = time.perf_counter()
    with log.open("wb") as file:
        process = psutil.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            sizes = resident(process)
            now = {"peak_mb": sum(sizes), "peak_mb_of_a_process": max(sizes, default=0.0), "processes": len(sizes)}
            most = {name: max(value, now[name]) for name, value in most.items()}
            time.sleep(EVERY)
    if process.returncode:
        raise RuntimeError(log.read_text(encoding="utf-8", errors="replace")[-2000:])
    return {"seconds": time.perf_counter() - begun, **most}


def resident(process: psutil.Process) -> list[float]:
    """Returns the resident megabytes of a process and of each below it; one that has just ended is left out."""
    sizes = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in (process, *process.children(recursive=True)):
            sizes.append(one.memory_info().rss / 1e6)
    return sizes


def measure(folder: Path, tokenizer: str, gigabytes: float, seed: int) -> dict:
    """Returns the row of a tokenizer."""
    size = write_corpus(folder / "text", round(gigabytes * 1e9), seed)
    compressed = sum(path.stat().st_size for path in (folder / "text").iterdir())
    print(f"{size / 1e9:.2f} GB of text, {compressed / 1e9:.2f} GB on the disk", flush=True)
    command = [sys.executable, "-m", "switchyard.data.prepare", "--input", str(folder / "text"), "--workers", "2"]
    command += ["--out", str(folder / "corpus"), "--val-fraction", "0.001"]
    command += ["--tokenizer", "byte"] if tokenizer == "byte" else ["--vocab-size", "32000"]
    found = watched(command, folder / "prepare.log")
    shutil.rmtree(folder / "text")
    manifest = json.loads((folder / "corpus" / "manifest.json").read_text(encoding="utf-8"))
    tokens = sum(shard["tokens"] for split in ("train", "validation") for shard in manifest[split])
    row = {"tokenizer": tokenizer, "text_gb": size / 1e9, "compressed_gb": compressed / 1e9, "tokens": tokens}
    row |= found | {"mb_per_second": size / 1e6 / found["seconds"], "tokens_per_second": tokens / found["seconds"]}
    done = subprocess.run([sys.executable, __file__, "--read", str(folder / "corpus")], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    shutil.rmtree(folder / "corpus")
    return row | json.loads(done.stdout)


def read(corpus: str) -> dict[str, float]:
    """Opens a prepared corpus, as a training does, and returns the seconds and the memory of that and of batches."""
    from switchyard.config import build
    from switchyard.data import load_data

    tree = {"data": {"path": corpus, "batch_size": BATCH_SIZE}, "model": {"seq_length": SEQ_LENGTH}}
    config, before = build(tree), psutil.Process().memory_info().rss
    begun = time.perf_counter()
    batches = load_data(config).train
    opened = time.perf_counter()
    for number in range(BATCHES):
        batches.at(number)
    row = {"open_seconds": opened - begun, "batches": BATCHES, "read_seconds": time.perf_counter() - opened}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return row | {"read_mb_before": before / 1e6, "read_peak_mb": peak / 1e6}


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help=f"{SHORT} GB as bytes: seconds")
    parser.add_argument("--gigabytes", type=float, default=20.0, help="of text that becomes bytes; 0 leaves it out")
    parser.add_argument("--bpe-gigabytes", type=float, default=1.0, help="of text for a BPE; 0 leaves it out")
    parser.add_argument("--seed", type=int, default=1, help="of the text")
    parser.add_argument("--folder", help="where to work (default: the system's temporary folder)")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        print(to_json(read(args.read)))
        return
    sizes = {"byte": SHORT} if args.short else {"byte": args.gigabytes, "bpe": args.bpe_gigabytes}
    rows, commit = [], newest_commit()
    for tokenizer, gigabytes in sizes.items():
        if not gigabytes:
            continue
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows.append(measure(Path(folder), tokenizer, gigabytes, args.seed))
        print("  ".join(f"{name}: {value}" for name, value in rows[-1].items()), flush=True)
    if args.json:
        asked = "--short" if args.short else f"--gigabytes {args.gigabytes:g} --bpe-gigabytes {args.bpe_gigabytes:g}"
        command = f"python benchmarks/prepare_corpus.py {asked} --seed {args.seed}"
        record(args.json, __doc__.splitlines()[0], command, rows, commit)


if __name__ == "__main__":
    main()
