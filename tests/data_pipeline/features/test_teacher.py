"""A teacher runs packed windows one by one, in groups that a budget bounds, and refuses what it was not made for."""

from pathlib import Path

import pytest
import torch

from data_pipeline.core.errors import UserError
from data_pipeline.features.teacher_loading import load_teacher
from tests.data_pipeline.features.small_teachers import save_small, whole_features


@pytest.mark.parametrize("token_budget", [16384, 70, 1])
def test_the_budget_does_not_change_the_features(tmp_path: Path, token_budget: int):
    path = save_small("qwen3", tmp_path)
    window_lengths = [5, 1, 33, 12, 64, 2]
    tokens_T = torch.randint(97, (sum(window_lengths),), generator=torch.Generator().manual_seed(1))
    features_TF = load_teacher(path, token_budget=token_budget).features(tokens_T, window_lengths)
    assert features_TF.dtype == torch.float32
    expected_TF = whole_features(path, -3, tokens_T, window_lengths)
    torch.testing.assert_close(features_TF, expected_TF, rtol=1e-5, atol=1e-5)


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


def test_refuses_long_windows_foreign_tokens_and_wrong_lengths(tmp_path):
    teacher = load_teacher(save_small("llama", tmp_path))
    with pytest.raises(UserError, match="65 tokens is longer than the 64 positions"):
        teacher.features(torch.ones(65, dtype=torch.int64), [65])
    with pytest.raises(UserError, match="token id 97 is beyond"):
        teacher.features(torch.tensor([3, 97]), [2])
    with pytest.raises(UserError, match="sum to 3"):
        teacher.features(torch.ones(4, dtype=torch.int64), [3])


def test_fingerprint_follows_the_weights(tmp_path):
    path = save_small("llama", tmp_path)
    teacher, other = load_teacher(path), load_teacher(path)
    assert teacher.fingerprint() == other.fingerprint()
    next(other.model.parameters())[3, 5] += 1e-3
    other._fingerprint = None
    assert teacher.fingerprint() != other.fingerprint()
