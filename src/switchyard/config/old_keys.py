"""Keys that stood in the section `moe` before they became options of `moe.router`: accepted for one release."""

from collections.abc import Iterable
from typing import Any

import yaml

from switchyard.config.router_options import OPTIONS, RouterChoice, choice_of, no_such
from switchyard.errors import UserError, represented, shortened

MOVED = {  # key -> its default as long as it stood in `moe`
    "norm_topk_prob": True,
    "hash_table": "balanced",
    "random_draw": "token",
    "consistency_loss_factor": 0.0,
    "second_expert": "all",
    "second_expert_threshold": 0.2,
    "topk_bias_update_rate": 0.001,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "sinkhorn_iterations": 8,
    "n_group": 1,
    "task_num": 1,
    "task_experts": None,
    "slots_per_expert": 1,
}
LATER = {"top_k": ("n_group", "topk_group")}  # options that a router did not have while keys stood in `moe`
NORMALISED = ("gshard", "noisy_top_k", "dense", "soft", "merged", "tree", "task")  # gates sum to 1 whatever is asked


def take_out(tree: dict[str, Any]) -> dict[str, Any]:
    """Takes the old keys out of the section `moe` of a tree and returns them."""
    moe = tree.get("moe")
    return {key: moe.pop(key) for key in list(moe) if key in MOVED} if isinstance(moe, dict) else {}


def check_alike(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuses an option that is given in the old and in the new form with different values (UserError)."""
    for key, value in old.items():
        if key in new and new[key] != value:
            other = represented(new[key])
            raise UserError(f"moe.{key}: {represented(value)}; moe.router.{key} is {other}: leave moe.{key} out")


def options_in(router: Any) -> dict[str, Any]:
    """Returns the options of a router as a tree has it."""
    return {key: value for key, value in router.items() if key != "name"} if isinstance(router, dict) else {}


def put_in(tree: dict[str, Any], old: dict[str, Any], told: Iterable[str], lenient: Iterable[str]) -> None:
    """Makes options of the old keys.

    Args:
        tree: its `moe.router` gets the options.
        old: key -> value.
        told: keys that a note is to name.
        lenient: keys that are left out where the router has no such option.

    Raises:
        UserError: the router has no such option, or not of that value.
    """
    moe = tree.get("moe")
    if not old or not isinstance(moe, dict):
        return
    router = moe.get("router", "switch")
    name = router.get("name") if isinstance(router, dict) else router
    if not isinstance(name, str):
        return  # the check of the field says what is wrong
    options = {**options_in(router)}
    for key, value in old.items():
        if _has(name, key, value):
            options[key] = value
        elif key in LATER.get(name, ()) and key not in lenient and value != MOVED[key]:
            reason = f"moe.router '{name}' did not read it there: write moe.router.{key}, or leave it out"
            raise UserError(f"moe.{key}: {represented(value)}; {reason}")
        elif key not in lenient and not _harmless(name, key, value, moe):
            known = list(OPTIONS[name].model_fields)
            raise UserError(f"moe.{key}: {represented(value)}; {no_such(name, key, known)}")
    moe["router"] = RouterChoice(name, choice_of({**options, "name": name}).options, tuple(told))


def _has(router: str, key: str, value: Any) -> bool:
    """Returns whether an old key becomes an option; of a router in a user's own file any that was changed."""
    if router in OPTIONS:
        return key in OPTIONS[router].model_fields and key not in LATER.get(router, ())
    return value != MOVED[key]


def _harmless(router: str, key: str, value: Any, moe: dict[str, Any]) -> bool:
    """Returns whether a key asks for nothing that a router without such an option contradicts."""
    if value == MOVED[key] or key == "task_num" or (key == "topk_bias_update_rate" and value == 0):
        return True
    return key == "norm_topk_prob" and (router not in NORMALISED or moe.get("num_experts_chosen", 1) == 1)


def notes(router: RouterChoice) -> list[str]:
    """Returns a line that says the new form of the old keys that the user has written; none where there are none."""
    if not router.moved:
        return []
    kind, keys = OPTIONS.get(router), ", ".join(f"moe.{key}" for key in router.moved)
    usual = {name: field.default for name, field in kind.model_fields.items()} if kind else {}
    shown = {key for key, value in router.given().items() if key not in usual or value != usual[key]}
    changed = {key: value for key, value in router.given().items() if key in shown or key in router.moved}
    form = yaml.safe_dump({"name": str(router), **changed}, default_flow_style=True, sort_keys=False, width=10_000)
    form = form.strip() if changed else str(router)
    return [
        f"note: {keys}: the next release reads router options in moe.router only: moe.router={shortened(form, 200)}"
    ]
