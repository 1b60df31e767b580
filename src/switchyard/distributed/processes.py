"""Joins the processes of one job that msrun started: how many, which one this is, what they tell each other.

Between steps they exchange NumPy arrays, which is all that evaluation, checkpoints and signals need; what a step
itself exchanges stands in its graph (distributed.collectives). One process alone is the usual case, `SINGLE`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from switchyard.config import Config
from switchyard.distributed.placement import ParallelDims
from switchyard.errors import UserError

LONGEST_TEXT = 4096  # bytes, as of a path
WORKER, SCHEDULER = "MS_WORKER", "MS_SCHED"  # what msrun writes into MS_ROLE
BLOCKING = (
    "launch: kernel launches are synchronous on this run (up to 33 % slower), because on GPU MindSpore 2.9 may run "
    "several AllReduce of one step concurrently with its kernels. Set parallel.optimizer_shard=1 to avoid this "
    "(not possible with model_parallel > 1)."
)
RACING = (
    "warning: launch: the AllReduce of this step may race with its kernels, and kernel launches are not synchronous. "
    "Set context.launch_blocking=true. Without it, only the replica check (train.replica_check_every={every}) can "
    "detect corrupted gradients."
)


def world_size(environment: Mapping[str, str] = os.environ) -> int:
    """Returns the number of processes of this job: 1 where msrun did not start the process."""
    if environment.get("MS_ROLE") not in (WORKER, SCHEDULER):
        return 1
    return int(environment.get("MS_WORKER_NUM", "1"))


def is_scheduler(environment: Mapping[str, str] = os.environ) -> bool:
    """Returns whether msrun started this process as the scheduler, which joins the others and does no work."""
    return environment.get("MS_ROLE") == SCHEDULER


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Returns whether this process writes files (rank 0, or a single process); works before the process group
    exists."""
    return not is_scheduler(environment) and own_rank(environment) == 0


def own_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Returns the rank of this process; works before the process group exists."""
    return int(environment.get("RANK_ID", "0")) if world_size(environment) > 1 else 0


def require_one_device(config: Config) -> None:
    """Refuses any degree (UserError): one process reads what many have written."""
    usual = type(config.parallel)()
    for name, value in config.parallel:
        if value != getattr(usual, name):
            raise UserError(
                f"parallel.{name}: {value}; this command is one process: leave it out, or use a launch script with "
                "--eval or --export"
            )


@dataclass(frozen=True)
class Processes:
    """Describes the process group of the job, as this process sees it.

    Attributes:
        rank: which one this is, from 0.
        size: how many there are.
        degrees: how the model is sharded over them.
    """

    rank: int = 0
    size: int = 1
    degrees: ParallelDims = field(default_factory=ParallelDims)

    @property
    def is_first(self) -> bool:
        """Returns whether this process writes the run folder."""
        return self.rank == 0

    @property
    def data_shard(self) -> int:
        """Returns the index, from 0, of the data-parallel shard that this process reads."""
        return self.degrees.data_shard(self.rank)

    def gather(self, array: np.ndarray) -> np.ndarray:
        """Gathers the arrays of all processes, which have one shape and type, on each process: [...] -> [size, ...]."""
        array = np.ascontiguousarray(array)
        if self.size == 1:
            return array[None]
        from mindspore import Tensor, ops

        raw = array.reshape(-1).view(np.uint8)
        words = np.zeros(-(-raw.size // 4), np.int32)  # AllGather takes no float64, and no bytes
        words.view(np.uint8)[: raw.size] = raw
        gathered = ops.AllGather()(Tensor(words[None])).asnumpy()  # [size, words]
        parts = [part.view(np.uint8)[: raw.size].view(array.dtype) for part in gathered]
        return np.stack(parts).reshape(self.size, *array.shape)

    def any_rank(self, flag: bool) -> bool:
        """Returns whether the flag is set on any process; all processes get the same answer."""
        return bool(self.gather(np.array([flag], np.int32)).any())

    def of_first(self, text: str) -> str:
        """Returns the text of the first process, at most LONGEST_TEXT bytes of it, on every process."""
        raw = np.zeros(LONGEST_TEXT, np.uint8)
        encoded = np.frombuffer(os.fsencode(text)[:LONGEST_TEXT], np.uint8)
        raw[: len(encoded)] = encoded
        return os.fsdecode(self.gather(raw)[0].tobytes().rstrip(b"\0"))

    def barrier(self) -> None:
        """Returns when all processes have come here."""
        self.gather(np.zeros(1, np.int32))

    def part(self, array: np.ndarray, axis: int) -> np.ndarray:
        """Returns the shard of the batch of this process: an even part of `axis`."""
        if self.size == 1:
            return array
        length, index = array.shape[axis] // self.degrees.data_parallel, self.data_shard
        return array.take(range(index * length, (index + 1) * length), axis)

    def full(self, array: np.ndarray, axis: int) -> np.ndarray:
        """Returns the inverse of `part`, on every process."""
        if self.size == 1:
            return array
        ranks = {self.degrees.data_shard(rank): rank for rank in range(self.size)}
        parts = self.gather(array)
        return np.concatenate([parts[rank] for _, rank in sorted(ranks.items())], axis)


SINGLE = Processes()


def init_process_group(config: Config) -> Processes:
    """Joins the processes that msrun started; returns when all are there. The device has been chosen before.

    The scheduler's process does not return from here before the job has ended.
    """
    if world_size() == 1:
        return SINGLE
    import mindspore as ms
    from mindspore.communication import get_group_size, get_rank, init

    if ms.get_context("device_target") == "GPU" and must_block(config):
        ms.runtime.launch_blocking()
        if own_rank() == 0:
            print(BLOCKING, flush=True)
    init()
    return Processes(get_rank(), get_group_size(), ParallelDims.of(config.parallel))


def must_block(config: Config) -> bool:
    """Returns whether several GPUs wait for each kernel: where the step sums gradients or activations by AllReduce,
    which MindSpore 2.9 can let race with the kernels that make and read them. With ZeRO most are ReduceScatter and
    AllGather; of the compiled graph `graph.sums_may_race` knows.
    """
    if config.context.launch_blocking is not None:
        return config.context.launch_blocking
    parallel = config.parallel
    return (parallel.data_parallel > 1 and parallel.optimizer_shard == 0) or parallel.model_parallel > 1


def waits_for_nothing(config: Config, processes: Processes) -> bool:
    """Returns whether this is one of several GPUs with asynchronous kernel launches."""
    import mindspore as ms

    return processes.size > 1 and ms.get_context("device_target") == "GPU" and not must_block(config)


def local_config(config: Config, processes: Processes) -> Config:
    """Returns the configuration of one process: its part of the micro-batch, and its routing groups."""
    if processes.size == 1:
        return config
    data = config.data.model_copy(update={"batch_size": config.data.batch_size // processes.size})
    moe = config.moe.model_copy(update={"groups": config.groups // processes.size})
    return config.model_copy(update={"data": data, "moe": moe})


def on_one_device(config: Config) -> Config:
    """Returns the configuration for evaluation on one device: no degrees, and the same routing groups where groups
    matter.

    They do where an expert has a capacity, or chooses its rows; a decoder without drops gives a row the same whatever
    stands beside it, and takes batches of any size as one group.
    """
    if config.parallel == type(config.parallel)():
        return config
    free = config.reads_text and config.moe.eval_capacity_factor is None
    moe = config.moe.model_copy(update={"groups": config.moe.groups if free else config.groups})
    return config.model_copy(update={"moe": moe, "parallel": type(config.parallel)()})
