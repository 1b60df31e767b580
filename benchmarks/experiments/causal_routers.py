"""All causal routers on the same text: same active FLOPs, same steps, next to the dense model.

    python benchmarks/experiments/causal_routers.py [--short]

Eight experts, one chosen (two with half the hidden width where the router wants two), capacity factor 1.25. The case
with a shared expert is the recipe of config/shakespeare_char_switch_cpu.yaml.
"""

from common import arguments, end, run_cases, sections

HALF = 128  # hidden width of an expert where two are chosen
ONE = {"expert_num": 8, "num_experts_chosen": 1}
TWO = {"expert_num": 16, "num_experts_chosen": 2, "moe_intermediate_size": HALF}
SHARED = {  # the recipe of config/shakespeare_char_switch_cpu.yaml: experts and a shared one of a quarter of the width
    "router": {"name": "top_k", "routed_scaling_factor": 6},
    "expert_num": 64,
    "num_experts_chosen": 3,
    "moe_intermediate_size": HALF // 2,
    "shared_expert_num": 1,
    "layers": [0],
    "capacity_factor": 2.0,
    "aux_loss_factor": 0.001,
    "z_loss_factor": 0.0,
}
CASES = {
    "dense model": {},
    "switch": {**ONE, "router": "switch"},
    "switch, gates times 8": {**ONE, "router": {"name": "switch", "routed_scaling_factor": 8}},
    "top_k and a shared expert, layer 0": SHARED,
    "top_k": {**TWO, "router": "top_k"},
    "gshard": {**TWO, "router": {"name": "gshard", "second_expert": "sampling"}},
    "noisy_top_k": {**TWO, "router": "noisy_top_k", "losses": {"importance": 0.1, "load": 0.1}},
    "sigmoid": {**TWO, "router": "sigmoid", "aux_loss_factor": 0.0},
    "sinkhorn": {**ONE, "router": "sinkhorn"},
    "base": {**ONE, "router": "base"},
    "cosine": {**ONE, "router": "cosine"},
    "prototype": {**TWO, "router": "prototype"},
    "two_level": {**ONE, "router": {"name": "two_level", "n_group": 2}},
    "tree": {**ONE, "router": "tree"},
    "dense (soft-dynamic)": {**ONE, "router": "dense"},
    "mixture_of_depths": {"router": "mixture_of_depths", "expert_num": 1, "capacity_factor": 0.5},
    "hash": {**ONE, "router": "hash"},
    "lsh": {**ONE, "router": "lsh"},
    "random (by token)": {**ONE, "router": {"name": "random", "random_draw": "token"}},
    "random (each step)": {**ONE, "router": {"name": "random", "random_draw": "step"}},
}


def main() -> None:
    args = arguments(__doc__)
    cases = {name: lambda seed, moe=moe: sections(moe=moe, steps=args.steps, seed=seed) for name, moe in CASES.items()}
    run_cases(args, "causal_routers", "All causal routers", cases)
    end(args, "causal_routers")


if __name__ == "__main__":
    main()
