"""What users hand over as YAML or JSON: plain values come out, or one line says what is wrong, whatever it is."""

import os
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switchyard.config import Config, build, load
from switchyard.config.reader import UnreadableError, parse_json, parse_yaml, read_text
from switchyard.errors import UserError, represented, shortened

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(9)
)

PLAIN = [
    ("2024-13-45", "2024-13-45"),
    ("2024-01-01", "2024-01-01"),
    ("=", "="),
    ("1e3", "1e3"),
    ("0x10", 16),
    ("1_000", 1000),
    ("{a: null, b: true, c: [1, 2.5]}", {"a": None, "b": True, "c": [1, 2.5]}),
    ("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}", {"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 3}}),
    ("!!str 5", "5"),
    ("", None),
]


@pytest.mark.parametrize(("text", "value"), PLAIN)
def test_plain_yaml(text, value):
    assert parse_yaml(text) == value


BROKEN = [
    ("a: 1\nb: 2\na: 3", "line 3: key 'a' is given twice, first in line 1"),
    ("model:\n  norm: rmsnorm\n  norm: layernorm", "line 3: key 'norm' is given twice, first in line 2"),
    ("{a: {b: 1, 'b': 2}}", "line 1: key 'b' is given twice"),
    ("x: &x {a: 1}\ny:\n  <<: *x\n  <<: *x", "line 4: key '<<' is given twice, first in line 3"),
    ("!!int x", "line 1: 'x' is not a value of type int"),
    ("a:\n- !!float x", "line 2: 'x' is not a value of type float"),
    ("!!bool x", "'x' is not a value of type bool"),
    ("!!int ''", "'' is not a value of type int"),
    ("!!python/object/apply:os.system [true]", "could not determine a constructor for the tag"),
    ("!!timestamp x", "could not determine a constructor"),
    ("!!binary x", "could not determine a constructor"),
    ("!!set {a}", "could not determine a constructor"),
    ("a: " + "1" * 5000, "line 1: a number of 5,000 characters; at most 40"),
    ("a: 0x" + "f" * 5000, "a number of 5,002 characters"),
    ("[" * 100_000, "line 1: more than 32 levels of nesting"),
    ("- " * 10_000, "more than 32 levels of nesting"),
    (BOMB, "aliases expand to more than 100,000 values"),
    ("&a [*a]", "an alias stands inside its own anchor"),
    ("&a {b: *a}", "an alias stands inside its own anchor"),
    ("a: *b", "found undefined alias 'b'"),
    ("1: 2", "'1' as a key: keys must be text, put it between quotes"),
    ("on: 2", "'on' as a key: keys must be text"),
    ("? [a]\n: 1", "a list or mapping as a key: keys must be text"),
    ("? !!str [a]\n: 1", "a list or mapping as a key"),
    ("a: 1\nb: \x07", "line 2: character '\\x07' is not allowed"),
    ("a: \x00", "character '\\x00' is not allowed"),
    ('"\\ud800"', "is not a value of type str"),
    ('"\\UFFFFFFFF"', "not readable"),
    ("\udcff", "contains bytes that are not text in this locale"),
    ("y: {<<: 1}", "expected a mapping or list of mappings for merging"),
    ("--- 1\n--- 2", "line 2: but found another document"),
]


@pytest.mark.parametrize(("text", "reason"), BROKEN, ids=[text[:20] for text, _ in BROKEN])
def test_broken_yaml_is_one_short_line(text, reason):
    with pytest.raises(UnreadableError) as caught:
        parse_yaml(text)
    assert reason in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[1, NaN]", "NaN is not a JSON number"),
        ("-Infinity", "-Infinity is not a JSON number"),
        ('{"a": 1, "a": 2}', "key 'a' is given twice"),
        ("1" * 5000, "integer string conversion"),
        ("[1,", "Expecting value"),
    ],
)
def test_broken_json_is_one_short_line(text, reason):
    with pytest.raises(UnreadableError, match=reason) as caught:
        parse_json(text)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 200


# Files


