"""MindFormers' own mixture of experts with the weights of a layer of this package: output and gradients of both.

Imported by `mindformers_probe` alone, in a process of its own that has MindFormers.
"""

from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindformers.modules.transformer.moe import MoEConfig, MoEV2, TopkRouter
from mindformers.modules.transformer.transformer import TransformerOpParallelConfig
from mindspore import Parameter, Tensor, nn, ops

import switchyard as sw
from switchyard.moe.routing import losses

WIDTH, HIDDEN, EXPERTS, ROWS = 16, 12, 8, 40
BALANCE, Z = 0.02, 0.003


class Case(NamedTuple):
    """What both layers are asked to do; `room`: capacity factor, None = nothing is dropped."""

    choices: int
    score: str = "softmax"
    room: float | None = None
    token_by_token: bool = False
    groups: tuple[int, int] | None = None
    bias: tuple[float, ...] | None = None
    normalised: bool = True
    factor: float = 1.0
    balance: float = BALANCE

    @property
    def name(self) -> str:
        """Returns how reports call the case."""
        room = (
            "dropless" if self.room is None else f"capacity {self.room} {'sdrop' if self.token_by_token else 'kdrop'}"
        )
        parts = [f"k={self.choices}", self.score, room]
        parts += [f"groups {self.groups[1]} of {self.groups[0]}"] if self.groups else []
        parts += ["bias"] if self.bias else []
        parts += ["balance loss"] if self.bias and self.balance else []
        parts += [] if self.normalised else ["not normalised"]
        return ", ".join(parts + ([f"gates x {self.factor}"] if self.factor != 1 else []))


class Experts(nn.Cell):
    """Feed-forward experts on slots that MindFormers has filled [1, E, C, D]; weights [E, D, F] and [E, F, D].

    The stock experts of MindFormers 1.9 do not compile on CPU; `ffn` is where MoEV2 takes others.
    """

    def __init__(self, w_in: np.ndarray, w_out: np.ndarray):
        super().__init__()
        self.w_in, self.w_out = Parameter(Tensor(w_in), name="w_in"), Parameter(Tensor(w_out), name="w_out")
        self.product = ops.BatchMatMul()

    def construct(self, slots: Tensor) -> Tensor:
        rows = slots.reshape(EXPERTS, -1, WIDTH)
        return self.product(ops.relu(self.product(rows, self.w_in)), self.w_out).reshape(slots.shape)


def own_layer(case: Case) -> nn.Cell:
    """Returns the layer of this package that the case means."""
    options = {"norm_topk_prob": case.normalised, "routed_scaling_factor": case.factor}
    n_group, topk_group = case.groups or (1, 1)
    name = "sigmoid" if case.score == "sigmoid" else "top_k"
    router = {"name": name, **options, "n_group": n_group, "topk_group": topk_group}
    keys = {"capacity_factor": case.room, "drop_order": "token" if case.token_by_token else "position"}
    layer = sw.MoELayer(
        hidden_size=WIDTH, expert_num=EXPERTS, intermediate_size=HIDDEN, router=router, seed=7, return_losses=True,
        num_experts_chosen=case.choices, init_method_std=0.25, aux_loss_factor=case.balance, z_loss_factor=Z,
        **({"dispatch": "dropless"} if case.room is None else keys),
    ).set_train()  # fmt: skip
    weights = np.random.default_rng(3).normal(0, 0.5, (WIDTH, EXPERTS)).astype(np.float32)
    layer.moe.router.weight.set_data(Tensor(weights))
    if case.bias:
        layer.moe.router.bias.set_data(Tensor(np.array(case.bias, np.float32)))
    return layer


def their_layer(case: Case, own: nn.Cell) -> nn.Cell:
    """Returns MindFormers' layer of the case, with the weights of the own one."""
    groups = {}
    if case.groups:
        groups = {"topk_method": "noaux_tc", "n_group": case.groups[0], "topk_group": case.groups[1]}
    config = MoEConfig(
        expert_num=EXPERTS, num_experts_chosen=case.choices, routing_policy="TopkRouterV2",
        capacity_factor=case.room or -1.0, enable_sdrop=case.token_by_token, norm_topk_prob=case.normalised,
        use_gating_sigmoid=case.score == "sigmoid", routed_scaling_factor=case.factor, z_loss_factor=Z,
        aux_loss_types=["expert"], aux_loss_factors=[case.balance],
        balance_via_topk_bias=case.bias is not None, **groups,
    )  # fmt: skip
    experts = Experts(own.moe.experts.w_in.asnumpy(), own.moe.experts.w_out.asnumpy())
    layer = MoEV2(
        ffn=experts, dim=WIDTH, moe_config=config, parallel_config=TransformerOpParallelConfig(),
        return_extra_loss=True,
    ).set_train()  # fmt: skip
    layer.router.dense.weight.set_data(Tensor(own.moe.router.weight.asnumpy().T.copy()))
    if case.bias:
        layer.router.router.topk_bias.set_data(Tensor(np.array(case.bias, np.float32)))
    return layer


def results(layer: nn.Cell, x: Tensor, weights: list[Parameter]) -> list[np.ndarray]:
    """Returns output, auxiliary loss, and the gradients of x and of weights, of a loss that reads all of them."""
    mix = Tensor(np.random.default_rng(5).normal(0, 0.3, size=x.shape).astype(np.float32))

    def loss(rows):
        out, extra = layer(rows)
        return (out * mix).sum() + extra.sum(), out, extra

    found, (of_x, of_weights) = ops.value_and_grad(loss, 0, ms.ParameterTuple(weights), has_aux=True)(x)
    return [part.asnumpy() for part in (found[1], found[2].reshape(1), of_x, *of_weights)]


