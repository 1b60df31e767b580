"""Routers whose matrix is the identity, so that a row is its own logits; any router with inputs that fit it."""

import numpy as np
from mindspore import Tensor
from mindspore import dtype as mstype
from oracles.tiny import tiny_config

from switchyard.config import build
from switchyard.distributed.mesh import Mesh
from switchyard.moe.routing import create_router
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.noise import NoiseSlices

GROUPS, ROWS, WIDTH, EXPERTS, VOCABULARY, TASKS = 2, 8, 6, 4, 10, 3
OPTIONS = {  # what a router cannot do without
    "gshard": {"num_experts_chosen": 2, "second_expert": "sampling"},
    "multi_gate": {"num_experts_chosen": 2},
    "mixture_of_depths": {"expert_num": 1, "capacity_factor": 0.5},
    "noisy_top_k": {"num_experts_chosen": 2},
    "prototype": {"num_experts_chosen": 2},
    "random": {"random_draw": "step"},
    "random_in_group": {"n_group": 2},
    "task": {"num_experts_chosen": 2},
    "top_k": {"num_experts_chosen": 2},
    "two_level": {"n_group": 2, "topk_group": 2},
}


def any_router(name: str, training: bool, **moe):
    """A shipped router whose learned weights are large enough that every choice is sharp."""
    keys = {"router": name, "expert_num": EXPERTS, "task_num": TASKS} | OPTIONS.get(name, {}) | moe
    random = np.random.default_rng(0)
    router = create_router(tiny_config(width=WIDTH, **keys), random, NoiseSlices(), VOCABULARY, has_tasks=True)
    for parameter in router.get_parameters():
        if parameter.dtype == mstype.float32 and "scale" not in parameter.name:
            parameter.set_data(Tensor(random.normal(0, 0.8, parameter.shape).astype(np.float32)))
    return router.set_train(training)


def inputs_of(padded: int = 0):
    """(tokens [G, N, D], Context) for `any_router`; the last `padded` rows of the second group are padding."""
    random, valid, shape = np.random.default_rng(1), np.ones((GROUPS, ROWS), np.float32), (GROUPS, ROWS)
    valid[1, ROWS - padded :] = 0
    context = {
        "valid": Tensor(valid),
        "noise": Tensor(random.random((2, GROUPS * ROWS, WIDTH)).astype(np.float32)),
        "token_ids": Tensor(random.integers(0, VOCABULARY, shape).astype(np.int32)),
        "task_ids": Tensor(random.integers(0, TASKS, shape).astype(np.int32)),
    }
    return Tensor(random.normal(0, 2, (*shape, WIDTH)).astype(np.float32)), context


class CheckingMesh(Mesh):
    """A mesh of one device that checks what a cluster's compiler is told of each function."""

    def cut(self, *axes):
        """The layout, with the names of its axes."""
        layout = super().cut(*axes)
        self.axes[id(layout)] = axes
        self.layouts.append(layout)  # an id is unique as long as the object lives
        return layout

    def local(self, work, inputs, outputs, shapes, types):
        """Work that is checked at each call."""
        axes = self.axes

        def checked(*arguments):
            assert [len(axes[id(layout)]) for layout in inputs] == [len(argument.shape) for argument in arguments]
            sharded = [argument.shape[0] for layout, argument in zip(inputs, arguments) if "data" in axes[id(layout)]]
            assert set(sharded) == {GROUPS * ROWS}  # tokens, along their first axis; parameters are full
            result = work(*arguments)
            assert [axes[id(layout)] for layout in outputs] == [("data", None)] and result.ndim == 2
            assert list(shapes(*(list(argument.shape) for argument in arguments))) == list(result.shape)
            assert types(*(argument.dtype for argument in arguments)) == result.dtype
            return result

        return checked


def shard_checked(router) -> None:
    """Shards a router over a CheckingMesh."""
    mesh = CheckingMesh.__new__(CheckingMesh)
    mesh.axes, mesh.layouts = {}, []
    mesh.__init__(build({}))
    router.shard(mesh)


def identity_router(name: str, choices: int, experts: int, train: bool = False, **moe):
    """A router of D = E with `weight` the identity."""
    config = tiny_config(width=experts, router=name, expert_num=experts, num_experts_chosen=choices, **moe)
    cell = create_router(config, InitialWeights(0), NoiseSlices())
    cell.weight.set_data(Tensor(np.eye(experts, dtype=np.float32)))
    return cell.set_train(train)


def route(router, logits, valid=None, noise=None) -> dict[str, np.ndarray]:
    """The Routing of one group: logits [N, E], valid [N], noise [J, N, E], as arrays without the group axis."""
    logits = np.array(logits, np.float32)
    valid = np.ones(len(logits)) if valid is None else valid
    context = {"valid": Tensor(np.array([valid], np.float32))}
    if noise is not None:
        context["noise"] = Tensor(np.array(noise, np.float32))
    routing = router(Tensor(logits[None]), context)
    return {name: value.asnumpy()[0] for name, value in routing.items()}
