"""The router of docs/routing.md lives in a user's file and is found by its dotted name."""

import dataclasses
import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from mindspore import Parameter, Tensor
from mindspore import dtype as mstype
from oracles.routers import GROUPS, ROWS, checking_mesh
from oracles.tiny import run_layer, tiny_config, tiny_rows, weights_of
from oracles.workers import start_child

from switchyard.config import build
from switchyard.distributed.mesh import LOCAL
from switchyard.errors import UserError
from switchyard.moe.dispatch.dispatchers import create_dispatcher
from switchyard.moe.layer import MoELayer
from switchyard.moe.routing import Router, create_router
from switchyard.moe.routing.base import why_not_sharded
from switchyard.moe.routing.gshard import GShard
from switchyard.moe.routing.own_routers import require_sharded_router
from switchyard.moe.routing.softmax import Switch, TopK
from switchyard.nn.fused import NONE
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.noise import NoiseSlices
from switchyard.simulation import compile as compile_steps
from switchyard.simulation import emulate as virtual
from switchyard.training.limits import why_not_compiled
from switchyard.training.loop import train

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


@pytest.fixture
def faint_module(tmp_path, monkeypatch):
    """The router with options of docs/routing.md."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = (block for block in blocks if "class Faint(" in block)
    (tmp_path / "my_faint.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield "my_faint"
    sys.modules.pop("my_faint", None)


def test_documented_options_are_read(faint_module, pynative):
    rows = Tensor(np.random.default_rng(1).normal(0, 1, (1, 5, 6)).astype(np.float32))
    context = {"valid": Tensor(np.ones((1, 5), np.float32))}
    found = {}
    for name, router in (
        ("usual", {"name": "top_k", "norm_topk_prob": False}),
        ("half", {"name": f"{faint_module}.Faint", "norm_topk_prob": False}),
        ("fifth", {"name": f"{faint_module}.Faint", "share": 0.2}),
    ):
        config = tiny_config(router=router, num_experts_chosen=2)
        assert build(yaml.safe_load(config.to_yaml())) == config
        made = create_router(config, InitialWeights(0)).set_train(False)
        found[name] = made(rows, context)["gates"].asnumpy()
    np.testing.assert_allclose(found["half"], 0.5 * found["usual"], rtol=1e-6)
    np.testing.assert_allclose(found["fifth"].sum(-1), 0.2, rtol=1e-6)  # normalised to 1 by the parent's default


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shar": 0.5}, "moe.router.shar: 0.5; unknown option of moe.router 'my_faint.Faint'; did you mean 'share'?"),
        ({"share": 2}, "moe.router.share: 2; input should be less than or equal to 1"),
        ({"share": "no"}, "moe.router.share: 'no'; input should be a valid number, unable to parse string as a number"),
        ({"share": float("nan")}, "moe.router.share: nan; input should be a finite number"),
        ({"n_group": 2}, "moe.router.n_group: 2; moe.router 'my_faint.Faint' has no such option: take one of top_k, "),
    ],
)
def test_a_wrong_option_of_an_own_router_is_one_line(faint_module, options, message, tmp_path):
    router = {"name": f"{faint_module}.Faint", **options}
    with pytest.raises(UserError) as caught:
        create_router(tiny_config(router=router), InitialWeights(0))
    assert str(caught.value).startswith(message) and str(caught.value).isprintable()


def test_a_wrong_option_is_refused_before_data_are_read(faint_module, tmp_path):
    router = {"name": f"{faint_module}.Faint", "share": 2}
    tree = {"moe": {"router": router, "expert_num": 4}, "data": {"path": "nowhere.txt"}}
    with pytest.raises(UserError, match=r"^moe\.router\.share: 2; "):
        train(build(tree | {"train": {"output_dir": str(tmp_path / "runs")}, "context": {"device_target": "CPU"}}))
    assert not list((tmp_path / "runs").rglob("config.yaml"))


@dataclasses.dataclass(frozen=True)
class PlainOptions:
    depth: int = 1
    names: list[str] = dataclasses.field(default_factory=list)


class Plain(Switch):
    Options = PlainOptions

    def __init__(self, setting):
        super().__init__(setting)
        self.depth = setting.options.depth


class Strange(Switch):
    Options = dict


def test_options_may_be_a_dataclass(monkeypatch):
    monkeypatch.setattr("switchyard.moe.routing.base.import_class", {"my.Plain": Plain, "my.Strange": Strange}.get)

    def create(**router):
        return create_router(tiny_config(router=router), InitialWeights(0))

    assert create(name="my.Plain").depth == 1 and create(name="my.Plain", depth=3, names=["a"]).depth == 3
    for router, said in (
        ({"name": "my.Plain", "depht": 3}, "moe.router.depht: 3; unknown option of moe.router 'my.Plain'; did you"),
        ({"name": "my.Plain", "depth": "x"}, "moe.router.depth: 'x'; input should be a valid integer"),
        ({"name": "my.Plain", "names": 3}, "moe.router.names: 3; input should be a valid list"),
        ({"name": "my.Strange", "depth": 3}, "moe.router: my.Strange; its Options must be a pydantic model or a data"),
    ):
        with pytest.raises(UserError) as caught:
            create(**router)
        assert str(caught.value).startswith(said)


class Logits(TopK):
    def logits(self, tokens):
        return 2.0 * self.score(tokens, self.weight)


class Score(Switch):
    def score(self, tokens, weight):
        return 2.0 * super().score(tokens, weight)


class Scores(TopK):
    def scores(self, tokens, token_ids, task_ids):
        return (2.0 * super().scores(tokens, token_ids, task_ids)[0],)


class Route(GShard):
    def route(self, scores, context):
        return super().route((2.0 * scores[0],), context)


class Construct(TopK):
    def construct(self, tokens, context):
        return super().construct(2.0 * tokens, context)


class RouteUnderConstruct(Construct):
    def route(self, scores, context):
        return super().route((2.0 * scores[0],), context)


class Weighed(TopK):
    """Changes only what `route` calls."""

    def weigh(self, gates):
        return 0.5 * super().weigh(gates)


class ConstructAlone(Router):
    """Has neither `scores` nor `route`."""

    def construct(self, tokens, context): ...


ON_EVERY_MESH = [Logits, Score, Scores, Route, Weighed]


def create_own(router):
    config = tiny_config(router=f"{__name__}.{router.__name__}", num_experts_chosen=1 if router is Score else 2)
    return config, create_router(config, InitialWeights(0)).set_train(False)


@pytest.mark.parametrize("router", ON_EVERY_MESH)
def test_every_mesh_runs_the_methods_of_the_class_and_not_of_its_parent(router, pynative):
    """`scores` and `route`, which a cluster calls, call each hook; all but Weighed double the scores."""
    config, own = create_own(router)
    tokens = Tensor(np.random.default_rng(1).normal(0, 1, (2, 5, 6)).astype(np.float32))
    context = {"valid": Tensor(np.ones((2, 5), np.float32))}
    whole = own(tokens, context)
    (scores,) = own.scores(tokens.reshape(10, 6), None, None)
    routed = own.route((scores.reshape(2, 5, -1),), context)
    for name, part in whole.items():
        np.testing.assert_array_equal(part.asnumpy(), routed[name].asnumpy(), err_msg=name)
    plain = tokens.asnumpy() @ own.weight.asnumpy()  # of the parent
    np.testing.assert_allclose(whole["logits"].asnumpy(), plain * (1 if router is Weighed else 2), rtol=1e-5, atol=1e-6)
    gates = whole["gates"].asnumpy().sum(-1)
    assert (gates < 1).all() if router is Score else np.allclose(gates, 0.5 if router is Weighed else 1)
    assert not router.overrides_construct and why_not_sharded(router) is None
    assert why_not_compiled(config, "Ascend") is None


@pytest.mark.parametrize("router", [Construct, RouteUnderConstruct, ConstructAlone])
def test_a_construct_of_its_own_is_refused_by_name_on_a_cluster(router):
    """In one line by the layer; left to processes, which call the same methods as one device."""
    says = (
        f"{router.__name__} overrides `construct`, which a compiled cluster does not call: define `scores` and `route`"
    )
    assert router.overrides_construct and why_not_sharded(router).startswith(says)
    name = f"{__name__}.{router.__name__}"
    config = tiny_config(router=name, num_experts_chosen=2)
    assert says in why_not_compiled(config, "Ascend")
    with pytest.raises(UserError) as caught:
        create_layer(config).shard(None)
    assert str(caught.value).startswith(f"moe.router: {name}; {says}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("router", ON_EVERY_MESH)
def test_the_layer_of_a_compiled_mesh_calls_the_methods_of_the_class(router, training, pynative):
    """The sharded layer equals that of one device bit for bit; with the parent's router both would be others."""
    keys = {"num_experts_chosen": 1 if router is Score else 2, "groups": GROUPS, "capacity_factor": 4.0}
    (rows, valid), found = tiny_rows(GROUPS, ROWS, padded=2), []
    noise = np.zeros((1, GROUPS * ROWS, rows.shape[2]), np.float32)  # sharded with the tokens, though nobody reads it
    for name in (f"{__name__}.{router.__name__}", router.__bases__[0].name):
        config = tiny_config(router=name, **keys)
        for mesh in (LOCAL, checking_mesh(config)):
            layer = create_layer(config, mesh).set_train(training)
            if mesh is not LOCAL:
                layer.shard(mesh)
            found.append(run_layer(layer, rows, valid, noise))
    own, own_sharded, parent, parent_sharded = found
    for one, two in ((own, own_sharded), (parent, parent_sharded)):
        np.testing.assert_array_equal(one[0], two[0])
        assert one[1:3] == two[1:3] and all(np.array_equal(one[3][name], two[3][name]) for name in one[3])
    assert np.abs(own[0] - parent[0]).max() > 1e-2


