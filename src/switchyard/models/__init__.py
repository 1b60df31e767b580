"""Networks made of conditional layers."""

from switchyard.models.decoder import Decode, Decoder, Prefill, create_model

__all__ = ["Decode", "Decoder", "Prefill", "create_model"]
