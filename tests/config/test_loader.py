"""The configuration: what is refused and in which words, overrides, immutability, the printed whole."""

import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from switchyard.config import Config, Section, build, load
from switchyard.errors import UserError

MODELS = ["model", "moe", "seq2seq", "vision", "cascade"]
SECTIONS = [*MODELS, "data", "optimizer", "schedule", "train", "parallel", "context", "export"]
CONFIGS = sorted((Path(__file__).parents[2] / "config").glob("*.yaml"))


def _refusal(*overrides, tree=None) -> str:
    with pytest.raises(UserError) as caught:
        build(tree or {}, overrides)
    text = str(caught.value)
    assert "\n" not in text and text == text.strip()
    return text


# What is typed on the command line, and the line that answers it.
SCALING = "must be a mapping whose type is linear, llama3 or yarn"
SINGLE_KEYS = [
    ("moe.losses={importance: -1}", "moe.losses.importance: -1; input should be greater than or equal to 0"),
    ("model.hidden_sise=64", "model.hidden_sise: unknown key; did you mean 'hidden_size'?"),
    ("moe.experts_num=8", "moe.experts_num: unknown key; did you mean 'expert_num'?"),
    ("moe.num_experts_choosen=2", "moe.num_experts_choosen: unknown key; did you mean 'num_experts_chosen'?"),
    ("modle.hidden_size=64", "modle: unknown key; did you mean 'model'?"),
    ("zzz.qqq=1", "zzz: unknown key; known keys: " + ", ".join(SECTIONS)),
    ("export.zzz=1", "export.zzz: unknown key; known keys: max_length, key_file"),
    ("model.num_layers=0", "model.num_layers: 0; input should be greater than or equal to 1"),
    ("model.num_layers=-3", "model.num_layers: -3; input should be greater than or equal to 1"),
    ("model.num_layers=2.5", "model.num_layers: 2.5; input should be a valid integer, got a number with a fractional"),
    ("model.num_layers=many", "model.num_layers: 'many'; input should be a valid integer"),
    ("model.num_layers=true", "model.num_layers: True; input should not be true or false"),
    ("model.num_layers=null", "model.num_layers: None; input should be a valid integer"),
    ("model.num_layers=[1, 2]", "model.num_layers: [1, 2]; input should be a valid integer"),
    ("model.norm=batchnorm", "model.norm: 'batchnorm'; input should be 'rmsnorm' or 'layernorm'"),
    ("model.activation=tanh", "model.activation: 'tanh'; input should be 'relu', 'gelu' or 'swiglu'"),
    ("model.position=alibi", "model.position: 'alibi'; input should be 'rotary' or 'learned'"),
    ("model.dropout=1.0", "model.dropout: 1.0; input should be less than 1"),
    ("model.dropout=-0.1", "model.dropout: -0.1; input should be greater than or equal to 0"),
    ("model.dropout=.nan", "model.dropout: nan; input should be"),
    ("model.theta=.inf", "model.theta: inf; input should be a finite number"),
    ("model.tie_word_embeddings=perhaps", "model.tie_word_embeddings: 'perhaps'; input should be a valid boolean"),
    ("model.compute_dtype=float8", "model.compute_dtype: 'float8'; input should be 'float32', 'float16' or 'bfloat16'"),
    ("moe.layers=some", "moe.layers: 'some'; input should be 'all' or input should be a valid integer"),
    ("moe.layers=[0, -1]", "moe.layers: "),
    ("moe.layers=0", "moe.layers: 0; "),
    ("moe.capacity_factor=0", "moe.capacity_factor: 0; input should be greater than 0"),
    ("moe.eval_capacity_factor=-1", "moe.eval_capacity_factor: -1; input should be greater than 0"),
    ("model.head_size=0", "model.head_size: 0; input should be greater than or equal to 1"),
    ("model.qk_norm=layer", "model.qk_norm: 'layer'; input should be 'head' or 'full'"),
    ("model.attention_bias=true", "model.attention_bias: True; input should not be true or false"),
    ("model.partial_rotary=0", "model.partial_rotary: 0; input should be greater than 0"),
    ("model.sliding_window=0", "model.sliding_window: 0; input should be greater than or equal to 1"),
    ("model.window_layers=[-1]", "model.window_layers: [-1]; input should be 'all' or input should be"),
    ("model.rotary_scaling=2", f"model.rotary_scaling: 2; {SCALING}"),
    ("model.rotary_scaling={type: dynamic}", "model.rotary_scaling: {'type': 'dynamic'}; " + SCALING),
    ("model.rotary_scaling={type: linear}", "model.rotary_scaling.factor: not given; field required"),
    (
        "model.rotary_scaling={type: linear, factor: 0.5}",
        "model.rotary_scaling.factor: 0.5; input should be greater than or equal to 1",
    ),
    (
        "model.rotary_scaling={type: linear, factor: 2, beta_fast: 32}",
        "model.rotary_scaling.beta_fast: unknown key; known keys: type, factor",
    ),
    (
        "model.rotary_scaling={type: llama3, factr: 2}",
        "model.rotary_scaling.factr: unknown key; did you mean 'factor'?",
    ),
    (
        "moe.drop_order=first",
        "moe.drop_order: 'first'; input should be 'position', 'token', 'probability', 'batch_priority' or 'random'",
    ),
    ("moe.aux_loss_factor=-0.01", "moe.aux_loss_factor: -0.01; input should be greater than or equal to 0"),
    ("moe.jitter=1", "moe.jitter: 1; input should be less than 1"),
    ("moe.dropless_block_size=0", "moe.dropless_block_size: 0; input should be greater than or equal to 1"),
    ("data.val_fraction=0", "data.val_fraction: 0; input should be greater than 0"),
    ("data.val_fraction=1", "data.val_fraction: 1; input should be less than 1"),
    ("data.batch_size=0", "data.batch_size: 0; input should be greater than or equal to 1"),
    ("optimizer.type=sgd", "optimizer.type: 'sgd'; input should be 'adamw'"),
    ("optimizer.beta1=1", "optimizer.beta1: 1; input should be less than 1"),
    ("optimizer.clip_grad=0", "optimizer.clip_grad: 0; input should be greater than 0"),
    ("schedule.type=step", "schedule.type: 'step'; input should be 'cosine', 'linear' or 'constant'"),
    ("schedule.learning_rate=0", "schedule.learning_rate: 0; input should be greater than 0"),
    ("train.steps=0", "train.steps: 0; input should be greater than or equal to 1"),
    ("train.name=../elsewhere", "train.name: '../elsewhere'; string should match pattern"),
    ("train.name=.hidden", "train.name: '.hidden'; string should match pattern"),
    ("train.seed=-1", "train.seed: -1; input should be greater than or equal to 0"),
    ("parallel.optimizer_shard=2", "parallel.optimizer_shard: 2; input should be 0, 1 or 3"),
    ("context.device_target=TPU", "context.device_target: 'TPU'; input should be 'auto', 'Ascend', 'GPU' or 'CPU'"),
    ("context.mode=eager", "context.mode: 'eager'; input should be 'graph' or 'pynative'"),
    ("steps=5", "override 'steps=5': write section.key=value"),
    ("train.steps", "override 'train.steps': write section.key=value"),
    ("train.=5", "override 'train.=5': write section.key=value"),
    (".steps=5", "override '.steps=5': write section.key=value"),
    ("train.steps=[1,", "override 'train.steps=[1,': the value is not YAML"),
    ("moe={expert_num: 8}", "override 'moe={expert_num: 8}': write section.key=value"),
]