def test_a_construct_of_its_own_decides_on_one_device_and_on_processes(pynative):
    """What is refused on a cluster works elsewhere: tokens twice as long have scores twice as large."""
    layer = create_layer(tiny_config(router=f"{__name__}.Construct", num_experts_chosen=2))
    tokens, valid = tiny_rows(1, 5)
    routing = layer.router(Tensor(tokens), {"valid": Tensor(valid)})
    logits = 2 * tokens[0] @ weights_of(layer)["router.weight"]
    np.testing.assert_allclose(routing["logits"].asnumpy()[0], logits, rtol=1e-5)
    z = (np.log(np.exp(logits).sum(-1)) ** 2).mean()
    assert run_layer(layer, tokens, valid)[2] == pytest.approx(z, rel=1e-5)


def create_layer(config, mesh=LOCAL):
    return MoELayer(config, (0.7, 0.7), InitialWeights(0), mstype.float32, NoiseSlices(), 8, mesh=mesh)


def test_a_construct_set_on_the_object_or_a_parameter_that_only_route_would_read_is_refused():
    layer = create_layer(tiny_config(num_experts_chosen=2))
    require_sharded_router(layer.router, "top_k")
    layer.router.heat = Parameter(Tensor(np.ones(1, np.float32)), name="heat")
    with pytest.raises(UserError, match=r"^moe\.router: top_k; its parameter `heat` is not read in `scores`"):
        require_sharded_router(layer.router, "top_k")
    other = create_layer(tiny_config(num_experts_chosen=2))
    other.router.__dict__["construct"] = lambda tokens, context: {}
    with pytest.raises(UserError, match=r"^moe\.router: top_k; `construct` is set on the object"):
        require_sharded_router(other.router, "top_k")
    copied = create_layer(tiny_config(copies=2))
    require_sharded_router(copied.router, "top_k")


