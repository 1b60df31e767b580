"""Routers, experts, dispatchers and losses of a user's own: from the layer, by name, and from a YAML file."""

import inspect
import sys

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

import switchyard as sw
from switchyard.config import build
from switchyard.errors import UserError
from switchyard.moe.dispatch.dispatchers import DISPATCHERS
from switchyard.moe.own_experts import EXPERTS
from switchyard.moe.routing.losses import LOSSES, OWN_LOSSES
from switchyard.moe.routing.softmax import TopK
from switchyard.training.loop import train
from switchyard.trust import check_trusted_section, own_names


class Hot(TopK):
    """Top-k whose scores are divided by an option."""

    class Options(TopK.Options):
        heat: float = 1.0

    def __init__(self, setting):
        super().__init__(setting)
        self.heat = setting.options.heat

    def logits(self, tokens):
        return super().logits(tokens) / self.heat


class Scale(sw.Expert):
    """Each expert multiplies a row by numbers of its own."""

    def __init__(self, setting):
        super().__init__(setting)
        self.scale = setting.normal((setting.expert_num, 1, setting.hidden_size), "scale")

    def construct(self, rows):
        return rows * self.scale


class EveryExpert(sw.Dispatcher):
    """Sends all tokens to every expert, and keeps the outputs of the chosen ones."""

    def send(self, tokens, routing):
        slots = ops.tile(ops.expand_dims(tokens, 1), (1, self.expert_num, 1, 1))  # [G, E, N, D]
        index, gates = routing["expert_index"], routing["gates"]
        weights = ops.zeros_like(routing["probabilities"])  # [G, N, E]
        for choice in range(self.choices):
            mask = ops.equal(ops.expand_dims(index[..., choice], -1), ops.arange(self.expert_num))
            weights = weights + mask.astype(ms.float32) * gates[..., choice : choice + 1]
        return slots, weights

    def receive(self, outputs, weights):
        gates = ops.expand_dims(ops.transpose(weights, (0, 2, 1)), -1)  # [G, E, N, 1]
        return (outputs * gates).sum(1).reshape(-1, outputs.shape[-1])


def unsure(routing, valid, choices, length):
    """1 - the largest probability, summed over the real rows of each group."""
    return ((1.0 - routing["probabilities"].amax(-1)) * valid).sum(1)


PARTS = {"router": {"name": Hot, "heat": 4.0}, "experts": Scale, "dispatcher": EveryExpert, "losses": {unsure: 0.5}}
KEYS = {"num_experts_chosen": 2, "init_method_std": 0.5, "seed": 1, "aux_loss_factor": 0, "z_loss_factor": 0}


def rows_of(*shape: int) -> Tensor:
    return Tensor(np.random.default_rng(2).normal(0, 1, shape).astype(np.float32))


def by_loop(layer, x: np.ndarray) -> tuple[np.ndarray, float]:
    """What a layer of all four parts returns, and its loss: a loop over rows."""
    scores = x @ layer.moe.router.weight.asnumpy() / 4.0
    scale, out, loss = layer.moe.experts.scale.asnumpy(), np.zeros_like(x), 0.0
    for row, score in enumerate(scores):
        chosen = np.argsort(-score)[:2]
        gates = np.exp(score[chosen]) / np.exp(score[chosen]).sum()
        loss += 0.5 * (1 - np.exp(score).max() / np.exp(score).sum()) / len(x)
        for gate, expert in zip(gates, chosen):
            out[row] += gate * x[row] * scale[expert, 0]
    return out, loss


@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_a_layer_of_four_own_parts_says_what_a_loop_says(mode, request):
    request.getfixturevalue(mode)
    layer, x = sw.MoELayer(6, 4, return_losses=True, **KEYS | PARTS).set_train(), rows_of(7, 6)
    out, loss = layer(x)
    expected, of_losses = by_loop(layer, x.asnumpy())
    np.testing.assert_allclose(out.asnumpy(), expected, rtol=1e-4, atol=1e-6)
    assert float(loss.asnumpy()) == pytest.approx(of_losses, rel=1e-4)
    assert layer.metrics()["dropped"] == 0


@pytest.mark.parametrize("part", PARTS)
def test_each_part_works_by_itself_and_learns(part, pynative):
    """With shipped parts in the place of the others: finite gradients, and some of the part's own or of the router."""
    layer = sw.MoELayer(6, 4, **{"router": "top_k"} | KEYS | {part: PARTS[part]}).set_train()
    parameters = layer.trainable_params()

    def forward(x):
        return layer(x).sum()

    gradients = ms.grad(forward, None, ms.ParameterTuple(parameters))(rows_of(8, 6))
    for one, gradient in zip(parameters, gradients):
        assert np.isfinite(gradient.asnumpy()).all() and np.abs(gradient.asnumpy()).max() > 0, one.name


def test_the_gradient_of_an_own_loss_is_attached(pynative):
    def of_router(losses):
        layer = sw.MoELayer(6, 4, **{"router": "top_k"} | KEYS | {"losses": losses}).set_train()

        def forward(x):
            return layer(x).sum()

        return ms.grad(forward, None, ms.ParameterTuple([layer.moe.router.weight]))(rows_of(8, 6))[0].asnumpy()

    assert np.abs(of_router({unsure: 0.5}) - of_router({})).max() > 1e-3


