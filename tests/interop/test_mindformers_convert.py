"""YAML files of MindFormers as configurations of this package: hand-typed files, what they mean, what is left."""

import sysconfig
from pathlib import Path

import pytest
import yaml

from switchyard import cli
from switchyard.config import build, load
from switchyard.config.loader import read_sections
from switchyard.errors import UserError
from switchyard.interop.mindformers.__main__ import main
from switchyard.interop.mindformers.convert import convert, report
from switchyard.interop.mindformers.reader import UNKNOWN
from switchyard.optional import is_installed
from switchyard.training.schedule import learning_rate

# An older model of MindFormers, whose experts stand in `moe_config`; comments and spelling as people write them.
OLDER = """
seed: 42
output_dir: './output'
run_mode: 'train'
use_parallel: True
runner_config:
  epochs: 2
  batch_size: 2
  sink_mode: True
optimizer:
  type: AdamW
  betas: [0.9, 0.95]
  eps: 1.e-8
  weight_decay: 0.1
lr_schedule:
  type: CosineWithWarmUpLR
  learning_rate: 4.e-4
  lr_end: 1.e-5
  warmup_lr_init: 1.e-4
  warmup_steps: 3
  total_steps: 99
runner_wrapper:
  type: MFTrainOneStepCell
  scale_sense: 1.0
  use_clip_grad: True
  max_grad_norm: 0.5
parallel:
  parallel_mode: 1
  enable_parallel_optimizer: True
parallel_config:
  data_parallel: &dp 4
  model_parallel: 2
  expert_parallel: 2
  pipeline_stage: 1
  micro_batch_num: 16
  use_seq_parallel: True
  vocab_emb_dp: True
  gradient_aggregation_group: 4
moe_config:
  expert_num: 8
  capacity_factor: 1.5
  num_experts_chosen: 2
  routing_policy: "TopkRouterV2"
  enable_sdrop: True
  aux_loss_types: ["expert"]
  aux_loss_factors: [0.01]
  z_loss_factor: 0.001
  first_k_dense_replace: 1
  shared_expert_num: 1
  colour: red
model:
  model_config:
    type: LlamaConfig
    num_layers: 4
    hidden_size: 64
    num_heads: 8
    n_kv_heads: 4
    vocab_size: 32000
    seq_length: 128
    rms_norm_eps: 1.0e-5
    theta: 10000.0
    compute_dtype: "bfloat16"
    softmax_compute_type: "float32"
callbacks:
  - type: MFLossMonitor
    per_print_times: 10
  - type: CheckpointMonitor
    save_checkpoint_steps: 1000
    keep_checkpoint_max: 3
"""

# A newer model, whose experts stand in `model_config` under the names of Hugging Face.
NEWER = """
use_legacy: False
model:
  model_config:
    num_hidden_layers: 6
    hidden_size: 64
    num_attention_heads: 8
    num_key_value_heads: 4
    intermediate_size: 256
    hidden_act: "silu"
    seq_length: 128
    rope_theta: 1000000.0
    n_routed_experts: 16
    num_experts_per_tok: 4
    moe_intermediate_size: 32
    moe_shared_expert_intermediate_size: 64
    n_group: 4
    topk_group: 2
    scoring_func: sigmoid
    norm_topk_prob: True
    routed_scaling_factor: 2.5
    moe_router_enable_expert_bias: True
    moe_router_bias_update_rate: 0.0001
    moe_router_load_balancing_type: "seq_aux_loss"
    moe_aux_loss_coeff: 0.0001
    first_k_dense_replace: 2
    kv_lora_rank: 512
    moe_grouped_gemm: True
    flavour: strange
"""


def converted(text: str):
    return convert(yaml.safe_load(text))


def test_experts_of_an_older_model():
    moe = build(converted(OLDER).tree).moe
    assert (moe.expert_num, moe.num_experts_chosen, moe.capacity_factor, moe.drop_order) == (8, 2, 1.5, "token")
    assert (moe.router, moe.router.options.norm_topk_prob) == ("top_k", True)
    assert (moe.aux_loss_factor, moe.z_loss_factor, moe.shared_expert_num) == (0.01, 0.001, 1)
    assert moe.layers == [1, 2, 3]


def test_network_and_degrees_of_an_older_model():
    config = build(converted(OLDER).tree)
    model, parallel = config.model, config.parallel
    assert (model.num_layers, model.hidden_size, model.num_heads, model.n_kv_heads) == (4, 64, 8, 4)
    assert (model.norm_eps, model.theta, model.compute_dtype, model.seq_length) == (1e-5, 1e4, "bfloat16", 128)
    assert (parallel.data_parallel, parallel.model_parallel, parallel.expert_parallel) == (4, 2, 2)
    assert (parallel.pipeline_stage, parallel.micro_batch_num) == (1, 1)  # read in pipelines alone, there as here
    assert (parallel.sequence_parallel, parallel.optimizer_shard) == (True, 1)


