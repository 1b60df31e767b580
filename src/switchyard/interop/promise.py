"""Says whether a mixture of equal experts computes what one of them computes. No MindSpore in here."""

from switchyard.config import Config

# routers whose gates of a row sum to 1 where K >= 2, unless norm_topk_prob is off
NORMALISED = ("top_k", "cosine", "sinkhorn", "sigmoid", "two_level", "multi_gate", "noisy_top_k", "gshard")
UNWEIGHTED = ("hash", "lsh", "random", "random_in_group")  # one expert, gate 1
SOFT = ("dense",)  # all experts, gates that sum to 1
BY_COLUMN = ("top_k", "sigmoid")  # equal columns of the router give equal scores, of which top-k takes all


def why_not_equal(config: Config, slices: int = 1, noise: float = 0.0) -> list[str]:
    """Returns why the first loss in training may differ from that of the dense model; [] where it does not.

    Args:
        config: of the sparse model, in which every expert is a copy of the dense feed-forward.
        slices: m, into which each copy is divided.
        noise: that was added to the copies.
    """
    moe = config.moe
    found = [reason for reason in (_gates(moe), _scale(moe), _slices(moe, slices), _drops(moe)) if reason]
    if noise:
        found.append(f"--noise: {noise:g}; the copies are not equal")
    return found


def _gates(moe) -> str | None:
    """Returns why the gates of a row do not sum to 1."""
    router, chosen = moe.router, moe.num_experts_chosen
    if router in UNWEIGHTED or router in SOFT:
        return None
    if router not in NORMALISED:
        return f"moe.router: {router}; the gates of a row do not sum to 1 (top_k with 2 or more choices does)"
    if chosen == 1:
        return f"moe.num_experts_chosen: 1; {router} does not divide a single gate by itself (2 or more do)"
    if not router.given().get("norm_topk_prob", True):
        return "moe.router.norm_topk_prob: False; the gates of a row sum to less than 1"
    second = router.given().get("second_expert", "all")
    return None if second == "all" else f"moe.router.second_expert: {second}; a refused second choice leaves its gate 0"


def _scale(moe) -> str | None:
    """Returns what multiplies the gates."""
    factor = moe.router.given().get("routed_scaling_factor", 1.0)
    if factor != 1.0:
        return f"moe.router.routed_scaling_factor: {factor:g}; multiplies the gates (1 does not)"
    return f"moe.copies: {moe.copies}; the gates of each copy sum to 1" if moe.copies > 1 else None


def _slices(moe, slices: int) -> str | None:
    """Returns why a row may not visit all slices of a copy."""
    if slices == 1:
        return None
    if moe.router not in BY_COLUMN or moe.router.given().get("n_group", 1) > 1 or moe.copies > 1:
        return f"moe.router: {moe.router}; may choose some slices of a copy ({', '.join(BY_COLUMN)} choose all or none)"
    if moe.num_experts_chosen % slices:
        return f"moe.num_experts_chosen: {moe.num_experts_chosen}; not a multiple of the {slices} slices of a copy"
    return None


def _drops(moe) -> str | None:
    """Returns why a row may lose a choice in training."""
    by_row = moe.router not in SOFT
    if by_row and moe.dispatcher is None and moe.dispatch == "capacity":
        return "moe.dispatch: capacity; a full expert drops choices in training (dropless does not; evaluation neither)"
    return None if moe.dispatcher is None else f"moe.dispatcher: {moe.dispatcher}; may drop choices"
