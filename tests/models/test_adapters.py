"""Low-rank adapters: what they add, what is trained, and the same numbers once they are merged."""

import mindspore as ms
import numpy as np
import pytest
from oracles.tiny_run import losses_of, metrics_of, run_config, token_batch, write_text

from switchyard import cli
from switchyard.checkpoint import store as checkpoint
from switchyard.checkpoint.adapters import beside, is_adapter, merged
from switchyard.config import build
from switchyard.distributed.placement import ParallelDims, placement
from switchyard.errors import UserError
from switchyard.models import create_model
from switchyard.training.evaluate import evaluate
from switchyard.training.frozen import freeze
from switchyard.training.initial import without_adapters
from switchyard.training.limits import refusals
from switchyard.training.loop import train

LORA = {"rank": 2, "alpha": 3.0}
MOE = {"expert_num": 4, "router": "top_k", "num_experts_chosen": 2, "shared_expert_num": 1, "layers": [1]}
MODEL = {"num_layers": 2, "activation": "swiglu", "init_method_std": 0.3}
QUICK = {"data": {"val_fraction": 0.01}, "context": {"mode": "pynative"}}


def with_adapters(lora=LORA, moe=MOE, **train_keys):
    return run_config(model=MODEL, moe=moe, train={"lora": lora} | train_keys)


def logits_of(config, weights, training: bool) -> np.ndarray:
    model = create_model(config, 17).set_train(training)
    checkpoint.load_weights(model, weights)
    tokens, _, valid = (ms.Tensor(part[0]) for part in token_batch(1, 4, 16))
    return model(tokens, valid, ms.Tensor(np.zeros((1, 1, 1), np.float32)))[0].asnumpy()


def loud_weights(config) -> dict[str, np.ndarray]:
    """Initial weights with an A and a B that move every output."""
    found, rng = {}, np.random.default_rng(3)
    for one in create_model(config, 17).get_parameters():
        found[one.name] = one.asnumpy()
        if is_adapter(one.name):
            found[one.name] = rng.normal(0, 0.3, one.shape).astype(np.float32)
    return found


@pytest.mark.parametrize("training", [True, False], ids=["capacity", "blocks"])
def test_merged_weights_compute_what_the_adapters_do(training, pynative):
    config = with_adapters(moe=MOE | {"capacity_factor": 4.0})
    weights = loud_weights(config)
    plain, full = merged(config, weights)
    assert plain.train.lora is None and not any(map(is_adapter, full))
    found, expected = logits_of(config, weights, training), logits_of(plain, full, training)
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-5)
    without = {name: value for name, value in weights.items() if not is_adapter(name)}
    assert np.abs(found - logits_of(plain, without, training)).max() > 0.1


def test_a_new_adapter_changes_nothing_and_draws_no_number_of_the_weights():
    config = with_adapters()
    plain = create_model(config.model_copy(update={"train": config.train.model_copy(update={"lora": None})}), 17)
    found = {one.name: one.asnumpy() for one in create_model(config, 17).get_parameters()}
    assert all((found[one.name] == one.asnumpy()).all() for one in plain.get_parameters())
    for name, value in found.items():
        if is_adapter(name):
            assert value.any() == name.endswith(".a")