def test_run_of_an_older_model():
    config = build(converted(OLDER).tree)
    optimizer, train = config.optimizer, config.train
    assert config.data.batch_size == 8  # MindFormers counts those of a data-parallel shard
    assert (optimizer.beta2, optimizer.weight_decay, optimizer.clip_grad) == (0.95, 0.1, 0.5)
    assert (train.seed, train.log_every, train.checkpoint_every, train.keep_checkpoints) == (42, 10, 1000, 3)


def test_rates_are_those_of_mindformers():
    """Update g from 0: init + (peak - init) g / W', then a cosine from W' to T'; the formula of CosineWithWarmUpLR."""
    from math import cos, pi

    config = build(converted(OLDER).tree)
    for update in (0, 1, 2, 3, 50, 98, 99, 120):
        if update < 3:
            rate = 1e-4 + 3e-4 * update / 3
        else:
            rate = 1e-5 + 3.9e-4 * 0.5 * (1 + cos(pi * min(1, (update - 3) / 96)))
        assert learning_rate(config, update + 1) == pytest.approx(rate, rel=1e-9), update


def test_a_warm_up_from_0_comes_one_step_earlier_and_says_so():
    found = converted("model: {}\nlr_schedule: {learning_rate: 1.e-3, warmup_steps: 10, total_steps: 100}")
    assert found.tree["schedule"]["warmup_steps"] == 10
    assert "lr_schedule.warmup_lr_init" in {one.key for one in found.left}


def test_softmax_scores_are_limited_to_groups_too():
    moe = {"expert_num": 8, "num_experts_chosen": 2, "routing_policy": "TopkRouterV2", "topk_method": "noaux_tc"}
    found = convert({"moe_config": moe | {"n_group": 4, "topk_group": 2}})
    router = build(found.tree).moe.router
    assert (router, router.options.n_group, router.options.topk_group) == ("top_k", 4, 2)
    found = converted(NEWER.replace("sigmoid", "softmax"))
    router = build(found.tree).moe.router
    assert (router, router.options.n_group, router.options.topk_group) == ("top_k", 4, 2)


def test_a_newer_model():
    config = build(converted(NEWER).tree)
    moe, router = config.moe, config.moe.router.options
    assert (moe.expert_num, moe.num_experts_chosen, moe.moe_intermediate_size) == (16, 4, 32)
    assert (moe.router, router.n_group, router.topk_group, router.topk_bias_update_rate) == ("sigmoid", 4, 2, 0.0001)
    assert (router.norm_topk_prob, router.routed_scaling_factor) == (True, 2.5)
    assert (moe.losses, moe.aux_loss_factor, moe.dispatch) == ({"sequence": 0.0001}, 0.0, "dropless")
    assert (moe.shared_expert_num, moe.layers) == (2, [2, 3, 4, 5])
    assert (config.model.activation, config.model.theta, config.model.n_kv_heads) == ("swiglu", 1e6, 4)


def test_the_file_of_the_repository_means_its_quickstart():
    """config/mindformers/quickstart.yaml against config/quickstart.yaml."""
    folder = Path(__file__).parents[2] / "config"
    found = convert(read_sections(folder / "mindformers/quickstart.yaml"))
    theirs, own = build(found.tree), load(folder / "quickstart.yaml", ["train.steps=200"])
    assert theirs.model == own.model
    assert theirs.moe == own.moe
    assert (theirs.optimizer, theirs.data) == (own.optimizer, own.data)
    for step in (1, 50, 100, 150, 200):
        assert learning_rate(theirs, step) == pytest.approx(learning_rate(own, step), rel=1e-9)
    assert [one.key for one in found.left if one.why == UNKNOWN] == []


@pytest.mark.parametrize(("text", "unknown"), [(OLDER, "moe_config.colour"), (NEWER, "model_config.flavour")])
def test_unknown_keys_are_listed_by_name(text, unknown):
    lines = report(converted(text))
    assert f"unknown: {unknown}" in lines
    assert [line for line in lines if line.startswith("unknown: ")] == [f"unknown: {unknown}"]


def test_keys_without_counterpart_are_listed_with_the_reason():
    left = {one.key: one.why for one in converted(NEWER).left}
    assert left["model_config.kv_lora_rank"] == "no latent attention"
    assert "speed" in left["model_config.moe_grouped_gemm"]


def test_no_key_is_dropped_without_a_word():
    """Each key of a file is written, listed as without counterpart or unknown, or as decided here."""
    tree = yaml.safe_load(OLDER)
    tree["context"] = {"device_target": "Ascend", "max_device_memory": "58GB", "colour": 1}
    tree["recompute_config"] = {"recompute": True, "mp_comm_recompute": True}
    tree["profile"], tree["flavour"] = True, "strange"
    found = convert(tree)
    listed = {one.key for one in found.left} | set(found.decided)
    assert {"context.colour", "profile", "flavour", "runner_config.epochs", "model_config.vocab_size"} <= listed
    assert {"context.max_device_memory", "recompute_config.mp_comm_recompute"} <= listed
    assert {"parallel_config.vocab_emb_dp", "runner_config.sink_mode", "parallel_config.micro_batch_num"} <= listed
    assert found.tree["parallel"]["recompute"] is True


