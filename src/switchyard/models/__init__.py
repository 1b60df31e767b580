"""Networks made of conditional layers."""

from mindspore import nn

from switchyard.config import Config
from switchyard.distributed.mesh import LOCAL, LocalMesh
from switchyard.models.adapters import add_adapters
from switchyard.models.cascade import Cascade
from switchyard.models.decode import Decode
from switchyard.models.decoder import Decoder
from switchyard.models.generation import Prefill
from switchyard.models.seq2seq import Seq2Seq
from switchyard.models.vision import Vision

__all__ = ["Cascade", "Decode", "Decoder", "Prefill", "Seq2Seq", "Vision", "create_model"]


def create_model(
    config: Config, vocab_size: int, length: int | None = None, drawn: bool = True, mesh: LocalMesh = LOCAL
) -> nn.Cell:
    """The network that `model.type` names, weights drawn by `train.seed`.

    Args:
        config: the whole configuration.
        vocab_size: entries V of the tokenizer; what a network that reads images predicts is in the section `vision`.
        length: of the longest sequence of text, at least model.seq_length.
        drawn: False: a model whose weights have shapes and no numbers, see nn.initializers.
        mesh: the devices; `mesh.place(model)` shards the model over them.
    """
    if config.model.type == "seq2seq":
        return Seq2Seq(config, vocab_size, length, drawn, mesh)
    if config.model.type == "decoder":
        model = Decoder(config, vocab_size, length, drawn, mesh)
        if config.train.lora is not None:
            add_adapters(model, config, drawn)
        return model
    return {"vision": Vision, "cascade": Cascade}[config.model.type](config, mesh, drawn)
