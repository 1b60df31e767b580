"""Interleaved timing: every contender runs once per round, so what else the machine does hits all of them alike."""

import statistics
import time


def interleave(contenders: dict, rounds: int, synchronize=None) -> dict[str, list[float]]:
    """Seconds of each contender (name -> function without arguments) in each of `rounds` rounds, after two warm-ups."""
    seconds = {name: [] for name in contenders}
    for round_number in range(rounds + 2):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if synchronize:
                synchronize()
            if round_number >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], base: str) -> dict[str, tuple[float, float, float, float]]:
    """Name -> (smallest ms, median ms, ratio of the smallest to base's, ratio of the medians)."""
    low, middle = min(seconds[base]), statistics.median(seconds[base])
    return {
        name: (min(s) * 1e3, statistics.median(s) * 1e3, min(s) / low, statistics.median(s) / middle)
        for name, s in seconds.items()
    }


def print_table(title: str, rows: dict[str, tuple[float, float, float, float]], base: str) -> None:
    """One line a contender."""
    print(f"{title}   (ratio to: {base})")
    print(f"  {'':34}{'min ms':>9}{'median':>9}{'ratio':>8}{'median':>8}")
    for name, (low, middle, ratio, middle_ratio) in rows.items():
        print(f"  {name:34}{low:9.2f}{middle:9.2f}{ratio:8.3f}{middle_ratio:8.3f}", flush=True)