@pytest.mark.parametrize(
    ("moe", "left"),
    [
        ({"routing_policy": "TopkRouterV1"}, "routing_policy"),
        ({"balance_via_topk_bias": True}, "balance_via_topk_bias"),
        ({"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}, "topk_method"),
        ({"aux_loss_types": ["device"], "aux_loss_factors": [0.1]}, "aux_loss_types"),
        ({"comp_comm_parallel": True}, "comp_comm_parallel"),
        ({"enable_cold_hot_expert": True}, "enable_cold_hot_expert"),
    ],
)
def test_what_experts_of_mindformers_do_otherwise_is_listed(moe, left):
    found = convert({"moe_config": {"expert_num": 8, "routing_policy": "TopkRouterV2", **moe}})
    assert [one.key for one in found.left] == [f"moe_config.{left}"]


def test_no_capacity_means_dropless():
    moe = convert({"moe_config": {"expert_num": 8, "capacity_factor": -1.0, "routing_policy": "TopkRouterV2"}}).tree[
        "moe"
    ]
    assert moe["dispatch"] == "dropless"
    assert "capacity_factor" not in moe


def test_what_does_not_train_here_is_said_in_one_line():
    """MindFormers shards experts over model shards too; here expert_parallel divides data_parallel."""
    found = convert({"parallel_config": {"data_parallel": 1, "model_parallel": 4, "expert_parallel": 4}})
    assert report(found)[-2] == ("to be changed: parallel.expert_parallel: 4; must divide moe.expert_num (1)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("moe_config: [1]", "moe_config: [1]; must be a mapping of keys"),
        ("moe_config: {expert_num: many}", "moe_config.expert_num: 'many'; must be of type int"),
        ("moe_config: {expert_num: true}", "moe_config.expert_num: True; must be of type int"),
        ("model: {model_config: {num_layers: 2, num_hidden_layers: 3}}", "the same key is 2 as 'num_layers'"),
        ("moe_config: {aux_loss_types: [expert]}", "must have one factor for each of"),
        ("optimizer: {type: AdamW}", "no section of model, moe_config, parallel_config"),
        ("model: {}\ncallbacks: 3", "callbacks: 3; must be a list of mappings with a type"),
        ("model: {}\noptimizer: {betas: [0.9]}", "optimizer.betas: [0.9]; must be two numbers"),
    ],
)
def test_bad_values_get_one_line(text, message):
    with pytest.raises(UserError) as caught:
        converted(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_writes_a_file_that_trains(tmp_path, capsys):
    source, out = tmp_path / "mf.yaml", tmp_path / "own.yaml"
    source.write_text(OLDER)
    assert cli.run(main, ["convert-config", str(source), "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "unknown: moe_config.colour" in shown.err.splitlines()
    assert build(yaml.safe_load(out.read_text())).moe.expert_num == 8
    assert "# not translated: moe_config.colour: 'red'; unknown key" in out.read_text()
    assert cli.run(main, ["convert-config", str(source), "--out", str(out)]) == 2  # nothing is overwritten
    assert capsys.readouterr().err.startswith("error: --out: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("moe_config: {expert_num: [", "line 1: broken YAML"),
        ("moe_config: !!python/name:os.system", "broken YAML"),
        ("just text", "holds a str; expected sections"),
    ],
)
def test_bad_yaml_gets_one_line_and_exit_code_2(text, message, tmp_path, capsys):
    source = tmp_path / "mf.yaml"
    source.write_text(text)
    assert cli.run(main, ["convert-config", str(source)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.skipif(not is_installed("mindformers"), reason="needs mindformers: pip install mindformers==1.9.0")
def test_files_that_come_with_mindformers_hold_no_unknown_key():
    """Its package brings YAML files of its models; those for training and those for inference."""
    folder = Path(sysconfig.get_path("purelib")) / "configs"
    paths = [path for path in sorted(folder.rglob("*.yaml")) if "convert_config" not in path.parts]
    assert len(paths) > 10
    found = {path.name: convert(read_sections(path)) for path in paths}
    unknown = {name: [one.key for one in file.left if one.why == UNKNOWN] for name, file in found.items()}
    assert {name: keys for name, keys in unknown.items() if keys} == {}
    assert found["pretrain_qwen3_30b_a3b_4k.yaml"].tree["moe"]["expert_num"] == 128


def test_a_missing_file_gets_one_line(tmp_path, capsys):
    assert cli.run(main, ["convert-config", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
