"""Whatever is judged: its nats are those of its own stage, and what it writes for a text is a function of that text and its seed."""

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from data_pipeline.core.errors import UserError
from data_pipeline.reading.batch import PREFIX, SUFFIX
from pretrain.checkpoint.find import checkpoint_of
from pretrain.evaluate.subjects import FlowSubject, Sampling, Subject, open_subject
from pretrain.export.convert import main as convert
from pretrain.runs.folder import config_of
from pretrain.stages.build import load_stage
from pretrain.stages.rows import heldout_rows
from tests.pretrain.evaluate.token_runs import train

CPU = torch.device("cpu")
PROMPTS, LENGTHS, SEEDS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]], [5, 12, 3], [11, 12, 13]


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:  # type: ignore[no-untyped-def]
    return {stage: train(stage, trained.data, tmp_path_factory.mktemp(stage)) for stage in ("ar", "mdlm")}


@pytest.fixture(params=["textldm", "ar", "mdlm", "ngram"])
def subject(request: pytest.FixtureRequest, runs: dict[str, Path], exported: Path, trained) -> Subject:  # type: ignore[no-untyped-def]
    names = {"textldm": exported, "ngram": "ngram", **runs}
    found = open_subject(str(names[request.param]), Sampling(num_steps=3), CPU, str(trained.data), 100, 3)
    assert found is not None
    return found


@torch.no_grad()
def test_texts_and_nats_do_not_depend_on_what_else_is_in_the_batch(subject: Subject) -> None:
    together = subject.continuations(PROMPTS, LENGTHS, SEEDS)
    assert [len(new) for new in together] == LENGTHS
    alone = [subject.continuations([p], [n], [s])[0] for p, n, s in zip(PROMPTS, LENGTHS, SEEDS)]
    assert together == alone
    assert subject.continuations(PROMPTS, LENGTHS, [s + 1 for s in SEEDS]) != together
    nats = subject.nats(PROMPTS, together, SEEDS)
    assert nats == pytest.approx(
        [subject.nats([p], [t], [s])[0] for p, t, s in zip(PROMPTS, together, SEEDS)], rel=1e-5
    )
    assert min(nats) > 0


def test_a_flow_models_own_defaults_hold_where_nothing_is_asked_for(exported: Path) -> None:
    """generation_config's, as a sweep writes them, the interval of guidance among them."""
    subject = open_subject(str(exported), Sampling(num_steps=3), CPU, None, 1, 1)
    assert isinstance(subject, FlowSubject)
    left = {"guidance_scale": 3.0, "guidance_interval": [0.3, 0.7]}
    subject.model.generation_config = GenerationConfig(**subject.model.generation_config.to_dict() | left)
    again = FlowSubject(subject.model, subject.texts, Sampling(num_steps=3))
    assert again.sampling["guidance_scale"] == 3.0
    assert again.sampling["guidance_interval"] == [0.3, 0.7]
    wide = FlowSubject(subject.model, subject.texts, Sampling(num_steps=3, guidance_interval=(0.0, 1.0)))
    assert wide.sampling["guidance_interval"] == (0.0, 1.0)
    wanted = subject.model.generate(PROMPTS, LENGTHS, 3, seed=SEEDS, eos_token_id=-1)
    assert again.continuations(PROMPTS, LENGTHS, SEEDS) == [ids.tolist() for ids in wanted]


@torch.no_grad()
def test_longer_texts_than_the_window_are_continued_and_measured_in_pieces(subject: Subject) -> None:
    long = subject.continuations([[1, 2, 3]], [90], [5])[0]
    assert len(long) == 90
    assert subject.nats([[1, 2]], [long], [5])[0] > subject.nats([[1, 2]], [long[:40]], [5])[0] > 0


@torch.no_grad()
def test_a_language_models_nats_are_its_stages_own_exactly(runs: dict[str, Path], tmp_path: Path) -> None:
    stage = load_stage(config_of(runs["ar"]), checkpoint_of(runs["ar"]), CPU)
    assert convert(["--run", str(runs["ar"]), "--output", str(tmp_path / "stock")]) == 0
    subjects = [open_subject(str(place), Sampling(), CPU, None, 1, 1) for place in (runs["ar"], tmp_path / "stock")]
    for batch in heldout_rows(stage.config, 4):
        expected_W = stage.window_nats(batch)
        starts = torch.tensor([0, *batch.window_lengths]).cumsum(0).tolist()
        for window, (start, length) in enumerate(zip(starts, batch.window_lengths)):
            tokens, roles = batch.tokens_T[start : start + length], batch.roles_T[start : start + length]
            prompt, target = tokens[roles == PREFIX].tolist(), tokens[roles == SUFFIX].tolist()
            if not target:
                continue
            for subject in subjects:
                assert subject is not None
                assert subject.nats([prompt], [target], [0])[0] == pytest.approx(float(expected_W[window]), rel=1e-6)


@torch.no_grad()
def test_a_language_model_draws_from_its_own_probabilities(runs: dict[str, Path]) -> None:
    subject = open_subject(str(runs["ar"]), Sampling(), CPU, None, 1, 1)
    assert subject is not None
    drawn = torch.tensor(subject.continuations([[3, 4]] * 2000, [1] * 2000, range(2000)))[:, 0]
    for token in drawn.unique().tolist()[:6]:
        p = float(torch.tensor(-subject.nats([[3, 4]], [[token]], [0])[0]).exp())
        share = float((drawn == token).double().mean())
        assert abs(share - p) < 4 * (p * (1 - p) / 2000) ** 0.5 + 1e-3
    cold = open_subject(str(runs["ar"]), Sampling(temperature=1e-4), CPU, None, 1, 1)
    assert cold is not None
    assert len(set(map(tuple, cold.continuations([[3, 4]] * 8, [4] * 8, range(8))))) == 1


def test_what_cannot_be_judged_is_one_line(trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    def opened(name: str, data: str | None = None) -> None:
        open_subject(name, Sampling(), CPU, data, 10, 3)

    with pytest.raises(UserError, match="is a run of stage dit; expected what textldm convert makes of it"):
        opened(str(trained.dit))
    with pytest.raises(UserError, match="name them with --data"):
        opened("ngram")
    for content in ("", "{", '{"model_type": "nothing"}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError) as caught:
            opened(str(tmp_path))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such folder"):
        opened(str(tmp_path / "gone"))
