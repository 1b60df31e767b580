"""The router of docs/routing.md lives in a user's file and is found by its dotted name."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor
from oracles.tiny import tiny_config

from switchyard.errors import UserError
from switchyard.routing import create_router

PAGE = Path(__file__).parents[2] / "docs" / "routing.md"


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert len(code.splitlines()) <= 30
    (tmp_path / "my_routing.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_routing"
    sys.modules.pop("my_routing", None)


def test_documented_router_routes(own_module, pynative):
    config = tiny_config(router=f"{own_module}.Sharp", num_experts_chosen=2)
    router = create_router(config, np.random.default_rng(0)).set_train(False)
    rows = np.random.default_rng(1).normal(0, 1, (1, 5, 6)).astype(np.float32)
    routing = router(Tensor(rows), {"valid": Tensor(np.ones((1, 5), np.float32))})
    scores = 2 * rows[0] @ router.weight.asnumpy()
    np.testing.assert_array_equal(routing["experts"].asnumpy()[0], np.argsort(-scores, -1)[:, :2])


@pytest.mark.parametrize(
    "name, words",
    [
        ("nowhere.Router", ["moe.router", "nowhere.Router", "cannot be imported"]),
        ("my_routing.Missing", ["moe.router", "my_routing.Missing", "extends"]),
    ],
)
def test_what_is_no_router_is_one_line(own_module, name, words):
    with pytest.raises(UserError) as caught:
        create_router(tiny_config(router=name), np.random.default_rng(0))
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)
