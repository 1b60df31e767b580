"""A trained model whose outputs are targets for another: knowledge distillation (arXiv 1503.02531).

Legend: B batch, S sequence, N = B * S tokens, V vocabulary.
"""

import numpy as np
from mindspore import Tensor, nn, ops

from switchyard.checkpoint import store as checkpoint
from switchyard.config import Config
from switchyard.data import Tokenizer
from switchyard.distributed.processes import on_one_device
from switchyard.errors import UserError
from switchyard.models import create_model
from switchyard.trust import check_trusted_section


class Teacher(nn.Cell):
    """Computes the logits of a model as it is evaluated, whatever the mode of the cells around it.

    Its parameters have no gradient and belong to no checkpoint; their names begin with `teacher.`.

    Args:
        model: see models.Decoder.
    """

    def __init__(self, model: nn.Cell):
        super().__init__(auto_prefix=False)
        self.model, self.no_noise = model, Tensor(np.zeros((1, 1, 1), np.float32))
        for parameter in model.get_parameters():
            parameter.requires_grad = False
        model.update_parameters_name("teacher.")
        self.set_train(False)

    def construct(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """Takes tokens [B, S] int32 and valid [B, S], returns logits [N, V] float32 without a gradient."""
        return ops.stop_gradient(self.model(tokens, valid, self.no_noise)[0])

    def add_flags_recursive(self, **flags):
        """Keeps the mode of evaluation when a step switches all of its cells to training."""
        if "training" in flags:
            flags["training"] = False
        return super().add_flags_recursive(**flags)


class SoftLoss(nn.Cell):
    """Computes the cross-entropy of a student with the probabilities of its teacher, both at a temperature.

    T^2 * -sum over v of softmax(teacher / T)[v] * log softmax(student / T)[v] (arXiv 1503.02531, section 2).

    Args:
        temperature: T.
    """

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature, self.softmax, self.log_softmax = temperature, ops.Softmax(-1), ops.LogSoftmax(-1)

    def construct(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Takes logits [N, V] of both, returns losses [N]."""
        heat = self.temperature
        return -(self.softmax(teacher / heat) * self.log_softmax(student / heat)).sum(-1) * (heat * heat)


def read_teacher(config: Config, vocab_size: int) -> Teacher | None:
    """Returns the teacher that train.distill names; None where it names none.

    Args:
        config: of the student.
        vocab_size: of its tokenizer.

    Raises:
        UserError: a checkpoint that cannot be read, or whose model reads other tokens or shorter sequences.
    """
    if config.train.distill is None:
        return None
    place = config.train.distill.teacher
    try:
        held = checkpoint.read(place, with_optimizer=False)
    except UserError as error:
        raise UserError(f"train.distill.teacher: {error}") from None
    check_trusted_section(held.config.moe, consent=False, say=print)
    found = Tokenizer.from_json(held.tokenizer_json, "of the teacher").vocab_size
    if found != vocab_size:
        reason = f"its vocabulary has {found:,} entries, that of the student {vocab_size:,}"
        raise UserError(f"train.distill.teacher: '{place}'; {reason}: take the tokenizer of the teacher")
    own, length = on_one_device(held.config), config.model.seq_length
    if own.model.position == "learned" and own.model.seq_length < length:
        reason = f"it reads {own.model.seq_length} tokens (learned positions), the student {length}"
        raise UserError(f"train.distill.teacher: '{place}'; {reason}: set model.seq_length")
    moe = own.moe.model_copy(update={"record": None, "replay": None, "groups": 1})
    model = create_model(own.model_copy(update={"moe": moe}), vocab_size, length=length)
    checkpoint.load_weights(model, held.weights)
    return Teacher(model)
