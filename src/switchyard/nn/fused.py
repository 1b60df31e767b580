"""Which fused operators of Ascend a network is made of.

No MindSpore in here: the planner asks it too. Each stands beside its composed twin in one Cell, which takes the
operator where its name is among these:

    RmsNorm              nn.norm.RMSNorm
    FlashAttentionScore  nn.layers.Attention
    Swiglu               nn.activation.SwiGLU
    MoeTokenPermute      moe.dispatch.alltoallv.Dropless, MoeTokenUnpermute with it

GroupedMatmulV4 of moe.dispatch.alltoallv has no twin on other devices: they train without drops by blocks.
"""

from switchyard.config import Config

NONE: frozenset[str] = frozenset()
HALVES = ("float16", "bfloat16")  # the only types that FlashAttentionScore computes in


def fused_operators(config: Config, target: str) -> frozenset[str]:
    """Names of the operators that the decoder takes on the device `target` (Ascend, GPU or CPU).

    An operator is left out where its documented limits do not hold: FlashAttentionScore wants half precision and heads
    of 16, 32, .. 512 columns.
    """
    model = config.model
    if target != "Ascend" or not config.context.fused_operators or model.type != "decoder":
        return NONE
    size = model.hidden_size // model.num_heads
    fits = model.compute_dtype in HALVES and size % 16 == 0 and size <= 512
    return frozenset({"RmsNorm", "Swiglu", "MoeTokenPermute"} | ({"FlashAttentionScore"} if fits else set()))
