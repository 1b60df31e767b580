"""Export by several processes: degrees that are refused, parts that are swapped, and files that answer as one does."""

import json
import shutil

import numpy as np
import pytest
from mindspore import Tensor
from oracles.jobs import SCRIPT, start
from oracles.tiny_export import quiet, save_run

from switchyard.checkpoint.reshard import convert
from switchyard.config import build
from switchyard.distributed.expert_shard import ExpertShard
from switchyard.distributed.placement import ParallelDims
from switchyard.distributed.processes import Processes
from switchyard.errors import UserError
from switchyard.inference import manifest as manifests
from switchyard.inference.export import export
from switchyard.inference.export_streamed import export_streamed
from switchyard.inference.generate import generate
from switchyard.inference.mindir import open_model
from switchyard.inference.sampling import Sampling
from switchyard.inference.sharded import RankManifest, ShardedManifest, is_sharded, open_export, verified
from switchyard.training.evaluate_keys import degrees_of_export

MOE = {"router": "top_k", "expert_num": 4, "num_experts_chosen": 2}
PROMPTS = ["the gates", "line", "a"]
SEQ2SEQ = {"type": "seq2seq", "num_layers": 1, "seq_length": 16}


def degrees(overrides, count=2, **tree):
    """What `count` processes export a checkpoint of these keys with."""
    return degrees_of_export(
        build({"moe": MOE, "data": {"batch_size": 8}} | tree), overrides, count, lambda context: "Ascend"
    ).parallel


def test_processes_share_the_experts():
    found = degrees(["parallel.expert_parallel=4"], count=4, parallel={"data_parallel": 8, "expert_parallel": 2})
    assert (found.data_parallel, found.expert_parallel, found.model_parallel) == (4, 4, 1)


@pytest.mark.parametrize(
    ("overrides", "tree", "says"),
    [
        (
            [],
            {},
            "parallel.expert_parallel: 1; 2 processes share the experts of an export and nothing else: parallel.ex",
        ),
        (["parallel.model_parallel=2"], {}, "parallel.expert_parallel: 1; 2 processes share the experts"),
        ([], {"moe": {}}, "moe.expert_num: 1; there are no experts that processes could share"),
        (["parallel.optimizer_shard=1"], {}, "parallel.optimizer_shard: 1; evaluation has no optimizer"),
        ([], {"model": {"type": "vision"}}, "model.type: vision; such a network is exp"),
    ],
)
def test_other_degrees_are_refused(overrides, tree, says):
    with pytest.raises(UserError, match=says):
        degrees(overrides, **tree)


def test_experts_are_numbered_from_the_first_of_a_process():
    """Rank 1 of 2 holds experts 3, 4 and 5 of 6; number 6 is none."""
    shard = ExpertShard(6, Processes(1, 2, ParallelDims(2, 2)))
    found = shard.own(Tensor(np.array([0, 3, 5, 2, 6, 4], np.int32)))
    assert found.asnumpy().tolist() == [3, 0, 2, 3, 3, 1]


@pytest.fixture
def two_ranks(tmp_path):
    """The directory of an export of two ranks, whose files hold no graphs."""
    figures = {"vocab_size": 9, "num_layers": 2, "hidden_size": 16, "num_heads": 4, "n_kv_heads": 2, "head_size": 4}
    figures |= {"expert_num": 4, "num_experts_chosen": 2, "moe_layers": [1], "parameters": 1000}
    parity = {f"{part}max_abs_difference": 1e-6 for part in ("", "prefill_", "decode_")}
    parity |= {"bound": 1e-4, "prefill_positions": 3, "decode_positions": 12, "not_reached": []}
    source = {"checkpoint": "runs/a", "step": 1, "mindspore": "2.9.0", "switchyard": "0"}
    fields = {"model": figures | {"compute_dtype": "float32"}, "encryption": None, "parity": parity, "source": source}
    limits = {"max_length": 24, "prompt_multiple": 8, "dynamic": ["batch"]}
    graphs = {name: f"{name}.mindir" for name in ("prefill", "decode")}
    for rank in range(2):
        folder = tmp_path / f"rank_{rank}"
        folder.mkdir()
        for file in graphs.values():
            (folder / file).write_bytes(bytes([rank]) * 99)
        numbers = {"rank": rank, "ranks": 2, "files": manifests.fingerprints(folder)}
        part = RankManifest(graphs=graphs, limits=limits, **fields, **numbers).signed()
        (folder / "manifest.json").write_text(part.model_dump_json())
    listed = {name: manifests.fingerprint(tmp_path / name) for name in ("rank_0/manifest.json", "rank_1/manifest.json")}
    whole = ShardedManifest(files=listed, ranks=2, **fields).signed()
    (tmp_path / "manifest.json").write_text(whole.model_dump_json())
    return tmp_path