@pytest.mark.parametrize(
    "targets, names",
    [
        (["attention.out"], {"layers.0.attention.out.lora", "layers.1.attention.out.lora"}),
        (
            ["experts"],
            {
                f"layers.{place}.lora_{which}"
                for place in ("0.feed_forward", "1.feed_forward.experts", "1.feed_forward.shared")
                for which in ("in", "gate", "out")
            },
        ),
        (
            ["attention.qkv", "router"],
            {"layers.0.attention.qkv.lora", "layers.1.attention.qkv.lora", "layers.1.feed_forward.router.weight"},
        ),
    ],
    ids=["attention.out", "experts", "router"],
)
def test_what_is_trained(targets, names):
    config = with_adapters(LORA | {"targets": targets})
    model = create_model(config, 17)
    freeze(model, config)
    assert {one.name.removesuffix(".a").removesuffix(".b") for one in model.trainable_params()} == names
    shapes = {one.name: tuple(one.shape) for one in model.get_parameters()}
    for name in filter(is_adapter, shapes):  # [.., I, r] and [.., r, O] beside a weight [.., I, O]
        *experts, size_in, size_out = shapes[beside(name)]
        assert shapes[name] == (*experts, size_in, 2) if name.endswith(".a") else (*experts, 2, size_out)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A text, a run on it, and one that trains adapters from its weights."""
    path = tmp_path_factory.mktemp("adapters")
    write_text(path)
    config = run_config(path, moe=MOE | {"layers": "all"}, train={"name": "base", "steps": 1}, **QUICK)
    train(config)
    keys = {"train": config.train.model_dump() | {"name": "tuned", "steps": 2, "lora": LORA}}
    train(build(config.model_dump() | keys), init=path / "runs" / "base")
    return path / "runs"


def test_adapters_alone_are_trained_and_kept_with_the_weights(runs):
    base, tuned = checkpoint.read(runs / "base"), checkpoint.read(runs / "tuned")
    for name, value in tuned.weights.items():
        if is_adapter(name):
            assert f"moment1.{name}" in tuned.optimizer and value.any()
        else:
            assert value.tobytes() == base.weights[name].tobytes() and f"moment1.{name}" not in tuned.optimizer
    assert len(losses_of(runs / "tuned")) == 2


def test_a_merged_checkpoint_evaluates_as_the_run_does(runs, capsys):
    assert cli.run(checkpoint.main, ["merge", str(runs / "tuned"), "--out", str(runs / "merged")]) == 0
    assert "without adapters" in capsys.readouterr().out
    held = checkpoint.read(runs / "merged", with_optimizer=False)
    assert held.config.train.lora is None and held.step == 2
    loss = metrics_of(runs / "tuned", "evaluation")[-1]["loss"]
    assert evaluate(runs / "merged", say=lambda line: None).loss == pytest.approx(loss, abs=1e-5)
    again = without_adapters(checkpoint.read(runs / "tuned"), "x")
    assert {name: value.tobytes() for name, value in again.weights.items()} == {
        name: value.tobytes() for name, value in held.weights.items()
    }


def test_what_cannot_be_merged_is_refused(runs):
    with pytest.raises(UserError, match=r"holds no adapters \(train\.lora: null\); there is nothing to merge"):
        checkpoint.main(["merge", str(runs / "base"), "--out", str(runs / "none")])
    with pytest.raises(
        UserError, match=r"4 devices read shards; merge them first: python -m switchyard\.checkpoint merge x"
    ):
        without_adapters(checkpoint.read(runs / "tuned"), "x", 4)
    with pytest.raises(UserError, match=r"^train\.lora: None; the checkpoint's weights were trained with"):
        evaluate(runs / "tuned", ["train.lora=null"])


def test_processes_train_adapters_and_the_compiler_refuses_them_by_name():
    """Of experts by the expert shards; thin matrices are full elsewhere."""
    config = build({"train": {"lora": LORA}, "parallel": {"data_parallel": 2}, "moe": {"expert_num": 4}})
    found = {refusal.key: refusal.by_processes for refusal in refusals(config)}
    assert found == {"train.lora": True}
    degrees = ParallelDims(data_parallel=2, expert_parallel=2)
    assert placement("layers.1.feed_forward.experts.lora_in.a", (4, 16, 2), degrees) == ("expert", None, None)
    assert placement("moment1.layers.1.attention.qkv.lora.b", (2, 48), degrees) == (None, None)
    assert placement("layers.1.feed_forward.lora_out.b", (1, 2, 16), degrees) == (None, None, None)


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"train": {"lora": {"targets": ["router"]}}}, r"^train\.lora\.targets: router; the model has no router"),
        (
            {"model": {"type": "vision"}, "train": {"lora": {}}},
            r"^train\.lora: .*needs model\.type 'decoder', not 'vision'",
        ),
        (
            {"moe": {"expert_num": 2, "experts": "a.B"}, "train": {"lora": {}}},
            r"^train\.lora\.targets: experts; moe\.experts a\.B",
        ),
        ({"train": {"lora": {"rank": 0}}}, r"^train\.lora\.rank: 0; input should be greater than or equal to 1"),
        ({"train": {"lora": {"rnk": 4}}}, r"^train\.lora\.rnk: unknown key; did you mean 'rank'\?"),
    ],
)
def test_contradictions_are_refused_by_key(sections, message):
    with pytest.raises(UserError, match=message):
        build(sections)


def test_a_key_of_it_can_be_overridden_alone():
    config = build({"train": {"lora": LORA}}, ["train.lora.rank=4", "train.lora.targets=[experts]"])
    assert config.train.lora.model_dump() == {"rank": 4, "alpha": 3.0, "targets": ["experts"]}
    assert build({}, ["train.lora.rank=4"]).train.lora.rank == 4
