"""Other trainers' names of our keys."""

from collections import Counter

import pytest

from data_pipeline.core.settings import keys
from pretrain.config.schema import with_optimizer
from pretrain.config.synonyms import SYNONYMS, ours
from pretrain.engine.optimizer_settings import AdamWSettings
from pretrain.stages.dit_config import DiTRun
from pretrain.stages.vae_config import VAERun

KNOWN = {kind: {key.name for key in keys(with_optimizer(kind, AdamWSettings))} for kind in (VAERun, DiTRun)}


def test_every_synonym_is_of_a_key_that_exists_and_no_key_itself() -> None:
    assert SYNONYMS.keys() <= KNOWN[VAERun] | KNOWN[DiTRun]
    for own, others in SYNONYMS.items():
        assert max(Counter(others).values()) == 1
        kinds = [known for known in KNOWN.values() if own in known]
        assert not [name for name in others for known in kinds if f"{own.partition('.')[0]}.{name}" in known], own


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("learning_rate", ["optimizer.lr"]),
        ("optimizer.learning-rate", ["optimizer.lr"]),
        ("batch_size", ["data.rows_per_step", "data.micro_batch_rows"]),
        ("max_steps", ["train.steps"]),
        ("bf16", ["train.precision"]),
        ("model.hidden_size", ["model.width"]),
        ("FP16", ["train.precision"]),
        ("dropout", []),
    ],
)
def test_synonyms_lead_to_our_keys(key: str, expected: list[str]) -> None:
    assert ours(key, KNOWN[DiTRun]) == expected


def test_only_keys_that_the_stage_has_are_named() -> None:
    assert ours("num_hidden_layers", KNOWN[DiTRun]) == ["model.num_layers"]
    assert ours("num_hidden_layers", KNOWN[VAERun]) == ["model.num_encoder_layers", "model.num_decoder_layers"]
