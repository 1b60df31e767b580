"""Small configurations, layers and inputs that many tests share."""

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore import dtype as mstype

from switchyard.config import Config, build
from switchyard.moe.layer import MoELayer
from switchyard.moe.metrics import BALANCE, Z, loss_metrics, metrics
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.noise import NoiseSlices

NO_NOISE = np.zeros((1, 1, 1), np.float32)


def tiny_config(activation: str = "relu", width: int = 6, hidden: int = 5, **moe) -> Config:
    """A configuration of one conditional layer: top_k of 4 experts unless `moe` says otherwise."""
    model = {"hidden_size": width, "intermediate_size": hidden, "activation": activation, "num_heads": 1}
    model["position"] = "learned"  # of no consequence here, and allows an odd width
    tree = {"model": model, "moe": {"router": "top_k", "expert_num": 4} | moe, "data": {"batch_size": 24}}
    return build(tree, inherited=True)  # tests of many routers share keys that not every one of them reads


def tiny_layer(config: Config, seed: int = 0, dtype=mstype.float32, train: bool = True) -> MoELayer:
    """A layer with weights large enough that routing is sharp and every gradient is visible."""
    layer = MoELayer(config, (0.7, 0.7), InitialWeights(seed), dtype, NoiseSlices())
    weight = layer.router.weight
    weight.set_data(Tensor(np.random.default_rng(seed + 1).normal(0, 0.8, weight.shape).astype(np.float32)))
    return layer.set_train(train)


def weights_of(cell) -> dict[str, np.ndarray]:
    """Name -> value, in float64."""
    return {name: parameter.asnumpy().astype(np.float64) for name, parameter in cell.parameters_and_names()}


def tiny_rows(groups: int = 1, rows: int = 9, width: int = 6, seed: int = 2, padded: int = 0):
    """(rows [G, N, D], valid [G, N]) float32; the last `padded` rows of each group are padding, with loud contents."""
    values = np.random.default_rng(seed).normal(0, 1, (groups, rows, width)).astype(np.float32)
    valid = np.ones((groups, rows), np.float32)
    if padded:
        valid[:, -padded:] = 0
        values[:, -padded:] = 7
    return values, valid


def run_layer(layer, rows, valid, noise=NO_NOISE):
    """Forward of a layer on arrays -> (out [G, N, D], balance loss, z-loss, metrics of the layer) as arrays."""
    out, stats, _ = layer(Tensor(rows), Tensor(valid), Tensor(noise))
    summed, experts = stats.asnumpy().sum(0), layer.expert_num
    figures = {name: value[0] for name, value in metrics(summed, experts).items()}
    return out.asnumpy().reshape(rows.shape), *loss_metrics(summed, experts), figures


def layer_gradients(layer, rows, valid, d_out, d_balance: float, d_z: float, noise=NO_NOISE) -> dict[str, np.ndarray]:
    """Gradients of sum(out * d_out) + d_balance * balance + d_z * z, by parameter name and 'rows'."""
    names, parameters = zip(*layer.parameters_and_names())
    weight, real, valid, noise = Tensor(d_out), max(float(valid.sum()), 1.0), Tensor(valid), Tensor(noise)

    def objective(rows):
        out, stats, _ = layer(rows, valid, noise)
        losses = stats[:, BALANCE].sum() * d_balance + stats[:, Z].sum() * d_z
        return (out.reshape(rows.shape) * weight).sum() + losses / real

    d_rows, d_parameters = ms.grad(objective, 0, ms.ParameterTuple(parameters))(Tensor(rows))
    return {"rows": d_rows.asnumpy()} | {name: d.asnumpy() for name, d in zip(names, d_parameters)}
