"""Defines the sub-section `model.rotary_scaling`: how rotary frequencies change for longer text than was trained on.

The names of the keys are those of `rope_scaling` in a config.json of Hugging Face. `nn.rotary_scaling` computes them.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from switchyard.config.sections import Positive, Section, Weight

Factor = Annotated[float, Field(ge=1)]
Above = Annotated[float, Field(gt=0)]


class LinearScaling(Section):
    """Position interpolation (arXiv 2306.15595, eq. 4): every frequency is divided by `factor`."""

    type: Literal["linear"]
    factor: Factor = Field(description="how much longer the text may be")


class Llama3Scaling(Section):
    """The scaling of Llama 3.1 (arXiv 2407.21783): slow frequencies are divided, fast ones stay.

    A frequency that turns fewer than `low_freq_factor` times in the original length is divided by `factor`; one that
    turns more than `high_freq_factor` times stays; between them the division fades out linearly.
    """

    type: Literal["llama3"]
    factor: Factor = Field(description="how much longer the text may be")
    low_freq_factor: Above = Field(description="turns in the original length below which a frequency is divided")
    high_freq_factor: Above = Field(description="turns in the original length above which a frequency stays")
    original_max_position_embeddings: Positive = Field(description="longest text of the first training")


class YarnScaling(Section):
    """YaRN (arXiv 2309.00071, section 3.2 and eq. 22): slow frequencies are divided, fast ones stay, scores are scaled.

    The ramp between both goes over the columns of a head. Cosines and sines are multiplied by `attention_factor`; null
    computes it: m(factor, mscale) / m(factor, mscale_all_dim) where both are given and not 0, else m(factor, 1), with
    m(s, a) = 0.1 a ln(s) + 1.
    """

    type: Literal["yarn"]
    factor: Factor = Field(description="how much longer the text may be")
    beta_fast: Above = Field(32.0, description="turns in the original length from which a frequency stays")
    beta_slow: Above = Field(1.0, description="turns in the original length below which a frequency is divided")
    attention_factor: Above | None = Field(None, description="factor of cosines and sines; null = computed")
    mscale: Weight | None = Field(None, description="weight of the logarithm in the computed factor's numerator")
    mscale_all_dim: Weight | None = Field(None, description="the same in its denominator")
    original_max_position_embeddings: Positive = Field(description="longest text of the first training")


def _type_of(value: Any) -> Any:
    """Returns the type that a mapping, or a sub-section, names; None where it names none."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) else None


RotaryScaling = Annotated[
    Annotated[LinearScaling, Tag("linear")]
    | Annotated[Llama3Scaling, Tag("llama3")]
    | Annotated[YarnScaling, Tag("yarn")],
    Discriminator(
        _type_of,
        custom_error_type="scaling_type",
        custom_error_message="must be a mapping whose type is linear, llama3 or yarn",
    ),
]


def scaling_laws(scaling, theta):
    """Yields (holds, key, value, what is allowed) of a sub-section that is not None; theta: base of the frequencies."""
    key = "model.rotary_scaling"
    if isinstance(scaling, Llama3Scaling):
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        yield low < high, f"{key}.high_freq_factor", high, f"must be above {key}.low_freq_factor ({low})"
    if isinstance(scaling, YarnScaling):
        slow, fast = scaling.beta_slow, scaling.beta_fast
        yield slow < fast, f"{key}.beta_fast", fast, f"must be above {key}.beta_slow ({slow})"
        yield theta > 1, "model.theta", theta, f"must be above 1 where {key} is yarn"
        alone = (scaling.mscale is None) == (scaling.mscale_all_dim is None)
        yield alone, f"{key}.mscale", scaling.mscale, "mscale and mscale_all_dim are read together: give both or none"
        idle = scaling.attention_factor is None or scaling.mscale is None
        yield idle, f"{key}.mscale", scaling.mscale, f"{key}.attention_factor replaces it: leave one of them out"
