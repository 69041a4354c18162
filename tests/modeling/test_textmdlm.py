"""Masked diffusion as transformers' users meet it: their conventions, and the same function whatever else is in the call."""

import dataclasses

import pytest
import torch
from transformers import GenerationConfig

from modeling.attention import Segments
from modeling.masked_diffusion import masked_inputs, window_nats
from modeling.shapes import TokenTransformerConfig
from modeling.textmdlm import TextMDLM, TextMDLMConfig

V, WINDOW, END = 13, 16, 0
PROMPTS = [[3, 4, 5], [], [9]]


@pytest.fixture(scope="module")
def model() -> TextMDLM:
    torch.manual_seed(0)
    shape = dataclasses.asdict(TokenTransformerConfig(vocab_size=V, width=32, num_layers=2, head_dim=16))
    model = TextMDLM(TextMDLMConfig(shape, num_steps=5, max_window=WINDOW, eos_token_id=END))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model.eval()


def test_a_continuation_is_a_function_of_prompt_seed_length_and_settings_alone(model: TextMDLM) -> None:
    """Also of one beyond the window, in blocks."""
    lengths, seeds = [6, 4, 40], [11, 2**64 - 1, 13]
    together = model.generate(PROMPTS, lengths, seed=seeds, eos_token_id=-1)
    assert [len(ids) for ids in together] == lengths
    for prompt, length, seed, expected in zip(PROMPTS, lengths, seeds, together):
        (alone,) = model.generate([prompt], length, seed=[seed], eos_token_id=-1)
        assert torch.equal(alone, expected)
    assert not torch.equal(model.generate([PROMPTS[2]], 40, seed=[14], eos_token_id=-1)[0], together[2])
    assert len(set(together[2].tolist())) > 3


def test_padded_rows_come_back_with_the_new_tokens_behind(model: TextMDLM) -> None:
    texts = model.generate([[3, 4, 5], [9]], 6, seed=3, num_return_sequences=2)
    left, mask = torch.tensor([[3, 4, 5], [0, 0, 9]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    found = model.generate(left, attention_mask=mask, max_new_tokens=6, seed=3, num_return_sequences=2, pad_token_id=7)
    right = model.generate(
        torch.tensor([[3, 4, 5], [9, 0, 0]]), attention_mask=mask.flip(1) * torch.tensor([[1, 1, 1], [1, 0, 0]]), max_length=9, seed=3,
        num_return_sequences=2, pad_token_id=7,
    )  # fmt: skip
    assert torch.equal(found[:, :3], left.repeat_interleave(2, 0))
    assert torch.equal(found[:, 3:], right[:, 3:])
    for row, text in zip(found[:, 3:].tolist(), texts, strict=True):
        ended = [*text.tolist(), END] if len(text) < 6 else text.tolist()
        assert row == ended + [7] * (len(row) - len(ended))


def test_settings_come_from_the_call_then_its_config_then_the_models(model: TextMDLM) -> None:
    one = model.generate([[3]], 8, num_steps=2, temperature=0.5, eos_token_id=-1)
    config = GenerationConfig(num_steps=2, temperature=0.5, max_new_tokens=8, eos_token_id=-1)
    assert torch.equal(model.generate([[3]], generation_config=config)[0], one[0])
    assert not torch.equal(model.generate([[3]], 8, eos_token_id=-1)[0], one[0])
    cold = model.generate([[3]], 8, num_steps=8, temperature=1e-4, seed=1, eos_token_id=-1)
    assert (
        cold[0].tolist() == model.generate([[3]], 8, num_steps=8, temperature=1e-5, seed=1, eos_token_id=-1)[0].tolist()
    )


def test_logits_are_the_networks_own(model: TextMDLM) -> None:
    rows, mask = torch.tensor([[3, V, 5], [0, 9, V]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    logits_BLV = model(rows, mask).logits
    for row, is_real in zip((0, 1), mask.bool()):
        ids_T = rows[row][is_real]
        hidden_TD = model.model(ids_T, Segments.from_lengths([len(ids_T)]), ids_T == V)
        torch.testing.assert_close(logits_BLV[row][is_real], model.model.lm_head(hidden_TD))
    assert not logits_BLV[1, 0].any()
    told = model(rows, mask, target_mask=torch.tensor([[0, 1, 1], [0, 0, 1]])).logits
    assert not torch.allclose(told[0], logits_BLV[0])
    assert model(rows[:, :0]).logits.shape == (2, 0, V)


def test_the_bound_is_window_nats_and_of_each_document_alone(model: TextMDLM) -> None:
    targets = [[4, 5, 6], [1, 2], list(range(1, 12)) * 3]
    together = model.nll(PROMPTS, targets, seed=[1, 2, 3])
    for prompt, target, seed, expected in zip(PROMPTS, targets, [1, 2, 3], together.tolist()):
        assert float(model.nll([prompt], [target], seed=[seed])) == pytest.approx(expected, rel=1e-5)
    # One target: all of it masked in every draw, so that nothing is left to chance.
    tokens_T, is_target_T = torch.tensor([3, 4, 5, 8]), torch.tensor([False] * 3 + [True])
    expected_W = window_nats(
        model.model, tokens_T, is_target_T, Segments.from_lengths([4]), torch.zeros(1), lambda _: torch.zeros(4), 1
    )
    assert float(model.nll([[3, 4, 5]], [[8]])) == pytest.approx(float(expected_W), rel=1e-6)
    assert masked_inputs(tokens_T, is_target_T, V).tolist() == [3, 4, 5, V]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"num_steps": 0}, "num_steps"),
        ({"temperature": 0.0}, "temperature above 0"),
        ({"temperature": float("nan")}, "temperature above 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": [1, 2]}, "seed has 2 values"),
        ({"block_size": 17}, "block_size is 17"),
        ({"top_k": 5}, "no use for top_k: tokens are revealed in random order"),
        ({"guidance_scale": 2.0}, "no use for guidance_scale"),
        ({"input_ids": [[V]]}, f"token id {V} is beyond the vocabulary of {V}"),
        ({"input_ids": []}, "needs a prompt"),
    ],
)
def test_what_has_no_meaning_is_refused(model: TextMDLM, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        model.generate(**({"input_ids": [[1]], "max_new_tokens": 4} | options))


def test_what_cannot_be_measured_is_refused(model: TextMDLM) -> None:
    for prompts, targets, options in (([[1]], [[]], {}), ([], [], {}), ([[1]], [[2]], {"num_draws": 0})):
        with pytest.raises(ValueError, match="needs as many targets"):
            model.nll(prompts, targets, **options)
    with pytest.raises(ValueError, match="beyond the vocabulary"):
        model(torch.tensor([[V + 1]]))