@pytest.mark.parametrize(("override", "answer"), SINGLE_KEYS, ids=[override for override, _ in SINGLE_KEYS])
def test_refused_key(override, answer):
    assert _refusal(override).startswith(answer)


ORIGINAL = "original_max_position_embeddings: 32}"
COMBINATIONS = [
    (["model.hidden_size=100", "model.num_heads=3"], "model.num_heads: 3; must divide model.hidden_size (100)"),
    (["model.num_heads=4", "model.n_kv_heads=3"], "model.n_kv_heads: 3; must divide model.num_heads (4)"),
    (["model.n_kv_heads=8"], "model.n_kv_heads: 8; must divide model.num_heads (4)"),
    (
        ["model.hidden_size=12", "model.num_heads=4"],
        "model.position: rotary; needs an even head size, not 3; "
        "change model.hidden_size or model.num_heads, or use 'learned'",
    ),
    (
        ["moe.router=top_k", "moe.expert_num=8", "moe.num_experts_chosen=9"],
        "moe.num_experts_chosen: 9; at most moe.expert_num (8)",
    ),
    (["moe.num_experts_chosen=2"], "moe.num_experts_chosen: 2; at most moe.expert_num (1)"),
    (
        ["moe.expert_num=8", "moe.num_experts_chosen=2"],
        "moe.num_experts_chosen: 2; moe.router 'switch' chooses 1 expert; use 'top_k' for more",
    ),
    (["moe.layers=[0, 4]"], "moe.layers: 4; at most model.num_layers - 1 (3)"),
    (["moe.layers=5"], "moe.layers: 5; every n-th needs n <= model.num_layers (4)"),
    (
        ["moe.groups=5"],
        "data.batch_size: 12; must be a multiple of the routing groups (5: moe.groups or parallel.data_parallel)",
    ),
    (
        ["parallel.data_parallel=8"],
        "data.batch_size: 12; must be a multiple of the routing groups (8: moe.groups or parallel.data_parallel)",
    ),
    (
        ["moe.expert_num=8", "parallel.expert_parallel=3", "parallel.data_parallel=3"],
        "parallel.expert_parallel: 3; must divide moe.expert_num (8)",
    ),
    (
        ["moe.expert_num=8", "parallel.expert_parallel=4", "parallel.data_parallel=2"],
        "parallel.expert_parallel: 4; must divide parallel.data_parallel (2)",
    ),
    (
        ["model.n_kv_heads=2", "parallel.model_parallel=4"],
        "parallel.model_parallel: 4; must divide the key/value heads (2)",
    ),
    (
        ["model.head_size=7"],
        "model.position: rotary; needs an even head size, not 7; change model.head_size, or use 'learned'",
    ),
    (
        ["model.head_size=6", "model.partial_rotary=0.5"],
        "model.partial_rotary: 0.5; must rotate an even number of the 6 columns of a head, 2 or more; it makes 3",
    ),
    (
        ["model.position=learned", "model.partial_rotary=0.5"],
        "model.partial_rotary: 0.5; only model.position 'rotary' reads it: leave it out",
    ),
    (["model.sliding_window=8", "model.window_layers=[4]"], "model.window_layers: 4; at most model.num_layers - 1 (3)"),
    (
        ["model.sliding_window=8", "model.window_layers=[]"],
        "model.sliding_window: 8; model.window_layers [] names no layer: leave it out",
    ),
    (["model.window_layers=[1]"], "model.window_layers: [1]; model.sliding_window is null: set it, or leave this out"),
    (
        ["model.rotary_scaling={type: llama3, factor: 8, low_freq_factor: 4, high_freq_factor: 1, " + ORIGINAL],
        "model.rotary_scaling.high_freq_factor: 1.0; must be above model.rotary_scaling.low_freq_factor (4.0)",
    ),
    (
        ["model.rotary_scaling={type: yarn, factor: 8, beta_fast: 1, " + ORIGINAL],
        "model.rotary_scaling.beta_fast: 1.0; must be above model.rotary_scaling.beta_slow (1.0)",
    ),
    (
        ["model.rotary_scaling={type: yarn, factor: 8, mscale: 1, " + ORIGINAL],
        "model.rotary_scaling.mscale: 1.0; mscale and mscale_all_dim are read together: give both or none",
    ),
    (
        ["model.rotary_scaling={type: yarn, factor: 8, mscale: 1, mscale_all_dim: 1, attention_factor: 2, " + ORIGINAL],
        "model.rotary_scaling.mscale: 1.0; model.rotary_scaling.attention_factor replaces it: leave one of them out",
    ),
    (
        ["model.rotary_scaling={type: yarn, factor: 8, " + ORIGINAL, "model.theta=1"],
        "model.theta: 1.0; must be above 1 where model.rotary_scaling is yarn",
    ),
    (
        ["moe.expert_num=4", "moe.shared_intermediate_size=8"],
        "moe.shared_intermediate_size: 8; needs moe.shared_expert_num of 1 or more",
    ),
    (["parallel.pipeline_stage=8"], "parallel.pipeline_stage: 8; at most model.num_layers (4)"),
    (["schedule.learning_rate=1e-5"], "schedule.lr_end: 0.0001; at most schedule.learning_rate (1e-05)"),
    (
        ["export.max_length=65", "model.position=learned"],
        "export.max_length: 65; learned positions end at model.seq_length (64); use model.position=rotary "
        "for longer text",
    ),
]


