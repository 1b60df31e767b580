"""The table of configuration keys, line for line against the configuration."""

import pytest

from switchyard.config import Config
from switchyard.config.router_options import OPTIONS
from switchyard.report.parameters import rows, table

BY_KEY = {row.key: row for row in rows()}


def test_every_key_has_a_row():
    sections = {name: field.annotation.model_fields for name, field in Config.model_fields.items()}
    options = {f"`moe.router.{option}`" for kind in OPTIONS.values() for option in kind.model_fields}
    keys = [key for key in BY_KEY if key not in options]
    assert keys == [f"`{section}.{key}`" for section, fields in sections.items() for key in fields]
    assert options < set(BY_KEY)
    assert all(row.meaning for row in BY_KEY.values())


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
        ("moe.router.n_group", "integer >= 1", "`1`"),
        ("moe.router.task_experts", "list of list of integer >= 0 or `null`", "`null`"),
        ("data.path", "text or `null`", "`null`"),
        ("parallel.optimizer_shard", "`0`, `1`, `3`", "`0`"),
    ],
)
def test_values_and_default_in_words(key, values, default):
    row = BY_KEY[f"`{key}`"]
    assert (row.values, row.default) == (values, default)


def test_the_row_of_an_option_says_which_routers_have_it():
    assert BY_KEY["`moe.router.topk_group`"].meaning.startswith("sigmoid, two_level: ")


def test_table_is_markdown():
    lines = table(("a", "b", "c", "d"), {"`train.steps`": "x | y"}).splitlines()
    assert lines[:2] == ["| a | b | c | d |", "| --- | --- | --- | --- |"]
    assert len(lines) == 2 + len(BY_KEY)
    assert "| `train.steps` | integer >= 1 | `2000` | x \\| y |" in lines
