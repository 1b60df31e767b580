"""Which operators a network is made of on the device, where the plain composition is slower.

No MindSpore in here: the planner asks it too. Each stands beside its composed twin in one Cell, which takes the
operator where its name is among these:

    Ascend, fused operators
        RmsNorm              nn.norm.RMSNorm
        FlashAttentionScore  nn.layers.Attention
        Swiglu               nn.activation.SwiGLU
        MoeTokenPermute      moe.dispatch.alltoallv.Dropless, MoeTokenUnpermute with it
    GPU
        LayerNorm            nn.norm.LayerNorm
        HalfAttention        nn.half_attention.HalfAttention and nn.rotary.RotationOfAll, float16
        SiLU                 nn.activation.SwiGLU
        AbsGrad              nn.activation.Relu
        CountedOrder         moe.dispatch.counted_order.CountedOrder
        HalfLogits           models.decoder.Decoder and nn.cross_entropy.TokenLosses: float16 logits in training
        HalfRows             moe.dispatch.dispatchers.SlotDispatcher: float16 rows to the experts and back
    CPU
        NormGradient         nn.norm.RMSNorm and LayerNorm, see nn.norm_gradient
        FloatAttention       nn.float_attention.FloatAttention, float32

GroupedMatmulV4 of moe.dispatch.alltoallv has no twin on other devices: they train without drops by blocks.
"""

from switchyard.config import Config
from switchyard.config.schema import ModelConfig

NONE: frozenset[str] = frozenset()
# the encoder-decoder has a bias of positions
OF_DECODER = {"FlashAttentionScore", "HalfAttention", "HalfLogits", "FloatAttention"}
HALVES = ("float16", "bfloat16")  # the only types that FlashAttentionScore computes in
MASK_LIMIT = 2**25  # values of the mask of HalfAttention: 64 MiB in float16


def fused_operators(config: Config, target: str) -> frozenset[str]:
    """Returns the names of the operators that the network of text takes on the device `target` (Ascend, GPU or CPU).

    An operator is left out where its limits do not hold: FlashAttentionScore wants half precision and heads of 16, 32,
    .. 512 columns; HalfAttention wants float16 and FloatAttention float32, both a mask of at most MASK_LIMIT values.
    """
    if not config.context.fused_operators or not config.reads_text:
        return NONE
    found = {"Ascend": of_ascend, "GPU": of_gpu, "CPU": of_cpu}[target](config.model)
    if config.model.type == "seq2seq":
        return found - OF_DECODER
    reads_twice = config.moe.consistency_loss_factor > 0 or config.train.distill is not None
    return found - {"HalfLogits"} if reads_twice else found


def of_ascend(model: ModelConfig) -> frozenset[str]:
    """Returns the fused operators of Ascend that fit a model."""
    size = model.size_of_head
    fits = model.compute_dtype in HALVES and size % 16 == 0 and size <= 512
    return frozenset({"RmsNorm", "Swiglu", "MoeTokenPermute"} | ({"FlashAttentionScore"} if fits else set()))


def of_gpu(model: ModelConfig) -> frozenset[str]:
    """Returns the operators that are faster on a GPU than the composition for CPU, and fit a model."""
    mask = model.num_heads // model.kv_heads * model.seq_length**2
    half = model.compute_dtype == "float16"
    found = {"LayerNorm", "SiLU", "AbsGrad", "CountedOrder"} | ({"HalfRows", "HalfLogits"} if half else set())
    return frozenset(found | ({"HalfAttention"} if half and mask <= MASK_LIMIT else set()))


def of_cpu(model: ModelConfig) -> frozenset[str]:
    """Returns the operators and gradients that are faster on CPU than what MindSpore derives, and fit a model."""
    whole = model.compute_dtype == "float32" and model.seq_length**2 <= MASK_LIMIT
    return frozenset({"NormGradient"} | ({"FloatAttention"} if whole else set()))