@pytest.mark.parametrize(("overrides", "answer"), COMBINATIONS, ids=[" ".join(o) for o, _ in COMBINATIONS])
def test_refused_combination(overrides, answer):
    assert _refusal(*overrides) == answer


ALLOWED = [
    ["model.hidden_size=100", "model.num_heads=3", "model.head_size=8"],
    ["model.rotary_scaling.type=linear", "model.rotary_scaling.factor=2"],
    ["model.sliding_window=8", "model.window_layers=[0, 3]"],
    ["model.hidden_size=12", "model.num_heads=4", "model.position=learned"],
    ["moe.router=top_k", "moe.expert_num=8", "moe.num_experts_chosen=8"],
    ["moe.layers=4"],
    ["moe.layers=[]"],
    ["moe.layers=[3, 0]"],
    ["moe.groups=4", "parallel.data_parallel=2"],
    ["moe.expert_num=8", "parallel.expert_parallel=2", "parallel.data_parallel=4"],
    ["export.max_length=4096"],
    ["optimizer.clip_grad=null"],
    ["data.path=a file with spaces.txt"],
    ["train.name=v1.2_b-3"],
]


@pytest.mark.parametrize("overrides", ALLOWED, ids=" ".join)
def test_allowed_combination(overrides):
    build({}, overrides)


