"""Every public name has an example in its docstring, and the examples run as they are written."""

import doctest
import os
from importlib import import_module
from pathlib import Path

import pytest

import switchyard as sw

ROOT = Path(__file__).parents[2]
HOMES = sorted({*sw._HOMES.values(), "switchyard", "switchyard.api.attached", "switchyard.moe.registry"})
NEED_A_RUN = ("train", "evaluate", "export", "generate", "load_checkpoint")  # examples/finetune_export_generate.py


@pytest.mark.parametrize("name", [name for name in sw._HOMES if name != "UserError"])
def test_every_public_name_has_an_example(name):
    found = doctest.DocTestFinder(recurse=False).find(getattr(sw, name), name)
    examples = [example for test in found for example in test.examples]
    assert len(examples) >= 2
    skipped = [example for example in examples if doctest.SKIP in example.options]
    assert not skipped or name in NEED_A_RUN


@pytest.mark.parametrize("home", HOMES)
def test_the_examples_run_as_they_are_written(home, pynative, monkeypatch):
    monkeypatch.chdir(ROOT)  # they read config/quickstart.yaml
    found = doctest.testmod(import_module(home))
    assert found.failed == 0 and (found.attempted > 0 or home == "switchyard.errors"), os.getcwd()
