"""The table of all routers: `python -m switchyard.moe.routing`."""

import sys
from collections.abc import Iterator

from switchyard import cli
from switchyard.moe.routing import known_routers
from switchyard.moe.routing.base import why_not_sharded
from switchyard.text_table import table

HEADINGS = ("name", "unit", "form", "learnable", "causal", "sharded", "losses", "needs", "paper")


def main(arguments: list[str]) -> None:
    """Prints the table and nothing else on stdout."""
    cli.Parser("python -m switchyard.moe.routing", description="Lists what moe.router may be.").parse_args(arguments)
    print(listing())


def listing() -> str:
    """Returns one line for each router and, below the table, what its columns mean."""
    return "\n".join([*table(HEADINGS, rows()), "", *LEGEND])


LEGEND = (
    "unit: what a decision is made for: a row of the layer, a token by its id, a task, or a whole group.",
    "form: how rows and experts meet in training; after / at evaluation, where it differs.",
    "causal: at evaluation no row's routing looks at later rows; the decoder takes these only.",
    "sharded: how several devices train it: by the compiler, with all degrees (Ascend, GPU; text), or by explicit "
    "collectives, with data parallelism, and text with expert parallelism too; see docs/distributed.md.",
    "losses: switch by moe.aux_loss_factor, z by moe.z_loss_factor, the others by moe.losses.",
    "needs: what the network must give besides the rows.",
)


def rows() -> Iterator[tuple[str, ...]]:
    """The cells of each router, by name."""
    for name, router in known_routers().items():
        form = f"{router.form} / {router.eval_form}" if router.eval_form else router.form
        learnable, causal = ("yes" if flag else "no" for flag in (router.learnable, router.causal))
        losses, needs = (", ".join(names) or "-" for names in (router.losses, router.needs))
        yield name, router.unit, form, learnable, causal, sharded_by(router), losses, needs, router.paper


def sharded_by(router: type) -> str:
    """Returns what shards a router over devices: the compiler, in a decoder, which is causal and knows no tasks; or
    explicit collectives."""
    in_decoder = router.causal and "task_ids" not in router.needs
    return "compiler" if in_decoder and why_not_sharded(router) is None else "explicit"


if __name__ == "__main__":
    sys.exit(cli.run(main))
