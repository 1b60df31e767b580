"""The table of configuration keys, line for line against the configuration."""

import pytest

from switchyard.config import Config
from switchyard.config.router_options import OPTIONS
from switchyard.report.parameters import Row, page, router_options, sections, table

BY_KEY = {row.key: row for rows in sections().values() for row in rows}


def test_every_key_has_a_row():
    fields = {name: field.annotation.model_fields for name, field in Config.model_fields.items()}
    outer = [key for key in BY_KEY if key.count(".") == 1]
    assert outer == [f"`{section}.{key}`" for section, keys in fields.items() for key in keys]
    assert all(row.meaning for row in BY_KEY.values())


def test_every_router_has_the_rows_of_its_options():
    found = router_options()
    assert list(found) == list(OPTIONS)
    assert [row.key for row in found["sigmoid"]][:2] == ["`norm_topk_prob`", "`routed_scaling_factor`"]
    assert found["noisy_top_k"] == []
    assert found["gshard"][0] == Row(
        "`second_expert`",
        "`all`, `sampling`, `threshold`",
        "`all`",
        "second choices that count: all, by lot in proportion (training), or large gates",
    )
    assert all(row.meaning for rows in found.values() for row in rows)


@pytest.mark.parametrize(
    ("key", "values", "default"),
    [
        ("model.num_layers", "integer >= 1, <= 10000", "`4`"),
        ("model.n_kv_heads", "integer >= 1 or `null`", "`null`"),
        ("model.norm", "`rmsnorm`, `layernorm`", "`rmsnorm`"),
        ("model.dropout", "number >= 0, < 1", "`0.0`"),
        ("model.tie_word_embeddings", "`true`, `false`", "`true`"),
        ("moe.layers", "`all` or integer >= 1 or list of integer >= 0", "`all`"),
        ("moe.capacity_factor", "number > 0", "`1.25`"),
        ("moe.router", "text or mapping", "`switch`"),
        ("data.path", "text or `null`", "`null`"),
        ("model.rotary_scaling", "mapping or `null`", "`null`"),
        ("model.rotary_scaling.type", "`linear`, `llama3`, `yarn`", ""),
        ("model.rotary_scaling.factor", "number >= 1", ""),
        ("model.rotary_scaling.beta_fast", "number > 0", "`32.0`"),
        ("parallel.optimizer_shard", "`0`, `1`, `3`", "`0`"),
    ],
)
def test_values_and_default_in_words(key, values, default):
    row = BY_KEY[f"`{key}`"]
    assert (row.values, row.default) == (values, default)


def test_rows_of_a_sub_section_name_their_types():
    assert BY_KEY["`model.rotary_scaling.factor`"].meaning == "linear, llama3, yarn: how much longer the text may be"
    assert BY_KEY["`model.rotary_scaling.beta_slow`"].meaning.startswith("yarn: turns in the original length")


def test_values_of_an_option_in_words():
    row = {row.key: row for row in router_options()["task"]}["`task_experts`"]
    assert (row.values, row.default) == ("list of list of integer >= 0 or `null`", "`null`")


def test_table_is_markdown():
    row = Row("`train.steps`", "integer >= 1", "`2000`", "x | y")
    lines = table([row], ("a", "b", "c", "d")).splitlines()
    assert lines[:2] == ["| a | b | c | d |", "| --- | --- | --- | --- |"]
    assert lines[2:] == ["| `train.steps` | integer >= 1 | `2000` | x \\| y |"]


def test_page_has_every_section_and_every_router_with_options():
    headings = [line for line in page().splitlines() if line.startswith("#")]
    assert headings[:2] == ["## model", "## moe"] and headings[-1] == "### soft"
    assert len(headings) == len(Config.model_fields) + sum(bool(kind.model_fields) for kind in OPTIONS.values())