def compare(case: Case) -> dict[str, float]:
    """Returns the largest differences of a case: output, loss, and the gradients of tokens, router and experts."""
    x = Tensor(np.random.default_rng(1).normal(size=(1, ROWS, WIDTH)).astype(np.float32))
    own = own_layer(case)
    theirs = their_layer(case, own)
    mine = results(own, x, [own.moe.router.weight, own.moe.experts.w_in, own.moe.experts.w_out])
    other = results(theirs, x, [theirs.router.dense.weight, theirs.ffn.w_in, theirs.ffn.w_out])
    other[3] = other[3].T
    names = ("output", "loss", "d tokens", "d router", "d w_in", "d w_out")
    found = {name: float(np.abs(a - b.reshape(a.shape)).max()) for name, a, b in zip(names, mine, other)}
    return found | {"dropped": own.metrics()["dropped"], "scale": float(np.abs(mine[2]).max())}


def core_router(case: Case) -> dict[str, float]:
    """Compares the router of parallel_core's training graph; what no CPU has is replaced.

    TopkExt by TopK, OneHotExt by OneHot. The experts of that stack need GroupedMatmul, which has no twin on CPU.
    """
    from mindformers.parallel_core.training_graph.transformer.moe.router import TopKRouter
    from mindformers.parallel_core.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=WIDTH, num_attention_heads=1, add_bias_linear=False, num_moe_experts=EXPERTS,
        seq_length=ROWS, moe_router_topk=case.choices, moe_router_pre_softmax=True,
        moe_router_score_function=case.score, moe_aux_loss_coeff=case.balance,
        moe_router_load_balancing_type="seq_aux_loss", moe_router_topk_scaling_factor=case.factor,
        moe_router_enable_expert_bias=case.bias is not None, moe_router_dtype="float32",
        norm_topk_prob=case.normalised, **core_groups(case),
    )  # fmt: skip
    own, theirs = own_layer(case).moe.router, TopKRouter(config)
    theirs.weight.set_data(Tensor(own.weight.asnumpy().T.copy()))
    for name, twin in (("topk", ops.TopK), ("afb_topk", ops.TopK), ("tc_topk", ops.TopK), ("onehot_aux", ops.OneHot),
                       ("onehot_2d", ops.OneHot)):  # fmt: skip
        if hasattr(theirs, name):
            setattr(theirs, name, twin())
    if case.bias:
        theirs.expert_bias.set_data(Tensor(np.array(case.bias, np.float32)))
    x = Tensor(np.random.default_rng(1).normal(size=(1, ROWS, WIDTH)).astype(np.float32))
    return compare_routing(case, own, theirs, x)


def core_groups(case: Case) -> dict:
    """Returns the keys of TransformerConfig for groups of experts."""
    return {"moe_router_num_groups": case.groups[0], "moe_router_group_topk": case.groups[1]} if case.groups else {}


def compare_routing(case: Case, own: nn.Cell, theirs: nn.Cell, x: Tensor) -> dict[str, float]:
    """Returns the largest differences of gates, loss and the router's gradient, and how many choices differ."""
    mix = Tensor(np.random.default_rng(5).normal(size=(1, ROWS, case.choices)).astype(np.float32))
    valid = ops.ones((1, ROWS))

    def mine(rows):
        routing = own(rows, {"valid": valid})
        balance = case.balance * losses.switch_balance(
            routing["expert_mask"], routing["probabilities"], valid, case.choices
        )
        return (routing["gates"] * mix).sum() + balance, routing["expert_index"], routing["gates"], balance

    def other(rows):
        index, gates, balance = theirs(rows)
        return (gates * mix).sum() + balance.sum(), index, gates, balance.sum()

    found = []
    for function, weight in ((mine, own.weight), (other, theirs.weight)):
        (_, *parts), gradient = ops.value_and_grad(function, None, [weight], has_aux=True)(x)
        gradient = gradient[0] if isinstance(gradient, tuple) else gradient
        found.append([part.asnumpy() for part in (*parts, gradient)])
    (index, gates, balance, gradient), (their_index, their_gates, their_balance, their_gradient) = found
    return {
        "choices": float((index != their_index).sum()),
        "gates": float(np.abs(gates - their_gates).max()),
        "loss": float(np.abs(balance - their_balance)),
        "d router": float(np.abs(gradient - their_gradient.T).max()),
    }


def gate_of_one_choice() -> dict[str, float]:
    """Returns what TopkRouterV1 does to the gate of a single choice, and the router of this package."""
    logits = np.random.default_rng(2).normal(size=(1, ROWS, EXPERTS)).astype(np.float32)
    config = MoEConfig(expert_num=EXPERTS, num_experts_chosen=1, capacity_factor=float(EXPERTS))
    first = TopkRouter(WIDTH, config, True, TransformerOpParallelConfig())

    def gates(values):
        return first(values)[1].sum((2, 3))  # [1, N]

    found, gradient = ops.value_and_grad(lambda values: gates(values).sum(), 0)(Tensor(logits))
    own = own_layer(Case(1))
    probability = ops.softmax(Tensor(logits), -1).asnumpy().max(-1)  # [1, N]
    routing = own.moe.router.route((Tensor(logits),), {"valid": ops.ones((1, ROWS))})
    kept = routing["gates"].asnumpy()[..., 0]  # [1, N]
    grown = ops.grad(lambda values: own.moe.router.route((values,), {"valid": ops.ones((1, ROWS))})["gates"].sum())
    return {
        "V1 gate": float(found.asnumpy()) / ROWS,
        "V1 gradient": float(np.abs(gradient.asnumpy()).max()),
        "own gate - probability": float(np.abs(kept - probability).max()),
        "own gradient": float(np.abs(grown(Tensor(logits)).asnumpy()).max()),
    }
