"""The joined log: whole lines of all ranks, each with its time and rank."""

from switchyard.distributed.merged_log import MergedLog, stamp


def test_lines_of_all_ranks_are_joined_as_they_come(tmp_path):
    times = iter(["T1", "T2", "T3", "T4"])
    merged = MergedLog(tmp_path, tmp_path / "all.log", now=lambda: next(times))
    (tmp_path / "worker_0.log").write_text("one\ntwo\nhal")
    (tmp_path / "worker_11.log").write_bytes(b"caf\xc3\xa9\n\xff\n")
    (tmp_path / "worker_x.log").write_text("no rank\n")
    merged.follow()
    with open(tmp_path / "worker_0.log", "a") as log:
        log.write("f\nlast")
    merged.follow()
    merged.say("restart 1 of 3")
    merged.follow(last=True)
    assert (tmp_path / "all.log").read_bytes().splitlines() == [
        b"T1 rank 0 | one",
        b"T1 rank 0 | two",
        b"T1 rank 11 | caf\xc3\xa9",
        b"T1 rank 11 | \xff",
        b"T2 rank 0 | half",
        b"T3 launcher | restart 1 of 3",
        b"T4 rank 0 | last",
    ]


def test_a_job_that_starts_again_adds_to_the_log(tmp_path):
    for _ in range(2):
        (tmp_path / "worker_0.log").write_text("begins\n")
        MergedLog(tmp_path, tmp_path / "all.log", now=lambda: "T").follow()
    assert (tmp_path / "all.log").read_text() == 2 * "T rank 0 | begins\n"


def test_a_log_that_cannot_be_written_is_told_once(tmp_path):
    told = []
    merged = MergedLog(tmp_path, tmp_path / "missing" / "all.log", told.append)
    for _ in range(2):
        with open(tmp_path / "worker_0.log", "a") as log:
            log.write("line\n")
        merged.follow()
    assert len(told) == 1 and "all.log': No such file or directory; the logs of the ranks are not joined" in told[0]


def test_times_sort_as_text():
    assert len(stamp()) == len("2026-01-31T12:00:00.0Z") and stamp() <= stamp()
