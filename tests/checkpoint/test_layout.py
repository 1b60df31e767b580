"""What a checkpoint says a rank holds is what the compiler gives it."""

import math

import pytest
from oracles.tiny_checkpoint import config_of

from switchyard.checkpoint.layout import is_writer, shard_of
from switchyard.checkpoint.tensors import size_of
from switchyard.distributed.placement import ParallelDims, placement
from switchyard.models import create_model
from switchyard.simulation.compile import compile_step

VOCABULARY, RANK = 24, 5
DEGREES = {"data_parallel": 4, "expert_parallel": 2, "model_parallel": 2, "optimizer_shard": 1}


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of the network on one device."""
    return {each.name: tuple(each.shape) for each in create_model(config_of(), VOCABULARY).get_parameters()}


@pytest.mark.slow
def test_slices_are_those_of_the_compiler(shapes):
    """Experts, tensor parallel and ZeRO at once: shapes of weights and moments, and ZeRO's groups in rank order."""
    degrees, layers = ParallelDims(**DEGREES), config_of().model.num_layers
    report = compile_step(config_of(**DEGREES), degrees.devices, RANK, VOCABULARY)
    moments = {f"{moment}.{name}": shape for moment in ("moment1", "moment2") for name, shape in shapes.items()}
    whole = shapes | moments
    assert whole.keys() <= report.parameters.keys()
    for name, shape in whole.items():
        assert size_of(shard_of(name, shape, degrees, RANK, layers)) == report.parameters[name], name
    gathered = {one.parameter: one.group for one in report.collectives if one.kind == "AllGather" and one.parameter}
    assert any(".experts." in name for name in gathered) and any("norm" in name for name in gathered)
    for name, group in gathered.items():
        assert group == degrees.replicas(placement(name, shapes[name], degrees), RANK), name


@pytest.mark.parametrize("zero", [0, 1])
def test_every_slice_has_one_writer(shapes, zero):
    """Over all ranks the parts that are written are each element once."""
    degrees, layers = ParallelDims(4, 2, 2, 2, zero), config_of().model.num_layers
    for name, shape in shapes.items():
        boxes = [
            shard_of(name, shape, degrees, rank, layers)
            for rank in range(degrees.devices)
            if is_writer(name, shape, degrees, rank, layers)
        ]
        assert len({tuple((part.start, part.stop) for part in box) for box in boxes}) == len(boxes)
        assert sum(math.prod(size_of(box)) for box in boxes) == math.prod(shape), name