def test_a_form_without_a_dispatcher_is_one_line():
    class Strange(Router):
        form = "strange"

    says = r"^moe\.router: top_k; its form 'strange' has no dispatcher; one of token_choice, expert_choice, dense, "
    with pytest.raises(UserError, match=says):
        create_dispatcher(Strange, tiny_config(), True, None, NONE, LOCAL)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Logits"])
def test_a_router_with_a_hook_of_its_own_is_what_a_cluster_runs(name, tmp_path, monkeypatch):
    """Two emulated ranks equal one device, and neither is the parent: its loss is another one."""
    code = "from switchyard.moe.routing.softmax import TopK\n\n" + inspect.getsource(Logits)
    (tmp_path / "my_hook.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(compile_steps, "run_child", start_child)  # a process that stands ready knows no such folder
    model = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "seq_length": 8, "intermediate_size": 16}
    tree = {"model": model | {"init_method_std": 0.2}, "data": {"batch_size": 4}}
    tree["parallel"] = {"data_parallel": 2, "expert_parallel": 2}
    moe = {"expert_num": 4, "num_experts_chosen": 2, "router": f"my_hook.{name}"}
    found = virtual.prove(build(tree | {"moe": moe}), 2, steps=1, vocab=32)
    assert found.equal, virtual.render(found)
    plain = virtual.draw_batches(build(tree | {"moe": moe}), 32, 1)
    parent = virtual.train_reference(build(tree | {"moe": moe | {"router": "top_k"}}), 32, plain)
    assert abs(float(parent["losses"][0]) - found.losses[0][1]) > 100 * virtual.TOLERANCE
    sys.modules.pop("my_hook", None)
