"""The k = 1 gradient: what it costs to divide a single gate by itself.

    python benchmarks/experiments/gate_gradient.py [--short]

The same run three times: the Switch gate (the probability), the gate renormalised to 1, which leaves the router without
any gradient from the task (as MindSpore r1.8's nn.transformer.moe and MindFormers' first router do), and a dense model.
"""

from common import arguments, end, run_cases, sections

from switchyard.moe.routing import register
from switchyard.moe.routing.softmax import Switch

MOE = {"expert_num": 8, "num_experts_chosen": 1}


@register("renormalised")
class Renormalised(Switch):
    """Switch whose gate is divided by itself. For comparison only: see arXiv 2101.03961, section 2.1, for why not."""

    def weigh(self, gates):
        return gates / gates.clip(1e-9, None)


CASES = {
    "gate = probability (switch)": {**MOE, "router": "switch"},
    "gate renormalised to 1": {**MOE, "router": "renormalised"},
    "dense, same active FLOPs": {},
}


def main() -> None:
    args = arguments(__doc__)
    cases = {name: lambda seed, moe=moe: sections(moe=moe, steps=args.steps, seed=seed) for name, moe in CASES.items()}
    run_cases(args, "gate_gradient", "The gradient of a single gate", cases)
    end(args, "gate_gradient")


if __name__ == "__main__":
    main()