def test_a_rank_verifies_its_own_part(two_ranks):
    whole = manifests.read(two_ranks, ShardedManifest)
    shutil.rmtree(two_ranks / "rank_0")  # of another node
    folder, manifest = verified(two_ranks, whole, 1)
    assert (folder.name, manifest.rank, manifest.ranks) == ("rank_1", 1, 2)
    (folder / "decode.mindir").write_bytes(bytes([1]) * 98 + b"x")
    with pytest.raises(UserError, match=r"decode.mindir' was altered: its sha256 differs"):
        verified(two_ranks, whole, 1)


def test_parts_that_changed_places_are_refused(two_ranks):
    whole = manifests.read(two_ranks, ShardedManifest)
    for old, new in (("rank_0", "other"), ("rank_1", "rank_0"), ("other", "rank_1")):
        (two_ranks / old).rename(two_ranks / new)
    with pytest.raises(UserError, match=r"rank_0/manifest.json' was altered"):
        verified(two_ranks, whole, 0)
    with pytest.raises(UserError, match=r"lists no rank_2/manifest.json"):
        verified(two_ranks, whole, 2)


def test_one_process_does_not_run_the_parts(two_ranks, monkeypatch):
    assert is_sharded(two_ranks) and not any(is_sharded(two_ranks / name) for name in ("rank_0", "none"))
    with pytest.raises(UserError, match=r"is the export of 2 ranks; start 2 processes by a launch script: --infer"):
        open_export(two_ranks, say=quiet)
    with pytest.raises(UserError, match="is not a switchyard export; give the folder"):
        open_model(two_ranks / "rank_0", say=quiet)
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    monkeypatch.setenv("MS_WORKER_NUM", "4")
    with pytest.raises(UserError, match="is the export of 2 ranks, 4 processes run: start 2"):
        open_export(two_ranks, say=quiet)


def job(folder, name, *arguments):
    """Runs two processes to their end; returns what rank 0 has written."""
    logs = folder / f"logs-{name}"
    done = start(
        ["bash", str(SCRIPT), *map(str, arguments[:4]), "--devices", "2", "--log-dir", str(logs), *arguments[4:]]
    )
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, out + err
    return (logs / "worker_0.log").read_text()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("model", [{}, SEQ2SEQ], ids=["decoder", "encoder-decoder"])
def test_two_processes_export_and_infer_as_one_does(model, tmp_path, graph):
    """A checkpoint of two ranks: a part for each rank, the whole tensor by tensor, and the whole of one process."""
    save_run(tmp_path, model)
    run, merged = tmp_path / "sharded", tmp_path / "merged"
    convert(tmp_path / "runs/tiny/checkpoints/step-00000001", "{data_parallel: 2, expert_parallel: 2}", run)
    convert(run, "{}", merged)
    longest = "export.max_length=24"
    said = job(tmp_path, "export", "--export", run, "--out", tmp_path / "parts", "parallel.expert_parallel=2", longest)
    assert "parity: largest difference of a logit" in said
    assert manifests.read(tmp_path / "parts", ShardedManifest).parity.max_abs_difference < 1e-5
    export(merged, tmp_path / "one", [longest], say=quiet)
    export_streamed(run, tmp_path / "streamed", [longest], say=quiet)
    one, streamed = open_model(tmp_path / "one", say=quiet), open_model(tmp_path / "streamed", say=quiet)
    ids = [one.encode(prompt) for prompt in PROMPTS]
    assert (one.prefill(ids)[0] == streamed.prefill(ids)[0]).all()
    greedy, _ = generate(one, PROMPTS, 12, Sampling(temperature=0))
    assert [found.text for found in generate(streamed, PROMPTS, 12, Sampling(temperature=0))[0]] == [
        found.text for found in greedy
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ["--prompts-file", str(tmp_path / "prompts.txt"), "--json", "--max-new-tokens", "12", "--temperature", "0"]
    said = job(tmp_path, "infer", "--infer", tmp_path / "parts", "--log-dir", tmp_path / "unused", "--", *words)
    found = json.loads(next(line for line in said.splitlines() if line.startswith("[")))
    assert [answer["text"] for answer in found] == [answer.text for answer in greedy]