@pytest.mark.parametrize(
    ("tree", "answer"),
    [
        ({"model": 5}, "model: 5; input should be a valid dictionary or instance of ModelConfig"),
        ({"model": [1]}, "model: [1]; "),
        ({"model": {1: 2}}, "model.1: "),
        ({1: {}}, "config: section names must be text"),
    ],
)
def test_refused_tree(tree, answer):
    assert _refusal(tree=tree).startswith(answer)


def test_an_unknown_key_is_named_before_a_wrong_value():
    """A misspelt key is the likelier cause of what else looks wrong."""
    assert _refusal("model.num_layers=0", "moe.expert_nun=8").startswith("moe.expert_nun: unknown key")


def test_override_of_a_section_that_is_a_value():
    assert _refusal("model.num_layers=2", tree={"model": 5}) == "model: 5; must be a section of keys"


# Files


def _file(tmp_path, text, name="config.yaml"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("model: [1, 2", "broken YAML"),
        ("model:\n\thidden_size: 3", "line 2: broken YAML"),
        ("- model\n- moe", "holds a list; expected sections such as 'model:'"),
        ("just words", "holds a str; expected sections"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        ("model: {hidden_sise: 3}", "did you mean 'hidden_size'?"),
        ("? [a]\n: 1", "line 1: broken YAML: a list or mapping as a key: keys must be text"),
        ("1: {}", "'1' as a key: keys must be text"),
        (b"model: {}\n\x00", "broken YAML"),
        (b"model: {norm: \x07}", "broken YAML"),
    ],
)
def test_refused_file(text, answer, tmp_path):
    with pytest.raises(UserError) as caught:
        load(_file(tmp_path, text))
    assert answer in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_and_folder_in_place_of_a_file(tmp_path):
    for path, reason in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "is a directory, not a regular file")):
        with pytest.raises(UserError, match=f"config file '{path}': {reason}"):
            load(path)


@pytest.mark.parametrize("text", ["", "# a comment alone", "model:\nmoe:\n", "model: {}"])
def test_empty_parts_mean_the_defaults(text, tmp_path):
    assert load(_file(tmp_path, text)) == Config()


def test_overrides_win_over_the_file(tmp_path):
    path = _file(tmp_path, "model: {num_layers: 3, hidden_size: 64}\ntrain:\n")
    config = load(path, ["model.num_layers=5", "train.steps=7", "model.num_layers=6", "schedule.lr_end=1e-6"])
    assert (config.model.num_layers, config.model.hidden_size, config.train.steps) == (6, 64, 7)
    assert config.schedule.lr_end == 1e-6  # YAML 1.1 reads 1e-6 as text
    assert load(path).model.num_layers == 3


