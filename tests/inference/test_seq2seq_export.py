"""An exported encoder-decoder: its files answer as the model in the checkpoint does."""

import numpy as np
import pytest
from mindspore import Tensor
from oracles.tiny import NO_NOISE
from oracles.tiny_export import quiet, save_run

from switchyard.api.models import load_checkpoint
from switchyard.config.seq2seq import END, PAD
from switchyard.errors import UserError
from switchyard.inference.export import export
from switchyard.inference.generate import encode_prompts, generate
from switchyard.inference.mindir import open_model
from switchyard.inference.sampling import Sampling

MODEL = {"type": "seq2seq", "num_layers": 1, "seq_length": 16}
NEW = 3


def greedy(model, prompt: np.ndarray) -> list[int]:
    """The likeliest answer, by the whole model again and again."""
    found = [PAD]
    for _ in range(NEW):
        tokens = np.concatenate((prompt, found))[None].astype(np.int32)
        valid = np.ones((1, len(found)), np.float32)
        logits = model(Tensor(tokens), Tensor(valid), Tensor(NO_NOISE))[0].asnumpy()
        found.append(int(logits[-1].argmax()))
    return found[1:]


@pytest.mark.long
def test_files_answer_as_the_model_does(tmp_path, graph):
    run, _ = save_run(tmp_path, model=MODEL, moe={"expert_num": 4, "router": "switch"})
    written = export(run, tmp_path / "out", say=quiet)
    assert set(written.graphs) == {"encoder", "prefill", "decode"} and written.model.moe_layers == (0, 1)
    assert written.parity.max_abs_difference < 1e-4 and written.parity.decode_positions > 0
    model, prompts = open_model(tmp_path / "out", say=quiet), ["line <extra_id_0> sheep", "the gates"]
    ids = encode_prompts(model, prompts)
    assert [one[-1] for one in ids] == [END, END] and model.tokenizer.sentinel(0) in ids[0]
    found, timing = generate(model, prompts, NEW, Sampling(temperature=0))
    import mindspore as ms

    ms.set_context(mode=ms.PYNATIVE_MODE)
    whole = load_checkpoint(run)
    for one, prompt in zip(found, ids):
        wanted = greedy(whole, prompt)
        if END not in wanted:
            assert one.text == whole.tokenizer.decode(wanted)
    assert timing.prompt_tokens == sum(map(len, ids))
    with pytest.raises(UserError, match="prompt: 18 tokens; the model holds 16 of a prompt and its end"):
        encode_prompts(model, ["e" * 17])
