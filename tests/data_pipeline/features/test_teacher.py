"""The teacher's packed features are those of each window alone in the whole model; wrong teachers are refused."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from data_pipeline.core.errors import UserError
from data_pipeline.features.teacher_fit import check_fit, check_same_tokenizer
from data_pipeline.features.teacher_loading import load_teacher
from data_pipeline.format.manifest import Manifest
from data_pipeline.text.tokenization import load_tokenizer

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip


def save_small(kind: str, folder) -> str:
    torch.manual_seed(0)
    config_class, model_class = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[kind]
    model_class(config_class(**SMALL)).save_pretrained(folder)
    return str(folder)


def reference(path: str, layer: int, tokens_T: torch.Tensor, window_lengths: list[int]) -> torch.Tensor:
    """Each window alone through the untruncated model."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        states = [
            model(window[None], output_hidden_states=True).hidden_states[layer][0]
            for window in tokens_T.split(window_lengths)
        ]
    return torch.cat(states)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("layer", [-3, 1, -1, 0])
def test_features_equal_each_window_alone_in_the_whole_model(tmp_path, kind, layer):
    path = save_small(kind, tmp_path)
    window_lengths = [5, 1, 33, 12, 64, 2]
    tokens_T = torch.randint(97, (sum(window_lengths),), generator=torch.Generator().manual_seed(1))
    expected_TF = reference(path, layer, tokens_T, window_lengths)
    for token_budget in (16384, 70, 1):
        teacher = load_teacher(path, layer=layer, token_budget=token_budget)
        features_TF = teacher.features(tokens_T, window_lengths)
        assert features_TF.dtype == torch.float32
        torch.testing.assert_close(features_TF, expected_TF, rtol=1e-5, atol=1e-5)


def test_features_of_a_real_teacher(shared):
    path = str(shared / "teachers" / "stories260K")
    window_lengths = [100, 7, 512, 30]
    tokens_T = torch.randint(3, 512, (sum(window_lengths),), generator=torch.Generator().manual_seed(1))
    teacher = load_teacher(path)
    torch.testing.assert_close(
        teacher.features(tokens_T, window_lengths), reference(path, -3, tokens_T, window_lengths), rtol=1e-4, atol=1e-4
    )


def test_only_the_used_layers_are_loaded_and_no_head(tmp_path):
    teacher = load_teacher(save_small("qwen3", tmp_path), layer=-3)
    assert teacher.state.num_layers == 2
    names = [name for name, _ in teacher.model.named_parameters()]
    assert not [name for name in names if "layers.2." in name or "lm_head" in name or name == "norm.weight"]


def test_unwanted_windows_are_not_run(tmp_path):
    teacher = load_teacher(save_small("llama", tmp_path))
    window_lengths = [4, 500]
    features_TF = teacher.features(torch.ones(504, dtype=torch.int64), window_lengths, wanted=[True, False])
    assert features_TF[:4].any()
    assert not features_TF[4:].any()


def test_prefix_features_are_the_prefix_of_the_features(tmp_path):
    teacher = load_teacher(save_small("qwen3", tmp_path))
    tokens_T = torch.randint(97, (40,), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        teacher.features(tokens_T[:17], [17]), teacher.features(tokens_T, [40])[:17], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("layer", [5, -6])
def test_refuses_a_layer_out_of_range(tmp_path, layer):
    with pytest.raises(UserError, match="has 4 layers"):
        load_teacher(save_small("llama", tmp_path), layer=layer)


def test_refuses_a_bidirectional_model(tmp_path):
    config = BertConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not causal"):
        load_teacher(str(tmp_path), layer=-1)


def test_refuses_long_windows_foreign_tokens_and_wrong_lengths(tmp_path):
    teacher = load_teacher(save_small("llama", tmp_path))
    with pytest.raises(UserError, match="65 tokens is longer than the 64 positions"):
        teacher.features(torch.ones(65, dtype=torch.int64), [65])
    with pytest.raises(UserError, match="token id 97 is beyond"):
        teacher.features(torch.tensor([3, 97]), [2])
    with pytest.raises(UserError, match="sum to 3"):
        teacher.features(torch.ones(4, dtype=torch.int64), [3])


def test_refuses_missing_models_and_weights(tmp_path):
    with pytest.raises(UserError, match="no teacher at"):
        load_teacher(str(tmp_path / "nowhere"))
    path = save_small("llama", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
    with pytest.raises(UserError, match="would be random"):
        load_teacher(path, layer=-1)


def test_fingerprint_follows_the_weights(tmp_path):
    path = save_small("llama", tmp_path)
    teacher, other = load_teacher(path), load_teacher(path)
    assert teacher.fingerprint() == other.fingerprint()
    next(other.model.parameters())[3, 5] += 1e-3
    other._fingerprint = None
    assert teacher.fingerprint() != other.fingerprint()


def manifest_of(folder: Path, tokenizer: Path) -> Manifest:
    """A prepared folder without shards whose tokens are the tokenizer's."""
    loaded = load_tokenizer(tokenizer)
    loaded.save(folder / "tokenizer")
    return Manifest.create(
        row_tokens=64, token_dtype="uint16", min_window=4, max_window=64, seed=0, heldout_fraction=0.1, dedupe=False,
        tokenizer=loaded.info, splits={"train": [], "heldout": []}, source="none", statistics={},
    )  # fmt: skip


def test_tokenizers_must_agree(shared, tmp_path):
    teacher = str(shared / "teachers/stories260K")
    tokens = manifest_of(tmp_path / "same", Path(teacher))
    check_same_tokenizer(teacher, None, str(tmp_path / "same"), tokens)
    foreign = manifest_of(tmp_path / "foreign", shared / "tokenizers/gpt2")
    with pytest.raises(UserError, match=r"gpt2 .*stories260K.* differ in"):
        check_same_tokenizer(teacher, None, str(tmp_path / "foreign"), foreign)
    # A teacher that knows more tokens behind the shared ones is welcome, one that knows fewer is not.
    tokenizer = json.loads((Path(teacher) / "tokenizer.json").read_text())
    extra = {"id": 512, "content": "<|im_start|>", "special": True} | dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized"), False
    )
    tokenizer["added_tokens"].append(extra)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    check_same_tokenizer(str(tmp_path), None, str(tmp_path / "same"), tokens)
    larger = manifest_of(tmp_path / "larger", tmp_path)
    with pytest.raises(UserError, match="im_start"):
        check_same_tokenizer(teacher, None, str(tmp_path / "larger"), larger)


def test_windows_must_fit_the_positions(shared, tmp_path):
    teacher = load_teacher(shared / "teachers/stories260K")
    tokens = manifest_of(tmp_path, shared / "teachers/stories260K")
    check_fit(teacher, str(tmp_path), tokens)
    teacher.max_positions = 63
    with pytest.raises(UserError, match=r"windows of up to 64 tokens, but teacher .* has 63 positions"):
        check_fit(teacher, str(tmp_path), tokens)
