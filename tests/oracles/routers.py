"""Routers whose matrix is the identity, so that a row is its own logits; any router with inputs that fit it."""

import numpy as np
from mindspore import Tensor
from mindspore import dtype as mstype
from oracles.tiny import tiny_config

from switchyard.config import Config, build
from switchyard.distributed.mesh import CompiledMesh
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
    config, random = tiny_config(width=WIDTH, **keys), np.random.default_rng(0)
    router = create_router(config, InitialWeights(0), NoiseSlices(), VOCABULARY, has_tasks=True)
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


class CheckingMesh(CompiledMesh):
    """A mesh of one device that checks, for GROUPS groups of ROWS tokens, what a compiler is told of each function."""

    def __init__(self, config: Config):
        self.axes, self.layouts = {}, []
        super().__init__(config)

    def layout(self, *axes):
        """The layout, with the names of its axes."""
        layout = super().layout(*axes)
        self.axes[id(layout)] = axes
        self.layouts.append(layout)  # an id is unique as long as the object lives
        return layout

    def local(self, work, inputs, outputs, shapes, types):
        """Work that is checked at each call."""

        def checked(*arguments):
            self.check(inputs, arguments)
            results = work(*arguments)
            several = isinstance(results, tuple)
            parts = results if several else (results,)
            self.check(outputs, parts)
            promised = shapes(*(list(argument.shape) for argument in arguments))
            assert [list(shape) for shape in (promised if several else (promised,))] == [list(p.shape) for p in parts]
            promised = types(*(argument.dtype for argument in arguments))
            assert list(promised if several else (promised,)) == [part.dtype for part in parts]
            return results

        return checked

    def check(self, layouts, tensors) -> None:
        """One layout for each tensor, one name for each axis; of data, only groups and flat tokens are sharded."""
        assert [len(self.axes[id(layout)]) for layout in layouts] == [len(tensor.shape) for tensor in tensors]
        for layout, tensor in zip(layouts, tensors):
            sharded = [size for axis, size in zip(self.axes[id(layout)], tensor.shape) if axis == "data"]
            assert sharded in ([], [GROUPS], [GROUPS * ROWS])


def checking_mesh(config: Config | None = None) -> CheckingMesh:
    """A CheckingMesh of a configuration; of the defaults where only the layouts of a router are asked for."""
    return CheckingMesh(build({}) if config is None else config)


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
