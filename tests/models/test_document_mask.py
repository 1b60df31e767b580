"""data.document_mask: a packed sequence equals its documents one by one; the loss stays within them."""

import json

import numpy as np
import pytest
from mindspore import Tensor

from switchyard import config
from switchyard.data import load_data
from switchyard.data.batches import IGNORED
from switchyard.errors import UserError
from switchyard.models import create_model
from switchyard.models.decoder import mask_documents
from switchyard.training.loop import train
from switchyard.training.loss import TrainLoss
from switchyard.training.scores import EvalStep

SIZE = ["model.hidden_size=16", "model.num_heads=4", "model.n_kv_heads=2", "model.num_layers=2", "moe.expert_num=1"]
PLAIN = [*SIZE, "model.seq_length=12", "data.batch_size=2", "context.mode=pynative", "model.init_method_std=0.3"]


def decoder(*overrides):
    built = config.build({}, [*PLAIN, "data.document_mask=true", *overrides])
    model = create_model(built, 20)
    mask_documents(model, 0)
    return built, model


def logits(model, tokens):
    tokens = np.array(tokens, np.int32)
    noise = Tensor(np.zeros((1, 1, 1), np.float32))
    out = model(Tensor(tokens), Tensor(np.ones(tokens.shape, np.float32)), noise)[0].asnumpy()
    return out.reshape(*tokens.shape, -1)


@pytest.mark.parametrize("overrides", [[], ["model.sliding_window=3"]])
def test_packed_documents_equal_documents_alone(overrides):
    _, model = decoder(*overrides)
    model.set_train(False)
    rows = [[5, 6, 7, 0, 8, 9, 10, 11, 12, 0, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0]]
    packed = logits(model, rows)
    for row, start, stop in ((0, 0, 4), (0, 4, 10), (0, 10, 12), (1, 0, 12)):
        alone = logits(model, [rows[row][start:stop]])[0]
        np.testing.assert_allclose(packed[row, start:stop], alone, atol=2e-5)
    _, open_model = decoder(*overrides)  # another one: a graph that is compiled keeps its mask
    open_model.set_train(False)
    open_model.separator = None
    open_logits = logits(open_model, rows)
    np.testing.assert_allclose(open_logits[0, :4], packed[0, :4], atol=2e-5)  # the first document, the same weights
    assert np.abs(open_logits[0, 4:] - packed[0, 4:]).max() > 1e-3  # without the mask they see more


def test_labels_below_0_are_neither_learned_nor_scored():
    built, model = decoder()
    tokens = np.array([[5, 6, 7, 0, 8, 9, 10, 11, 12, 0, 3, 4]] * 2, np.int32)
    labels = np.roll(tokens, -1, 1)
    labels[tokens == 0] = IGNORED
    valid, noise = np.ones((2, 12), np.float32), np.zeros((1, 1, 1), np.float32)
    valid[1, 6:] = 0
    log = logits(model, tokens)
    log = log - np.log(np.exp(log).sum(-1, keepdims=True))
    kept = (labels >= 0) & (valid > 0)
    wanted = -np.take_along_axis(log, np.maximum(labels, 0)[..., None], -1)[..., 0][kept]
    figures = TrainLoss(model, built)(
        *map(Tensor, (tokens, labels, valid, noise)), Tensor(np.ones((1, 1), np.float32))
    ).asnumpy()
    assert figures.reshape(-1)[1] == pytest.approx(wanted.mean(), rel=1e-4)
    scores = EvalStep(model, ignores=True)(*map(Tensor, (tokens, labels, valid)))[0].asnumpy()
    assert scores[:, 1].tolist() == kept.sum(1).tolist()
    assert scores[:, 0].sum() == pytest.approx(wanted.sum(), rel=1e-4)


def test_what_follows_a_separator_is_not_predicted(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("text of a document " * 4)
    data = load_data(config.build({}, [*PLAIN, f"data.path={tmp_path}", "data.document_mask=true"]))
    batches = [*data.validation(), data.train.at(0)]
    for batch in batches:
        np.testing.assert_array_equal(batch.labels == IGNORED, batch.tokens == 0)
    scored = sum(int(((batch.valid > 0) & (batch.labels >= 0)).sum()) for batch in data.validation())
    assert scored == data.validation_tokens


@pytest.mark.parametrize(
    "overrides, words",
    [
        (
            ["data.document_mask=true", "model.type=seq2seq", "model.n_kv_heads=null"],
            "data.document_mask: true; needs model.type 'decoder'",
        ),
        (
            ["data.loss_mask=true", "model.type=seq2seq", "model.n_kv_heads=null"],
            "data.loss_mask: true; needs model.type 'decoder'",
        ),
        (["data.document_mask=true", "parallel.model_parallel=2"], "data.document_mask: true; not with"),
    ],
)
def test_where_it_cannot_be_it_is_refused(overrides, words):
    with pytest.raises(UserError) as caught:
        config.build({}, [*SIZE, *overrides])
    assert words in str(caught.value)


def test_without_a_separator_it_is_refused():
    built = config.build({}, [*PLAIN, "data.document_mask=true"])
    with pytest.raises(UserError, match=r"data.document_mask: true; the tokenizer has no token between documents"):
        mask_documents(create_model(built, 20), None)


def test_a_run_with_answers_documents_and_a_mixture(tmp_path, capsys):
    """From records to a trained and evaluated run; the log counts windows by corpus."""
    from switchyard.data.prepare_tokens import Plan, prepare_tokens
    from switchyard.training.evaluate import evaluate

    record = {"prompt": "say yes: ", "response": "yes"}
    for name, text in (("a", json.dumps(record)), ("b", json.dumps({"prompt": "b", "response": "no"}))):
        (tmp_path / f"{name}.jsonl").write_text((text + "\n") * 40)
        plan = Plan(str(tmp_path / f"{name}.jsonl"), tokenizer="byte", text_field=None, val_fraction=0.3)
        prepare_tokens(plan, tmp_path / name, 12, 1)
    mixture = f"data.mixture=[{{path: {tmp_path / 'a'}, weight: 3}}, {{path: {tmp_path / 'b'}, weight: 1}}]"
    own = ["data.document_mask=true", "data.loss_mask=true", f"train.output_dir={tmp_path}", "train.eval_every=0"]
    own += ["train.steps=2", "train.log_every=1", "train.loggers=[]", "train.gradient_accumulation_steps=2"]
    built = config.build({}, [*PLAIN, "model.num_layers=1", mixture, *own])
    result = train(built)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    counted = [line["corpora"] for line in lines if line["kind"] == "train"]
    assert [sum(one.values()) for one in counted] == [4, 8]
    assert result["validation_tokens"] == load_data(built).validation_tokens
    assert evaluate(tmp_path / "run").loss == pytest.approx(result["validation_loss"], rel=1e-5)
