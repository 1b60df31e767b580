"""A layer trains in every loop of MindSpore's, and each makes the same steps: attached losses need no loop of ours."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore.amp import DynamicLossScaler, FixedLossScaleManager
from mindspore.dataset import GeneratorDataset

import switchyard as sw

STEPS, ROWS, WIDTH, CLASSES = 3, 24, 6, 3
SCALE = 1024.0


class Network(nn.Cell):
    """A conditional layer and a head; with returned losses it gives them on."""

    def __init__(self, compute_dtype: str = "float32", return_losses: bool = False, **keys):
        super().__init__()
        own = {"router": "top_k", "num_experts_chosen": 2, "aux_loss_factor": 1.0, "init_method_std": 0.3} | keys
        self.moe = sw.MoELayer(WIDTH, 4, seed=2, compute_dtype=compute_dtype, return_losses=return_losses, **own)
        weight = np.random.default_rng(3).normal(0, 0.3, (CLASSES, WIDTH)).astype(np.float32)
        self.head = nn.Dense(WIDTH, CLASSES, Tensor(weight), has_bias=False)  # a bias begins at random
        self.returns = return_losses

    def construct(self, x):
        if self.returns:
            out, loss = self.moe(x)
            return self.head(out), loss
        return self.head(self.moe(x))


class Summed(nn.Cell):
    """The loss of a network that returns the losses of its layer."""

    def __init__(self, network):
        super().__init__()
        self.network, self.loss = network, nn.CrossEntropyLoss()

    def construct(self, x, y):
        out, auxiliary = self.network(x)
        return self.loss(out, y) + auxiliary


def batches():
    random = np.random.default_rng(0)
    x = random.normal(0, 1, (STEPS, ROWS, WIDTH)).astype(np.float32)
    return x, x[..., :CLASSES].argmax(-1).astype(np.int32)


def optimizer_of(network, loss_scale: float = 1.0):
    return nn.SGD(network.trainable_params(), 0.5, loss_scale=loss_scale)


def by_cell(network) -> None:
    """nn.TrainOneStepCell."""
    step = nn.TrainOneStepCell(nn.WithLossCell(network, nn.CrossEntropyLoss()), optimizer_of(network)).set_train()
    for x, y in zip(*batches()):
        step(Tensor(x), Tensor(y))


def by_returned_losses(network) -> None:
    """nn.TrainOneStepCell with losses that the network adds itself."""
    step = nn.TrainOneStepCell(Summed(network), optimizer_of(network)).set_train()
    for x, y in zip(*batches()):
        step(Tensor(x), Tensor(y))


def by_scaled_cell(network) -> None:
    """nn.TrainOneStepCell, with a gradient that is scaled and an optimizer that scales it back."""
    loss, optimizer = nn.WithLossCell(network, nn.CrossEntropyLoss()), optimizer_of(network, loss_scale=SCALE)
    step = nn.TrainOneStepCell(loss, optimizer, sens=SCALE).set_train()
    sw.set_loss_scale(network, SCALE)
    for x, y in zip(*batches()):
        step(Tensor(x), Tensor(y))


def by_loop(network, scaled: bool = False) -> None:
    """mindspore.value_and_grad, with mindspore.amp.DynamicLossScaler where the loss is scaled."""
    network.set_train()
    loss, optimizer = nn.CrossEntropyLoss(), optimizer_of(network)
    scaler = DynamicLossScaler(SCALE if scaled else 1.0, 2, 2)

    def forward(x, y):
        return scaler.scale(loss(network(x), y))

    step = ms.value_and_grad(forward, None, optimizer.parameters)
    for x, y in zip(*batches()):
        sw.set_loss_scale(network, scaler.scale_value)
        _, gradients = step(Tensor(x), Tensor(y))
        optimizer(scaler.unscale(gradients))
        scaler.adjust(Tensor(True))


def by_scaled_loop(network) -> None:
    """The same with a scale that doubles after two steps."""
    by_loop(network, scaled=True)
    assert float(network.moe.loss_scale.asnumpy()) == 2 * SCALE


def by_fit(network, loss_scale: float | None = None) -> None:
    """mindspore.Model.fit."""
    data = GeneratorDataset(list(zip(*batches())), ["x", "y"], shuffle=False)
    scale = FixedLossScaleManager(loss_scale, drop_overflow_update=False) if loss_scale else None
    keys = {"loss_scale_manager": scale} if scale else {}
    model = ms.Model(network, nn.CrossEntropyLoss(), optimizer_of(network, loss_scale or 1.0), **keys)
    model.fit(1, data, callbacks=[sw.MoECallback()], dataset_sink_mode=False)


def by_fixed_fit(network) -> None:
    """The same with a loss scale that stays."""
    by_fit(network, SCALE)
    assert float(network.moe.loss_scale.asnumpy()) == SCALE


def trained(way, **keys) -> dict[str, np.ndarray]:
    network = Network(return_losses=way is by_returned_losses, **keys)
    parameters = {one.name: one for one in network.trainable_params()}  # a cell around the network renames them
    way(network)
    return {name: one.asnumpy() for name, one in parameters.items()}


@pytest.fixture(scope="module")
def expected():
    """What nn.TrainOneStepCell makes of the network, operator by operator."""
    before = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield trained(by_cell)
    ms.set_context(mode=before)


WAYS = [by_cell, by_returned_losses, by_scaled_cell, by_loop, by_scaled_loop, by_fit, by_fixed_fit]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_makes_the_same_steps(way, expected, pynative):
    for name, weight in trained(way).items():
        np.testing.assert_allclose(weight, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "way, compute_dtype", [(by_cell, "float32"), (by_scaled_loop, "float16"), (by_fixed_fit, "float16")]
)
def test_graph_mode_and_float16_make_the_same_steps(way, compute_dtype, expected, graph):
    bound = 1e-5 if compute_dtype == "float32" else 1e-3
    for name, weight in trained(way, compute_dtype=compute_dtype).items():
        np.testing.assert_allclose(weight, expected[name], rtol=1e-4, atol=bound, err_msg=name)


def test_the_steps_learn_and_the_losses_matter(expected, pynative):
    """The bounds above are far below what the training changes, and below what the attached losses change."""
    start, without = Network(), trained(by_cell, aux_loss_factor=0)
    for one in start.trainable_params():
        assert np.abs(expected[one.name] - one.asnumpy()).max() > 0.05, one.name
    assert np.abs(without["moe.moe.router.weight"] - expected["moe.moe.router.weight"]).max() > 1e-2


def test_the_callback_moves_the_bias_of_each_step(pynative):
    keys = {"router": {"name": "sigmoid", "topk_bias_update_rate": 0.25}, "aux_loss_factor": 0}
    network = Network(**keys)
    by_fit(network)
    bias = network.moe.moe.router.bias.asnumpy()
    assert np.abs(bias).max() > 0 and np.allclose(bias / 0.25, np.round(bias / 0.25))
    np.testing.assert_allclose(bias, trained_bias(keys))


def trained_bias(keys) -> np.ndarray:
    """The same in a loop that calls `update_routers`."""
    network = Network(**keys)
    step = nn.TrainOneStepCell(nn.WithLossCell(network, nn.CrossEntropyLoss()), optimizer_of(network)).set_train()
    for x, y in zip(*batches()):
        step(Tensor(x), Tensor(y))
        sw.update_routers(network)
    return network.moe.moe.router.bias.asnumpy()
