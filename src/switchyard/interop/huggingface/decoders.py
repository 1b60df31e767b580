"""Describes a family of decoders: what its attention and its experts are, and the names in its config.json."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from switchyard.config import Config
from switchyard.interop.huggingface.facts import decoder_facts
from switchyard.interop.huggingface.family import Family
from switchyard.interop.huggingface.rules import Parameter, Rule, parameters
from switchyard.interop.huggingface.settings import from_config, to_config

LAYER_OF = re.compile(r"model\.layers\.(\d+)\.")
# tensors that files may hold and models do not need: pattern -> why they are left out
COMPUTED = {
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "is computed from the configuration",
    r"model\.rotary_emb\.inv_freq": "is computed from the configuration",
}


@dataclass(frozen=True)
class Experts:
    """Describes the conditional layers of a family by the keys of its config.json.

    Attributes:
        count: key of the number of experts.
        width: key of the hidden width of an expert.
        router: moe.router of ours.
        normalised: key that says whether gates are divided by their sum; True = they always are.
        places: which layers are conditional: all, by decoder_sparse_step and mlp_only_layers, or by
            first_k_dense_replace.
        shared: shared experts: none, one with a gate (shared_expert_intermediate_size), or n_shared_experts.
    """

    count: str
    width: str
    router: Literal["top_k", "sigmoid"] = "top_k"
    normalised: str | bool = "norm_topk_prob"
    places: Literal["all", "step", "first dense"] = "step"
    shared: Literal["none", "gated", "counted"] = "none"


@dataclass(frozen=True)
class DecoderFamily(Family):
    """Describes one family of decoders by what its attention and its experts are.

    Attributes:
        model_type, architecture: of its config.json.
        defaults: what transformers takes where config.json lacks a key; other keys are required.
        rules: what becomes of its tensors.
        bias: (key that says whether attention has biases, None = it always has; model.attention_bias of ours); None =
            it never has.
        qk_norm: the same of model.qk_norm.
        window: how config.json gives the sliding window: "plain" = sliding_window; "switched" = with
            use_sliding_window; "layered" = by layer_types, or from max_window_layers on, too; "bottom" = as Qwen2-MoE.
        partial_rotary: whether partial_rotary_factor is read.
        own_head_size: whether head_dim may be another than hidden_size / num_attention_heads.
        experts: None = a dense model.
        extra: keys of config.json that always have these values.
    """

    model_type: str
    architecture: str
    defaults: dict[str, Any]
    rules: tuple[Rule, ...]
    bias: tuple[str | None, Literal["qkv", "all"]] | None = None
    qk_norm: tuple[str | None, Literal["head", "full"]] | None = None
    window: Literal["none", "plain", "switched", "layered", "bottom"] = "none"
    partial_rotary: bool = False
    own_head_size: bool = True
    experts: Experts | None = None
    extra: tuple[tuple[str, Any], ...] = ()

    @property
    def sparse(self) -> bool:
        """See Family."""
        return self.experts is not None

    def read(self, tree: dict[str, Any], name: str = "imported") -> tuple[Config, list[str]]:
        """See Family.read."""
        return to_config(self, tree, name)

    def write(self, config: Config, vocab_size: int) -> dict[str, Any]:
        """See Family.write."""
        return from_config(self, config, vocab_size)

    def parameters(self, config: Config, vocab_size: int) -> Iterator[Parameter]:
        """See Family.parameters."""
        return parameters(self.rules, config, vocab_size)

    def facts(self, config: Config) -> dict[str, Any]:
        """See Family.facts."""
        return decoder_facts(config)

    def unfit(self, config: Config) -> str | None:
        """See Family.unfit."""
        if config.model.type != "decoder":
            return f"model.type: {config.model.type}"
        if config.moe_layers and not self.sparse:
            return f"moe.expert_num: {config.moe.expert_num}"
        if self.experts is not None and self.experts.places == "all" and not config.moe_layers:
            return "moe.layers: []"
        return super().unfit(config)

    def left_out(self, name: str, tree: dict[str, Any]) -> str | None:
        """See Family.left_out."""
        if name == "lm_head.weight":  # a head of its own is a parameter
            return "is the embedding table (tie_word_embeddings)"
        for pattern, reason in COMPUTED.items():
            if re.fullmatch(pattern, name):
                return reason
        layer, extra = LAYER_OF.match(name), tree.get("num_nextn_predict_layers")
        if layer and isinstance(extra, int) and 0 <= int(layer[1]) - tree["num_hidden_layers"] < extra:
            return "predicts the token after the next (num_nextn_predict_layers)"
        return None
