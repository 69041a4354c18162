"""Texts at held-out evaluations: the same under every sharding, and training takes no notice of them."""

import http.server
import json
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

from data_pipeline.format.manifest import Manifest
from pretrain.config.load import load_config
from pretrain.diagnose.texts import word_figures
from pretrain.stages.dit_config import DiTRun
from tests.pretrain import forked_ranks, tiny_pipeline, tiny_run
from tests.pretrain.engine_states import saved_states


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and says nothing."""

    def log_message(self, *_: object) -> None:
        pass


def samples(run: Path) -> list[dict]:
    """Those that a run has written, without their times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "context", "generated", "true")
    return [{key: line[key] for key in keys} for line in lines if line["kind"] == "sample"]


def values_of(trained, run: Path, **train: object) -> dict:
    values = tiny_pipeline.dit_values(trained.data, trained.vae, run)
    values["train"] |= {"eval_every": 2, "eval_samples": 3, **train}
    return values


def test_an_evaluation_writes_texts_and_changes_nothing(trained, tmp_path: Path, capsys) -> None:
    run = tiny_pipeline.start(tmp_path, values_of(trained, tmp_path / "run"))
    found = samples(run)
    assert len(found) == 3
    for sample in found:
        assert sample["step"] == 2
        for name in ("context", "generated", "true"):
            assert sample[name] == "" or set(sample[name].split()) <= set(tiny_pipeline.WORDS)
        assert sample["true"] != sample["context"] != ""
    assert f"generated    {json.dumps(found[0]['generated'])}" in capsys.readouterr().out
    expected = saved_states(trained.dit)  # which made no evaluation
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved_states(run).items())


def test_data_behind_a_url_is_trained_on_and_read_as_text(trained, tmp_path: Path) -> None:
    """At evaluations, too, shards are copied within data.cache_gigabytes: here one at a time."""
    values = values_of(trained, tmp_path / "run")
    expected = samples(tiny_pipeline.start(tmp_path, values_of(trained, tmp_path / "local")))
    handler = partial(QuietHandler, directory=str(trained.data))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        values["data"] |= {"path": url, "cache_dir": str(tmp_path / "cache"), "cache_gigabytes": 4.5e-5}
        run = tiny_pipeline.start(tmp_path, values)
        config = load_config(str(tmp_path / "run.json"), [])
        assert isinstance(config, DiTRun)
        assert word_figures(config, Manifest.load(url), [], [])["training_words"] > 0
        server.shutdown()
    assert samples(run) == expected != []
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "zero_stage", "precision"), [(2, 3, "fp32"), (1, 3, "fp32"), (2, 2, "bf16")])
def test_the_texts_do_not_depend_on_sharding(
    trained, tmp_path: Path, ranks: int, zero_stage: int, precision: str
) -> None:
    values = values_of(trained, tmp_path / "run", zero_stage=zero_stage, precision=precision, steps=4)
    config = tiny_run.write_config(tmp_path / "c.json", values)
    assert forked_ranks.finish(forked_ranks.start(config, ranks=ranks)) == [0] * ranks, config.with_suffix(
        ".log"
    ).read_text()[-5000:]
    alone = tiny_pipeline.start(
        tmp_path, values_of(trained, tmp_path / "alone", zero_stage=0, precision="fp32", steps=4)
    )
    found, expected = samples(tmp_path / "run"), samples(alone)
    assert len(found) == 6
    if precision == "fp32":
        assert found == expected
