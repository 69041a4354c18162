"""MAUVE, BERTScore and the judge with tiny models of random weights: the packages' figures, called by hand."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from data_pipeline.core.errors import UserError
from pretrain.evaluate import featurizers
from pretrain.evaluate.metrics import Judged
from pretrain.evaluate.records import Record
from pretrain.evaluate.samples import Sample

CPU = torch.device("cpu")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = [*SPECIAL, *(f"w{i}" for i in range(60))]
DRAWN = np.random.default_rng(0)
TEXTS = [" ".join(f"w{i}" for i in DRAWN.integers(0, 60, size=DRAWN.integers(3, 12))) for _ in range(80)]
JUDGED = Judged(
    [Sample(str(i), "w1 w2", f" {text}") for i, text in enumerate(TEXTS[:40])],
    [Record(str(i), f" {text}", 1, 0.0, None, 1) for i, text in enumerate(TEXTS[40:])],
)


def tokenizer(folder: Path, bert: bool) -> None:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bert:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = {
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=64, eos_token="[SEP]", bos_token="[CLS]", **names
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=2,
        eos_token_id=3,
        initializer_range=0.3,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer(folder, bert=False)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
    ).save_pretrained(folder)
    tokenizer(folder, bert=True)
    return folder


def test_mauve_is_the_packages_on_the_last_hidden_states(gpt: Path) -> None:
    import mauve

    found, buckets = featurizers.mauve(JUDGED, str(gpt), 4, 7, CPU)
    model = GPT2LMHeadModel.from_pretrained(gpt).transformer.eval()
    by_hand = []
    for group in (JUDGED.continuations(), JUDGED.references()):
        rows = []
        for text in group:
            ids = [VOCABULARY.index(word) for word in text.split()]
            with torch.no_grad():
                rows.append(model(torch.tensor([ids])).last_hidden_state[0, -1].numpy())
        by_hand.append(np.stack(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = mauve.compute_mauve(
            p_features=by_hand[0], q_features=by_hand[1], num_buckets=4, seed=7, verbose=False
        )
    assert buckets == 4
    assert found["mauve"].value == pytest.approx(expected.mauve, abs=1e-9)
    assert found["mauve"].low < found["mauve"].value < found["mauve"].high


def test_too_few_texts_for_the_buckets_are_refused(gpt: Path) -> None:
    with pytest.raises(UserError, match="40 texts are too few for 30 buckets; expected at least 10 a bucket"):
        featurizers.mauve(JUDGED, str(gpt), 30, 0, CPU)
    few = Judged(JUDGED.samples[:9], JUDGED.records[:9])
    with pytest.raises(UserError, match="9 texts are too few"):
        featurizers.mauve(few, str(gpt), None, 0, CPU)


def test_bertscore_is_the_packages(bert: Path) -> None:
    import bert_score

    found, layer = featurizers.bert_score(JUDGED, str(bert), None, CPU)
    assert layer == 2
    *_, f1_N = bert_score.score(
        JUDGED.continuations(), JUDGED.references(), model_type=str(bert), num_layers=2, device="cpu"
    )
    assert found["bertscore"].value == pytest.approx(f1_N.double().mean().item(), abs=1e-9)
    first, _ = featurizers.bert_score(JUDGED, str(bert), 1, CPU)
    assert first["bertscore"].value != found["bertscore"].value


def test_the_judges_nats_are_those_of_its_own_loss_given_the_prompt(gpt: Path) -> None:
    found = featurizers.judge_nats(JUDGED, str(gpt), CPU)
    model = GPT2LMHeadModel.from_pretrained(gpt).eval()
    total = count = 0.0
    for sample, record in zip(JUDGED.samples, JUDGED.records):
        prompt, target = (
            [VOCABULARY.index(word) for word in text.split()] for text in (sample.prompt, record.continuation)
        )
        ids = torch.tensor([[2, *prompt, *target]])
        labels = ids.clone()
        labels[0, : 1 + len(prompt)] = -100
        with torch.no_grad():
            total += float(model(ids, labels=labels).loss) * len(target)
        count += len(target)
    assert found["generative_nll"].value == pytest.approx(total / count, rel=1e-6)


def test_models_that_cannot_be_had_are_one_short_line(tmp_path: Path) -> None:
    for measure in (
        lambda: featurizers.judge_nats(JUDGED, str(tmp_path), CPU),
        lambda: featurizers.bert_score(JUDGED, str(tmp_path), None, CPU),
        lambda: featurizers.mauve(JUDGED, str(tmp_path), None, 0, CPU),
    ):
        with pytest.raises(UserError) as caught:
            measure()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300
    with pytest.raises(UserError, match="no such folder"):
        featurizers.features(["x"], str(tmp_path / "gone"), CPU)