@pytest.mark.parametrize("text", ["001", "2020-01-01", "1e3", "true", "plain", "1_0"])
def test_text_stays_as_it_was_typed(text):
    assert build({}, [f"train.name={text}"]).train.name == text
    assert build({}, [f"data.path={text}"]).data.path == text
    assert build({}, ["data.path=null"]).data.path is None


def test_building_leaves_the_tree_alone():
    tree = {"model": {"num_layers": 3}}
    build(tree, ["model.num_layers=5", "moe.expert_num=4"])
    assert tree == {"model": {"num_layers": 3}}


# The typed whole


def test_nothing_changes_after_building():
    config = build({})
    for part, key in ((config.model, "hidden_size"), (config, "model"), (config.moe, "new_key")):
        with pytest.raises(ValidationError):
            setattr(part, key, 1)


def test_every_key_is_described():
    assert list(Config.model_fields) == SECTIONS
    for name, section in Config.model_fields.items():
        assert issubclass(section.annotation, Section) and section.annotation.__doc__
        for key, described in section.annotation.model_fields.items():
            assert described.description, f"{name}.{key}"
            assert len(described.description) < 140 and "\n" not in described.description


def test_every_key_stands_in_one_section_only_or_means_the_same():
    keys = [key for section in Config.model_fields.values() for key in section.annotation.model_fields]
    assert sorted(key for key in set(keys) if keys.count(key) > 1) == ["type"]  # of optimizer, of schedule


def test_the_defaults_are_a_legal_configuration():
    config = Config()
    for section in Config.model_fields:
        values = getattr(config, section)
        type(values).model_validate(values.model_dump())
    assert build({}) == config


def test_printed_whole_reads_back():
    config = build({}, ["moe.expert_num=8", "moe.layers=[1, 3]", "data.path=null", "schedule.lr_end=1e-6"])
    text = config.to_yaml()
    assert list(yaml.safe_load(text)) == SECTIONS
    assert build(yaml.safe_load(text)) == config


@given(
    layers=st.integers(1, 8),
    heads=st.sampled_from([1, 2, 4]),
    rate=st.floats(1e-6, 1.0, allow_nan=False),
    norm=st.sampled_from(typing.get_args(Config.model_fields["model"].annotation.model_fields["norm"].annotation)),
    path=st.one_of(st.none(), st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20)),
)
def test_any_printed_whole_reads_back(layers, heads, rate, norm, path):
    model = {"num_layers": layers, "num_heads": heads, "norm": norm}
    config = build({"model": model, "schedule": {"learning_rate": rate, "lr_end": 0.0}, "data": {"path": path}})
    assert build(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [("all", (0, 1, 2, 3)), (1, (0, 1, 2, 3)), (2, (1, 3)), (3, (2,)), ([3, 1, 1], (1, 3)), ([], ())],
)
def test_which_layers_are_conditional(layers, wanted):
    assert build({"moe": {"expert_num": 4, "layers": layers}}).moe_layers == wanted
    assert build({"moe": {"expert_num": 1, "layers": layers}}).moe_layers == ()


def test_derived_figures():
    config = build(
        {},
        ["model.hidden_size=64", "parallel.data_parallel=4", "parallel.pipeline_stage=2", "parallel.micro_batch_num=2"],
    )
    assert (config.dense_width, config.expert_width, config.groups, config.devices) == (256, 256, 4, 8)
    config = build({}, ["model.intermediate_size=96", "moe.moe_intermediate_size=24", "moe.groups=3"])
    assert (config.dense_width, config.expert_width, config.groups) == (96, 24, 3)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configuration_is_legal_and_says_how_to_run(path):
    config = load(path)
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("#")
    assert f"config/{path.name}" in path.read_text(encoding="utf-8")
    assert config.train.name


def test_shipped_configurations():
    assert {path.stem for path in CONFIGS} >= {
        "quickstart",
        "shakespeare_char_dense_cpu",
        "shakespeare_char_switch_cpu",
        "switch_base_8_ascend",
        "moe_1b_gpu",
    }


def test_reading_a_configuration_does_not_import_mindspore():
    code = "import sys, switchyard.config as c; c.build({}); sys.exit('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
