"""Says, before any process is started, whether `train.py` would train a configuration on so many devices.

`python -m switchyard.training.launch --config FILE --devices N --target GPU [section.key=value ...]` prints nothing
and ends with 0, or one line and 2, as `train.py` itself would. The launch scripts' --dry-run asks it; no MindSpore is
imported unless moe.router names a class in a file of the user's own.
"""

import sys

from switchyard import cli
from switchyard import config as configuration
from switchyard.errors import UserError
from switchyard.training.evaluate_keys import config_of, degrees_of_export, degrees_of_job
from switchyard.training.limits import check_mesh, of_sizes, refuse

TARGETS = ("Ascend", "GPU", "CPU")


def main(arguments: list[str]) -> None:
    """Runs `python -m switchyard.training.launch`, see the module."""
    parser = cli.create_parser("python -m switchyard.training.launch", "Checks keys and degrees of a job of N devices.")
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument("--config", metavar="FILE", help="a YAML file, see config/")
    job.add_argument("--eval", metavar="RUN", help="a run folder or a checkpoint, which is evaluated")
    job.add_argument("--export", metavar="RUN", help="a run folder or a checkpoint, which is exported")
    parser.add_argument("--devices", required=True, type=int, metavar="N", help="devices of all nodes together")
    parser.add_argument("--target", required=True, choices=TARGETS, help="type of the devices")
    parser.add_argument(
        "--resume", action="store_true", help="overrides, as for train.py; the run folder is not checked"
    )
    parser.add_argument("--restarted", action="store_true", help="as for train.py; the run folder is not checked")
    parser.add_argument("--init", metavar="RUN", help="as for train.py; the weights are not read")
    parser.add_argument(
        "--instead-of",
        type=int,
        metavar="W",
        help="print the keys by which --devices N go on with the steps that W devices did",
    )
    cli.add_trust_code(parser)
    chosen = parser.parse_intermixed_args(arguments)
    if chosen.devices < 1:
        raise UserError(f"--devices: {chosen.devices}; at least 1")
    read, degrees = (chosen.eval, degrees_of_job) if chosen.eval is not None else (chosen.export, degrees_of_export)
    if read is not None:
        device = lambda context: chosen.target  # noqa: E731
        degrees(config_of(read), chosen.overrides, chosen.devices, device, chosen.trust_code, silent)
        return
    keys = []
    if chosen.instead_of is not None:
        before = configuration.load(chosen.config, chosen.overrides, devices=chosen.instead_of)
        keys = keys_of_fewer(before, chosen.devices)
    config = configuration.load(chosen.config, [*chosen.overrides, *keys], devices=chosen.devices)
    check_mesh(config, chosen.devices, chosen.target)
    refuse(of_sizes(config, chosen.target))
    if keys:
        print(*keys)


def keys_of_fewer(before: configuration.Config, devices: int) -> list[str]:
    """Returns the keys by which fewer devices do the same steps: as many sequences a device, and more micro-batches.

    Args:
        before: the configuration of all devices.
        devices: that are left; the data-parallel replicas are fewer, all other degrees stay.

    Raises:
        UserError: devices, or sequences, that do not divide.
    """
    parallel, steps, batch = before.parallel, before.train.gradient_accumulation_steps, before.data.batch_size
    if parallel.pipeline_stage > 1:
        raise UserError(f"parallel.pipeline_stage: {parallel.pipeline_stage}; fewer devices go on without stages only")
    each, replicas = batch // parallel.data_parallel, devices // parallel.model_parallel
    if devices % parallel.model_parallel or not replicas or (steps * batch) % (each * replicas):
        raise UserError(
            f"--devices: {devices}; they cannot share the {steps * batch} sequences of a step by {each} a device, with "
            f"parallel.model_parallel {parallel.model_parallel}"
        )
    accumulation = steps * batch // (each * replicas)
    return [
        f"parallel.data_parallel={replicas}",
        f"data.batch_size={each * replicas}",
        f"train.gradient_accumulation_steps={accumulation}",
    ]


def silent(line: str) -> None:
    """Says nothing."""


if __name__ == "__main__":
    sys.exit(cli.run(main))
