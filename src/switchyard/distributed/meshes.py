"""Chooses the mesh that a job runs on."""

from switchyard.config import Config
from switchyard.distributed.collectives import ProcessMesh
from switchyard.distributed.mesh import LOCAL, CompiledMesh, LocalMesh
from switchyard.distributed.processes import Processes


def create_mesh(config: Config, processes: Processes, compiled: bool) -> LocalMesh:
    """Returns the mesh of the processes that this one has met.

    Args:
        config: the degrees.
        processes: all of them.
        compiled: whether MindSpore's compiler shards the graph.
    """
    if processes.size == 1 and not compiled:
        return LOCAL
    return CompiledMesh(config, processes) if compiled else ProcessMesh(processes)
