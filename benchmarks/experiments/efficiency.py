"""Efficiency and representation: loss against active FLOPs, against parameters and against wall time.

    python benchmarks/experiments/efficiency.py [--short]

Dense models of two hidden widths and Switch models of 2 to 64 experts of the smaller width, same text, same steps.
"Per parameter, mixture-of-experts is less efficient" is read off the middle panel.
"""

from common import arguments, end, run_cases, sections

CASES = {
    "dense, width 256": ({}, {}),
    "dense, width 1024": ({"intermediate_size": 1024}, {}),
    **{f"switch, {experts} experts": ({}, {"expert_num": experts}) for experts in (2, 4, 8, 16, 32, 64)},
}


def main() -> None:
    args = arguments(__doc__)
    cases = {
        name: lambda seed, model=model, moe=moe: sections(model, moe, args.steps, seed)
        for name, (model, moe) in CASES.items()
    }
    run_cases(args, "efficiency", "Efficiency and representation", cases)
    end(args, "efficiency")


if __name__ == "__main__":
    main()