def _config_file(folder, content: bytes):
    (folder / "config.yaml").write_bytes(content)
    return folder / "config.yaml"


def test_a_byte_order_mark_is_no_character(tmp_path):
    assert load(_config_file(tmp_path, b"\xef\xbb\xbfmodel: {num_layers: 3}")).model.num_layers == 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("model: {}".encode("utf-16"), "UTF-16, not UTF-8 text"),
        (b"model: {}  # \xe9", "not UTF-8 text at byte 13"),
        (b"a" * (1 << 20) + b"\n", "has more than 1,048,576 bytes"),
        (b"[]", "holds a list; expected sections"),
        (b"0", "holds a int; expected sections"),
        (b"''", "holds a str; expected sections"),
        (b"false", "holds a bool; expected sections"),
        (b"2024-01-01", "holds a str; expected sections"),
        (b"train: {steps: 1, steps: 2}", "line 1: broken YAML: key 'steps' is given twice"),
    ],
)
def test_a_file_that_is_no_configuration(content, reason, tmp_path):
    with pytest.raises(UserError) as caught:
        load(_config_file(tmp_path, content))
    assert reason in str(caught.value) and str(caught.value).isprintable()


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "pipe", "is not a regular file"),
        ("/dev/zero", "is not a regular file"),
        (tmp_path, "is a directory"),
        (tmp_path / "none", "No such file or directory"),
        (tmp_path / ("n" * 300), "File name too long"),
        ("a\0b", "embedded null byte"),
    ):
        started = time.monotonic()
        with pytest.raises(UserError, match=reason):
            read_text(path, "config file", "give another")
        assert time.monotonic() - started < 5


# Messages


def test_values_in_messages_are_short():
    endless = [1]
    endless.append(endless)
    for value in ("x" * 10_000, list(range(10_000)), endless, {"a": endless}, 10**5000, "\x1b" * 1000, b"b" * 1000):
        for text in (shortened(value), represented(value)):
            assert len(text) <= 90 and text.isprintable()
    assert shortened("two\nlines") == "two\\nlines" and represented("two\nlines") == r"'two\nlines'"
    assert shortened("Prójects") == "Prójects"
    for value in (True, None, 1.5, [1, "a"], {"a": [2]}, (1, 2), [], "text"):
        assert represented(value) == repr(value)


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("train.seed=4294967296", "train.seed: 4294967296; input should be less than or equal to 4294967295"),
        ("model.num_layers=10001", "model.num_layers: 10001; input should be less than or equal to 10000"),
        ("moe.expert_num=2147483648", "moe.expert_num: 2147483648; input should be at most 2147483647"),
        ("cascade.stages=[1, 2147483648]", "cascade.stages: 2147483648; input should be at most 2147483647"),
        ("model.hidden_size=2147483644", "model.hidden_size: 2147483644; makes arrays of"),
        ("train.steps=" + "9" * 41, "override 'train.steps=999"),
        ("train.name=" + "n" * 500 + "!", "train.name: 'nnnn"),
        (f"cascade.stages=[{'0, ' * 900}1]", "cascade.stages: "),
        ("data.path='a\\0b'", "data.path: "),
        ('data.path="a\\0b"', "data.path: 'a\\x00b'; input should hold no NUL character"),
        ("data.path=a\udcff", "override 'data.path=a\\udcff': contains bytes that are not text in this locale"),
        ("train.steps=\udcff", "override 'train.steps=\\udcff': contains bytes that are not text in this locale"),
        ("x" * 1000, "override 'xxx"),
        ("x\ny.z=1", "x\\ny: unknown key"),
        ("moe.losses={" + "a" * 500 + ": -1}", "moe.losses.aaa"),
    ],
)
def test_an_extreme_value_is_one_short_line(override, answer):
    if answer == "data.path: ":
        assert build({}, [override]).data.path == "a\\0b"  # between single quotes nothing is an escape
        return
    with pytest.raises(UserError) as caught:
        build({}, [override])
    assert str(caught.value).startswith(answer) and str(caught.value).isprintable() and len(str(caught.value)) < 350


