"""The router of docs/routing.md lives in a user's file and is found by its dotted name."""

import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from mindspore import Parameter, Tensor
from mindspore import dtype as mstype
from oracles.tiny import tiny_config

from switchyard.config import build
from switchyard.distributed.limits import why_by_hand
from switchyard.distributed.own_classes import require_cut_router
from switchyard.errors import UserError
from switchyard.moe.dispatch.dispatchers import create_path
from switchyard.moe.layer import MoELayer
from switchyard.moe.routing import Router, create_router
from switchyard.moe.routing.base import LinearRouter, why_not_cut
from switchyard.moe.routing.gshard import GShard
from switchyard.moe.routing.softmax import Switch, TopK
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.noise import NoiseSlices
from switchyard.simulation import emulate as virtual

PAGE = Path(__file__).parents[3] / "docs" / "routing.md"


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
    router = create_router(config, InitialWeights(0)).set_train(False)
    rows = np.random.default_rng(1).normal(0, 1, (1, 5, 6)).astype(np.float32)
    routing = router(Tensor(rows), {"valid": Tensor(np.ones((1, 5), np.float32))})
    scores = 2 * rows[0] @ router.weight.asnumpy()
    np.testing.assert_array_equal(routing["expert_index"].asnumpy()[0], np.argsort(-scores, -1)[:, :2])


@pytest.mark.parametrize(
    "name, words",
    [
        ("nowhere.Router", ["moe.router", "nowhere.Router", "cannot be imported"]),
        ("my_routing.Missing", ["moe.router", "my_routing.Missing", "extends"]),
    ],
)
def test_what_is_no_router_is_one_line(own_module, name, words):
    with pytest.raises(UserError) as caught:
        create_router(tiny_config(router=name), InitialWeights(0))
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)


class Logits(TopK):
    def logits(self, rows):
        return 2.0 * self.score(rows, self.weight)


class Score(Switch):
    def score(self, rows, weight):
        return 2.0 * super().score(rows, weight)


class Construct(GShard):
    def construct(self, rows, context):
        return self.decide(2.0 * self.logits(rows), context)


class FlatAlone(TopK):
    def score_flat(self, rows):
        return 2.0 * self.product(rows, self.weight)


class AfterBoth(TopK):
    def construct(self, rows, context):
        return self.decide(self.logits(rows), context)

    def decide(self, logits, context):
        return super().decide(2.0 * logits, context)


class AgainAlone(AfterBoth):
    def construct(self, rows, context):
        return super().construct(3.0 * rows, context)


class LogitsAndFlat(Logits):
    def score_flat(self, rows):
        return 2.0 * self.product(rows, self.weight)


class SaysItCuts(TopK):
    cuts = True

    def logits(self, rows):
        return 2.0 * self.score(rows, self.weight)


class WithoutDecide(LinearRouter):
    cuts = True

    def construct(self, rows, context): ...


class ByToken(TopK):
    needs = ("token_ids",)


class Weighed(TopK):
    """Changes only what both ways call."""

    def weigh(self, gates):
        return 0.5 * super().weigh(gates)


@pytest.mark.parametrize(
    ("router", "says"),
    [
        (Logits, "Logits changes `logits` and not `score_flat`, which a compiled cluster calls in its place"),
        (Score, "Score changes `score` and not `score_flat`"),
        (Construct, "Construct changes `construct` and not `decide`"),
        (AgainAlone, "AgainAlone changes `construct` and not `decide`"),
        (FlatAlone, "FlatAlone changes `score_flat` and not `logits`, which one device calls in its place"),
        (SaysItCuts, "SaysItCuts changes `logits` and not `score_flat`"),
        (WithoutDecide, "WithoutDecide has no `decide`"),
        (ByToken, "ByToken needs token_ids"),
        (AfterBoth, None),
        (LogitsAndFlat, None),
        (Weighed, None),
    ],
)
def test_a_router_that_a_cluster_would_replace_by_its_parent_is_not_cut(router, says):
    """Refused in one line by the layer, left to processes that exchange by hand where there are any."""
    name = f"{__name__}.{router.__name__}"
    assert router.cuts == (says is None)
    assert why_not_cut(router) is None if says is None else says in why_not_cut(router)
    config = tiny_config(router=name, num_experts_chosen=1 if issubclass(router, Switch) else 2)
    found = why_by_hand(config, "Ascend")
    assert found is None if says is None else says in found
    if says is None or router is WithoutDecide:
        return
    with pytest.raises(UserError, match=f"^moe.router: .*{router.__name__}; ") as caught:
        create_layer(config).shard(None)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def create_layer(config):
    return MoELayer(config, (0.1, 0.1), InitialWeights(0), mstype.float32, NoiseSlices(), 8)


def test_a_method_set_on_the_object_or_a_parameter_that_decide_would_read_is_refused():
    layer = create_layer(tiny_config(num_experts_chosen=2))
    require_cut_router(layer.router, "top_k")
    layer.router.heat = Parameter(Tensor(np.ones(1, np.float32)), name="heat")
    with pytest.raises(UserError, match=r"^moe\.router: top_k; its parameter `heat` cannot be read in `decide`"):
        require_cut_router(layer.router, "top_k")
    other = create_layer(tiny_config(num_experts_chosen=2))
    other.router.__dict__["logits"] = lambda rows: rows
    with pytest.raises(UserError, match=r"^moe\.router: top_k; `logits` is set on the object"):
        require_cut_router(other.router, "top_k")


def test_a_form_without_a_path_is_one_line():
    class Strange(Router):
        form = "strange"

    with pytest.raises(UserError, match=r"^moe\.router: top_k; its form 'strange' has no path; one of token_choice"):
        create_path(Strange.form, tiny_config().moe, True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LogitsAndFlat"])
def test_a_router_that_says_both_is_what_a_cluster_runs(name, tmp_path, monkeypatch):
    """Two emulated ranks equal one device, and neither is the parent: its loss is another one."""
    code = "from switchyard.moe.routing.softmax import TopK\n\n" + "\n\n".join(
        inspect.getsource(router) for router in (AfterBoth, Logits, LogitsAndFlat)
    )
    (tmp_path / "my_both.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    model = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "seq_length": 8, "intermediate_size": 16}
    tree = {"model": model | {"init_method_std": 0.2}, "data": {"batch_size": 4}}
    tree["parallel"] = {"data_parallel": 2, "expert_parallel": 2}
    moe = {"expert_num": 4, "num_experts_chosen": 2, "router": f"my_both.{name}"}
    found = virtual.prove(build(tree | {"moe": moe}), 2, steps=1, vocab=32)
    assert found.equal, virtual.render(found)
    plain = virtual.draw_batches(build(tree | {"moe": moe}), 32, 1)
    parent = virtual.train_reference(build(tree | {"moe": moe | {"router": "top_k"}}), 32, plain)
    assert abs(float(parent["losses"][0]) - found.losses[0][1]) > 100 * virtual.TOLERANCE
    sys.modules.pop("my_both", None)
