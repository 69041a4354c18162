"""The real lm-evaluation-harness on a task of local files."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from data_pipeline.core.errors import UserError
from pretrain.evaluate import harness
from pretrain.evaluate.subjects import Sampling, open_subject
from tests.pretrain.evaluate.token_runs import train, write_texts


@pytest.fixture(scope="module")
def ar(trained, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    return train("ar", trained.data, tmp_path_factory.mktemp("ar"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks on the same documents: a choice of two, perplexity, and writing."""
    folder = tmp_path_factory.mktemp("tasks")
    texts = [
        json.loads(line)["text"].split() for line in write_texts(folder / "texts.jsonl", 12).read_text().splitlines()
    ]
    rows = [
        {
            "question": " ".join(words[:6]),
            "choices": [" ".join(words[6:9]), "w1 w2"],
            "answer": 0,
            "text": " ".join(words),
        }
        for words in texts
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
    }
    choice = {
        "task": "tiny_choice", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices",
        "doc_to_target": "answer", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    rolling = {
        "task": "tiny_perplexity", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }  # fmt: skip
    writing = {
        "task": "tiny_writing", "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["w5"], "max_gen_toks": 6}, "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    for task in (choice, rolling, writing):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task | common))
    return folder


def evaluated(model: Path, tasks: Path, **options: object) -> dict:
    import lm_eval
    from lm_eval.tasks import TaskManager

    harness.register()
    return lm_eval.simple_evaluate(
        model="textldm",
        model_args={"pretrained": str(model), "num_steps": 2, "seed": 3},
        tasks=["tiny_choice", "tiny_perplexity", "tiny_writing"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )


def answers(result: dict) -> list:
    return [
        (task, sample["doc_id"], sample["resps"])
        for task, samples in sorted(result["samples"].items())
        for sample in samples
    ]


def test_a_flow_model_answers_every_kind_of_request_the_same_for_any_batch_size(exported: Path, tasks: Path) -> None:
    one, many = (evaluated(exported, tasks, batch_size=size) for size in (1, 8))
    assert answers(one) == answers(many)
    assert 0 <= one["results"]["tiny_choice"]["acc,none"] <= 1
    assert one["results"]["tiny_perplexity"]["word_perplexity,none"] > 1
    texts = [sample["resps"][0][0] for sample in one["samples"]["tiny_writing"]]
    assert any(texts)
    assert not any("w5" in text.split() for text in texts)


def test_likelihoods_of_a_language_model_are_its_exact_ones(ar: Path, tasks: Path) -> None:
    found = evaluated(ar, tasks)
    subject = open_subject(str(ar), Sampling(), torch.device("cpu"), None, 1, 1)
    assert subject is not None
    for sample in found["samples"]["tiny_choice"]:
        for (response,), choice in zip(sample["resps"], sample["doc"]["choices"]):
            prompt, target = (subject.texts.encode(text) for text in (sample["doc"]["question"], choice))
            assert float(response[0]) == pytest.approx(-subject.nats([prompt], [target], [0])[0], rel=1e-6)
    for sample in found["samples"]["tiny_perplexity"]:
        expected = -subject.nats([[]], [subject.texts.encode(sample["doc"]["text"])], [0])[0]
        assert float(sample["resps"][0][0]) == pytest.approx(expected, rel=1e-6)


def test_white_space_at_a_contexts_end_belongs_to_the_continuation(ar: Path) -> None:
    subject = open_subject(str(ar), Sampling(), torch.device("cpu"), None, 1, 1)
    assert subject is not None
    requests = harness.Requests(subject, 0)
    assert requests.loglikelihood([("w1 w2 ", "w3")]) == requests.loglikelihood([("w1 w2", " w3")])


def test_requests_come_back_in_their_order_and_no_pack_holds_more_than_it_may() -> None:
    lengths = [50, 5000, 4000, 7, 60, 4096, 40]
    packs = []

    def answer(places: list[int]) -> list[int]:
        packs.append(sum(lengths[i] for i in places) if len(places) > 1 else 0)
        return [lengths[i] for i in places]

    assert harness.packed(lengths, answer) == lengths
    assert max(packs) <= harness.PACKED_TOKENS


def test_unknown_arguments_and_models_are_one_line(exported: Path) -> None:
    model = harness.register()
    with pytest.raises(UserError, match="nonsense"):
        model(pretrained=str(exported), nonsense=1)
    with pytest.raises(UserError, match="expected a model that gives probabilities"):
        model(pretrained="reference")