def test_the_largest_seed_is_one_of_numpy_and_mindspore():
    import mindspore as ms

    assert build({}, ["train.seed=4294967295"]).train.seed == 2**32 - 1
    ms.set_seed(2**32 - 1)
    with pytest.raises(ValueError):
        ms.set_seed(2**32)
    ms.set_seed(1)


def test_every_integer_has_an_upper_bound():
    for section, outer in Config.model_fields.items():
        for key, field in outer.annotation.model_fields.items():
            if "int" in str(field.annotation) and "Literal" not in str(field.annotation):
                with pytest.raises(UserError):
                    build({section: {key: 2**63}})


def test_text_is_not_read_as_yaml():
    for text in ("a #1.txt", "*.txt", "[a", "2024-13-45", "a: b", "=", "&a b", "!x"):
        assert build({}, [f"data.path={text}"]).data.path == text
    assert build({}, ["data.path='a #1.txt'"]).data.path == "a #1.txt"


# Anything at all

SIGNS = [*"{}[]:,-?&*!|>'\"#%@` \n\t~=<", "<<", "- ", ": ", "---\n", "...", "&a ", "*a", "!!int ", "!!python/x "]
WORDS = ["model", "moe", "seed", "train", "2024-13-45", "1" * 50, "1e999", ".nan", "0b"]
ODD = ["\ud800", "\x00", "\x85", "é", "\ufeff"]
PIECES = st.sampled_from([*SIGNS, *WORDS, *ODD])
YAMLISH = st.lists(PIECES | st.text(max_size=3), max_size=30).map("".join)
KEYS = st.sampled_from(
    [f"{section}.{key}" for section, outer in Config.model_fields.items() for key in outer.annotation.model_fields]
)
VALUES = (
    YAMLISH | st.integers().map(str) | st.floats().map(str) | st.sampled_from(["[[0]]", "{}", "true", "null", "all"])
)


def _holds(make) -> None:
    """Whatever is read is a Config or one printable line."""
    try:
        assert isinstance(make(), Config)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 600, str(error)


@settings(max_examples=300)
@given(text=YAMLISH)
def test_any_text_is_a_configuration_or_one_line(text, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    _holds(lambda: load(path))


@settings(max_examples=300)
@given(overrides=st.lists(st.builds("{}={}".format, KEYS, VALUES) | YAMLISH, max_size=4))
def test_any_overrides_are_a_configuration_or_one_line(overrides):
    _holds(lambda: build({}, overrides))


@settings(max_examples=100)
@given(
    tree=st.dictionaries(
        st.sampled_from(list(Config.model_fields)),
        st.dictionaries(
            st.sampled_from(["expert_num", "router", "layers", "losses", "path", "stages", "task_experts", "groups"]),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3),
                lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
                max_leaves=5,
            ),
        ),
    )
)
def test_any_tree_is_a_configuration_or_one_line(tree):
    _holds(lambda: build(tree))


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, "[NaN]", "[1, 2"])
def test_other_readers_of_json_have_the_same_limits(text, tmp_path):
    from switchyard.checkpoint.tensors import read_header
    from switchyard.data.tokenizer import Tokenizer
    from switchyard.planner.search import read_load

    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        Tokenizer.from_json(text)
    (tmp_path / "load.json").write_text(text)
    with pytest.raises(UserError, match=r"^--tokens-per-expert: .*must hold a JSON list of numbers"):
        read_load(str(tmp_path / "load.json"), build({"moe": {"expert_num": 2}}))
    (tmp_path / "w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text.encode())
    with pytest.raises(ValueError):
        read_header(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "text", ["[1", "!!int x", "[1]", "{data_parallel: 1, data_parallel: 2}", "[" * 1000, "2024-13-45"]
)
def test_the_degrees_of_a_conversion_go_through_the_same_reader(text):
    from switchyard.checkpoint.reshard import _section

    with pytest.raises(UserError, match=r"^--to: ") as caught:
        _section(text)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300
