"""Networks made of conditional layers."""

from switchyard.models.decoder import Decoder, create_model
from switchyard.models.generation import Decode, Prefill

__all__ = ["Decode", "Decoder", "Prefill", "create_model"]
