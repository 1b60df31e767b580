"""The k = 1 gradient: what it costs to divide a single gate by itself.

    python benchmarks/experiments/gate_gradient.py [--short]

The same run three times: the Switch gate (the probability), the gate renormalised to 1, which leaves the router without
any gradient from the task (as MindSpore r1.8's nn.transformer.moe and MindFormers' first router do), and a dense model.
"""

from common import arguments, repeat, save, sections

from switchyard.routing import register
from switchyard.routing.softmax import Switch

MOE = {"expert_num": 8, "num_experts_chosen": 1}


@register("renormalised")
class Renormalised(Switch):
    """Switch whose gate is divided by itself. For comparison only: see arXiv 2101.03961, section 2.1, for why not."""

    def weigh(self, gates):
        return gates / gates.clip(1e-9, None)


def main() -> None:
    args, rows = arguments(__doc__), []
    cases = {
        "gate = probability (switch)": {**MOE, "router": "switch"},
        "gate renormalised to 1": {**MOE, "router": "renormalised"},
        "dense, same active FLOPs": {},
    }
    for name, moe in cases.items():
        rows.append(repeat(name, lambda seed, moe=moe: sections(moe=moe, steps=args.steps, seed=seed), args.seeds))
    save(args.out, "gate_gradient", "The gradient of a single gate", args, rows)


if __name__ == "__main__":
    main()
