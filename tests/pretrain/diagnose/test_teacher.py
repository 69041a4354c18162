"""The teacher's nats of the targets against its own loss, as transformers computes it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from data_pipeline.core.errors import UserError
from data_pipeline.reading.batch import SUFFIX
from modeling.token_statistics import log_frequencies
from pretrain.diagnose.teacher import load_causal, window_nats
from tests.data_pipeline.made_batches import make_batch

VOCABULARY = 300
BATCH = make_batch([(5, 9), (0, 6), (8, 0), (3, 20)])


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.5, **shape)).eval()


def test_nats_are_those_of_the_models_own_loss_on_the_targets_alone(model: LlamaForCausalLM) -> None:
    unigram_V = -log_frequencies(torch.arange(VOCABULARY))
    found_W = window_nats(model, BATCH, unigram_V)
    starts = torch.tensor([0, *BATCH.window_lengths]).cumsum(0).tolist()
    for window, (start, length) in enumerate(zip(starts, BATCH.window_lengths)):
        tokens_L = BATCH.tokens_T[start : start + length].long()
        is_target_L = BATCH.roles_T[start : start + length] == SUFFIX
        expected = 0.0
        if is_target_L.any():
            labels_L = tokens_L.masked_fill(~is_target_L, -100)
            with torch.no_grad():
                mean = model(input_ids=tokens_L[None], labels=labels_L[None]).loss.item()
            expected = mean * int((labels_L[1:] != -100).sum())
        if is_target_L[0]:  # nothing precedes it: its frequency alone
            expected += unigram_V[tokens_L[0]].item()
        assert found_W[window].item() == pytest.approx(expected, rel=1e-5)


def test_what_follows_a_token_never_changes_its_nats(model: LlamaForCausalLM) -> None:
    """Windows are read one by one, so that no target is known from elsewhere."""
    alone = make_batch([(3, 20)])
    unigram_V = -log_frequencies(torch.ones(VOCABULARY))
    alone.tokens_T[:23] = BATCH.tokens_T[28:51]
    assert window_nats(model, alone, unigram_V)[0].item() == pytest.approx(
        window_nats(model, BATCH, unigram_V)[3].item(), rel=1e-5
    )


def test_a_folder_that_is_no_causal_model_is_one_line(tmp_path) -> None:
    with pytest.raises(UserError, match="cannot be loaded as a causal language model") as caught:
        load_causal(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_gone_is_not_asked_for_at_the_hub(tmp_path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_causal(str(tmp_path / "gone"))