@pytest.fixture
def clean():
    """Takes out again what a test registers."""
    yield
    for table in (EXPERTS.known, DISPATCHERS.known, OWN_LOSSES.known, LOSSES):
        for name in ("mine", "other"):
            table.pop(name, None)


def test_registered_names_serve_as_well_as_the_classes(clean, pynative):
    sw.register("mine")(Scale)
    sw.register("mine")(EveryExpert)
    sw.register("mine")(unsure)
    named = {"router": {"name": Hot, "heat": 4.0}, "experts": "mine", "dispatcher": "mine", "losses": {"mine": 0.5}}
    one, other = (sw.MoELayer(6, 4, **KEYS | parts).set_train() for parts in (named, PARTS))
    np.testing.assert_array_equal(one(rows_of(7, 6)).asnumpy(), other(rows_of(7, 6)).asnumpy())
    assert one.losses == other.losses and one.config.moe.experts == "mine"


@pytest.mark.parametrize(
    "name, part, says",
    [
        ("my.own", Scale, "register: 'my.own'; give a name without a dot"),
        ("mine", dict, "register: 'mine'; <class 'dict'> extends none of Router, Expert and Dispatcher, and is no"),
        ("mine", 3, "register: 'mine'; 3 extends none of"),
        ("importance", unsure, "register: 'importance'; a shipped loss has this name"),
    ],
)
def test_what_cannot_be_registered_is_one_line(name, part, says):
    with pytest.raises(UserError) as caught:
        sw.register(name)(part)
    assert str(caught.value).startswith(says)


def test_a_dispatcher_that_does_not_fit_the_router_is_one_line():
    says = r"^moe.dispatcher: .*EveryExpert; reads a Routing of form 'token_choice', and moe.router 'soft' makes 'soft'"
    with pytest.raises(UserError, match=says):
        sw.MoELayer(6, 4, router="soft", dispatcher=EveryExpert)
    with pytest.raises(UserError, match=r"^moe.dispatch: dropless; moe.dispatcher decides what is dropped"):
        sw.MoELayer(6, 4, router="top_k", dispatcher=EveryExpert, dispatch="dropless")


HEAD = "import mindspore as ms\nfrom mindspore import ops\nimport switchyard as sw\n"
HEAD += "from switchyard.moe.routing.softmax import TopK\n\n\n"
OWN = {"router": {"name": "my_parts.Hot", "heat": 4.0}, "experts": "my_parts.Scale"}
OWN |= {"dispatcher": "my_parts.EveryExpert", "losses": {"my_parts.unsure": 0.5}}


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    """A folder with a file of the four parts."""
    code = "\n\n".join(inspect.getsource(part) for part in (Hot, Scale, EveryExpert, unsure))
    (tmp_path / "my_parts.py").write_text(HEAD + code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_parts", None)
    sys.path[:] = [one for one in sys.path if one != str(tmp_path)]
    LOSSES.pop("my_parts.unsure", None)


@pytest.mark.slow
def test_a_yaml_file_names_the_parts_and_a_checkpoint_asks_before_it_imports_them(own_file):
    text = own_file / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 40, encoding="utf-8")
    model = {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "seq_length": 8, "intermediate_size": 8}
    run = {"name": "own", "steps": 2, "eval_every": 0, "checkpoint_every": 0, "log_every": 1}
    tree = {"model": model, "moe": {"expert_num": 4, "num_experts_chosen": 2, **OWN}, "train": run}
    tree["data"] = {"path": str(text), "batch_size": 2}
    train(build(tree))
    with pytest.raises(UserError, match=r"^moe.router: 'my_parts.Hot'; the checkpoint asks to import and run"):
        sw.load_checkpoint(own_file / "runs" / "own")
    found = sw.load_checkpoint(own_file / "runs" / "own", trust_code=True)
    layer = found.layers[0].feed_forward
    kinds = [type(part).__name__ for part in (layer.router, layer.experts, layer.train_dispatcher)]
    assert kinds == ["Hot", "Scale", "EveryExpert"] and not found.training
    logits, _, _ = found(Tensor([found.tokenizer.encode("to be or")]), ops.ones((1, 8)), ops.ones((1, 1, 1)))
    assert np.isfinite(logits.asnumpy()).all()


def test_every_own_name_of_a_checkpoint_needs_consent(own_file):
    moe = build({"moe": {"expert_num": 4, "num_experts_chosen": 2, **OWN}}).moe
    keys = ["moe.router", "moe.experts", "moe.dispatcher", "moe.losses"]
    assert [key for key, _ in own_names(moe)] == keys
    for key in keys:
        others = [f"{other}=x" for other in keys if other != key]
        with pytest.raises(UserError, match=rf"^{key}: 'my_parts.*read that file, then allow it with --trust-code"):
            check_trusted_section(moe, False, print, others)
    check_trusted_section(moe, False, print, [f"{key}=x" for key in keys])
    assert "my_parts" not in sys.modules


@pytest.mark.parametrize("key, name", [("experts", "my_parts.unsure"), ("dispatcher", "my_parts.Scale")])
def test_a_name_of_something_else_is_one_line(key, name, own_file):
    with pytest.raises(UserError, match=rf"^moe.{key}: '{name}'; must be a class that extends switchyard\."):
        sw.MoELayer(6, 4, router="top_k", **{key: name})
