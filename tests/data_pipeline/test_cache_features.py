"""The feature cache: same bytes for any number of ranks and after any kill, exact where it says so, refused where it
does not fit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3Model

from data_pipeline.cache_features import main
from data_pipeline.core.errors import UserError
from data_pipeline.features import hidden_state
from data_pipeline.features.cache import feature_members, load_cache, tile
from data_pipeline.features.check import compare
from data_pipeline.features.job import format_bytes
from data_pipeline.features.teacher_loading import load_teacher
from data_pipeline.format.manifest import FeatureManifest, Manifest
from data_pipeline.format.shards import write_shard
from data_pipeline.reading.batch import Split
from data_pipeline.reading.loader import heldout_batches
from data_pipeline.reading.order import Span
from data_pipeline.reading.shard_pool import FeatureRows, TokenRows
from tests.data_pipeline.core.test_launcher import launched
from tests.data_pipeline.sentences import ROW_TOKENS, write_data

FAST = ["--sample-tokens", "4000", "--ngram-order", "1"]


def write_teacher(folder: Path, data: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=320, hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=48,
    )  # fmt: skip
    Qwen3Model(config).save_pretrained(folder)
    shutil.copytree(data / "tokenizer", folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features") / "data"
    folder.mkdir()
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(data: Path) -> Path:
    return write_teacher(data.parent / "teacher", data)


@pytest.fixture(scope="module")
def cached(data: Path, teacher: Path) -> Path:
    """The cache of an undisturbed run of one process."""
    output = data.parent / "reference"
    assert main(command(data, teacher, output)) == 0
    return output


def command(data: Path, teacher: Path, output: Path, *more: str) -> list[str]:
    return ["--data", str(data), "--teacher", str(teacher), "--output", str(output), "--device", "cpu", *FAST, *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def start(arguments: list[str], rank: int = 0, world_size: int = 1) -> subprocess.Popen:
    environment = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).parents[2] / "data_pipeline/cache_features.py"
    return subprocess.Popen([sys.executable, script, f"--local_rank={rank}", *arguments], env=environment)


def test_cached_features_are_the_teachers(data, teacher, cached):
    tokens = Manifest.load(data)
    cache = load_cache(cached, tokens)
    assert sum(shard.rows for shards in cache.manifest.splits.values() for shard in shards) == 177
    agreement = compare(str(data), tokens, cache, load_teacher(teacher), num_rows=1000)
    assert agreement.num_rows == 177
    assert agreement.num_tokens == sum(shard.tokens for shards in tokens.splits.values() for shard in shards)
    assert agreement.mean_cosine > 0.988
    assert cache.manifest.statistics["bytes_per_token"] == cache.codec.bytes_per_token < 12


def test_the_unfilled_tail_of_a_row_is_zero(data, cached):
    tokens = Manifest.load(data)
    cache = load_cache(cached, tokens)
    span = Span(0, 1, 3, 9)
    _, windows = TokenRows(str(data), tokens, "train").read(span)
    lengths, wanted = tile(windows, ROW_TOKENS)
    filler_T = ~torch.tensor(wanted).repeat_interleave(torch.tensor(lengths))
    coded = cache.read("train", span)
    assert filler_T.any()
    assert not coded.codes_TC[filler_T].any()
    assert not coded.scales_T[filler_T].any()
    assert coded.scales_T[~filler_T].all()


def test_the_loader_delivers_them_with_their_tokens(data, teacher, cached):
    cache = load_cache(cached, Manifest.load(data))
    batch = next(iter(heldout_batches(data, cached, split=Split(kind="truncate"), seed=0, micro_batch_rows=4)))
    decoded_TF = cache.codec.decode(batch.features, batch.tokens_T, batch.window_lengths)
    loaded = load_teacher(teacher)
    loaded.max_positions = ROW_TOKENS
    fresh_TF = loaded.features(batch.tokens_T, batch.window_lengths)
    real_T = batch.roles_T > 0
    cosine_T = torch.nn.functional.cosine_similarity(decoded_TF[real_T], fresh_TF[real_T])
    assert cosine_T.mean() > 0.985


def test_exact_cache_is_the_online_teacher_bit_for_bit(data, teacher, tmp_path):
    assert main(command(data, teacher, tmp_path / "exact", "--exact")) == 0
    tokens = Manifest.load(data)
    cache = load_cache(tmp_path / "exact", tokens)
    span = Span(0, 0, 0, 20)
    tokens_BR, windows = TokenRows(str(data), tokens, "heldout").read(span)
    lengths, wanted = tile(windows, ROW_TOKENS)
    tokens_T = torch.from_numpy(tokens_BR.astype(np.int64).reshape(-1))
    fresh_TF = load_teacher(teacher).features(tokens_T, lengths, wanted)
    assert torch.equal(cache.codec.decode(cache.read("heldout", span), tokens_T, lengths), fresh_TF)


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "4294967291"}])
def test_plain_python_in_a_batch_script_writes_everything(data, teacher, cached, tmp_path, monkeypatch, step):
    """The script's own SLURM variables are of an allocation for four tasks; nobody starts the other three."""
    for name, value in {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        **step,
    }.items():
        monkeypatch.setenv(name, value)
    assert main(command(data, teacher, tmp_path / "batch")) == 0
    assert contents(tmp_path / "batch") == contents(cached)


def test_the_tasks_of_srun_share_the_shards(data, teacher, cached, tmp_path, monkeypatch):
    for name in ("SLURM_STEP_ID", "SLURM_LOCALID", "SLURM_NODEID"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    for name in ("RANK", "WORLD_SIZE"):  # which come first, and which training in this process leaves behind
        monkeypatch.delenv(name, raising=False)
    for rank in "01":
        monkeypatch.setenv("SLURM_PROCID", rank)
        assert main(command(data, teacher, tmp_path / "srun")) == 0
        assert (tmp_path / "srun/manifest.json").exists() == (rank == "1")
    assert contents(tmp_path / "srun") == contents(cached)


def test_two_ranks_write_the_same_bytes(data, teacher, cached, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert main(command(data, teacher, tmp_path / "two")) == 0
        assert (tmp_path / "two/manifest.json").exists() == (rank == "1")
    assert contents(tmp_path / "two") == contents(cached)


@pytest.mark.slow
def test_two_processes_at_once_write_the_same_bytes(data, teacher, cached, tmp_path):
    arguments = command(data, teacher, tmp_path / "two")
    processes = [start(arguments, rank, 2) for rank in (1, 0)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert contents(tmp_path / "two") == contents(cached)


def test_resuming_writes_only_what_is_missing_or_broken(data, teacher, cached, tmp_path):
    output = tmp_path / "resumed"
    shutil.copytree(cached, output)
    (output / "manifest.json").unlink()
    (output / "train-00002.tar").unlink()
    broken = bytearray((output / "train-00003.tar").read_bytes())
    broken[5000] ^= 1
    (output / "train-00003.tar").write_bytes(broken)
    kept = (output / "train-00000.tar").stat().st_mtime_ns
    assert main(command(data, teacher, output)) == 0
    assert contents(output) == contents(cached)
    assert (output / "train-00000.tar").stat().st_mtime_ns == kept
    # Finished: once more changes nothing, and clears away what a run left that was killed while it wrote the manifest.
    (output / ".manifest.json.abc.tmp").write_text("{")
    assert main(command(data, teacher, output)) == 0
    assert contents(output) == contents(cached)


def test_another_job_in_the_same_folder_is_refused(data, teacher, cached, tmp_path, capsys):
    for more in (["--layer", "-2"], ["--target-cosine", "0.98"]):
        assert main(command(data, teacher, cached, *more)) == 2
        assert "holds features of another job" in capsys.readouterr().err
    other = write_teacher(tmp_path / "teacher", data, seed=1)
    assert main(command(data, other, cached)) == 2
    assert "teacher is" in capsys.readouterr().err


def test_waiting_ranks_give_up_with_a_reason(data, teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command(data, teacher, tmp_path / "alone", "--timeout", "0.1")) == 2
    assert "rank 1 waited 0 s for rank 0" in capsys.readouterr().err


def test_urls_are_no_outputs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for data, output in (("data", ["--output", "s3://bucket/features"]), ("https://host/data", [])):
        assert main(["--data", data, "--teacher", "none", "--device", "cpu", *output]) == 2
        assert "is a URL, expected a local folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_report_only_writes_nothing(data, teacher, tmp_path, capsys):
    assert main(command(data, teacher, tmp_path / "none", "--report-only")) == 0
    assert not (tmp_path / "none").exists()
    printed = capsys.readouterr().out
    assert "bytes/token" in printed
    assert "tokens/s" in printed


def test_the_announced_size_is_that_of_the_files(data, teacher, cached, capsys):
    assert main(command(data, teacher, cached, "--report-only")) == 0  # of a cache whose codec is known
    shards = sum(path.stat().st_size for path in cached.glob("*.tar"))
    codec = load_cache(cached, Manifest.load(data)).codec
    printed = capsys.readouterr().out
    assert f"{format_bytes(shards + codec.own_bytes)} (" in printed
    assert f"codec: {codec.bytes_per_token:.0f} bytes/token" in printed


def write_config(path: Path, data: Path, **repa: object) -> str:
    section = {"path": str(data), "streams": 1, "rows_per_step": 1, "micro_batch_rows": 1, "split": {"kind": "none"}}
    path.write_text(json.dumps({"stage": "vae", "model": {"width": 64}, "data": section, "repa": repa}))
    return str(path)


def test_a_config_fills_in_what_is_not_given(data, teacher, tmp_path, capsys):
    repa = {"features": str(tmp_path / "from-config"), "online_teacher": str(teacher)}
    config = write_config(tmp_path / "vae.json", data, **repa)
    (tmp_path / "further.json").write_text(json.dumps({"base": "vae", "train": {"steps": 1}}))
    more = ["--device", "cpu", "--rank", "4", "--bits", "8", "--sample-tokens", "4000", "--set", "repa.layer=-2"]
    assert main(["--config", str(tmp_path / "further.json"), *more]) == 0
    cache = load_cache(tmp_path / "from-config", Manifest.load(data))
    assert cache.manifest.teacher["layer"] == -2
    assert cache.manifest.codec["rank"] == 4
    capsys.readouterr()
    for arguments, expected in (
        (["--config", "no-such-config"], "no configuration no-such-config"),
        (["--data", str(data)], "--teacher is missing"),
        (["--data", str(data), "--set", "repa.layer=-2"], "name it with --config"),
        (["--config", config, "--set", "repa.laier=-2"], "unknown key repa.laier in"),
        (["--config", config, "--set", "data.streams=0"], "expected greater than 0"),
        (["--config", config, "--set", "repa.layer=last"], "expected a valid integer"),
    ):
        assert main(arguments) == 2
        assert expected in capsys.readouterr().err


def test_check_accepts_the_cache_and_refuses_another_teacher(data, teacher, cached, tmp_path, capsys):
    arguments = ["check", "--data", str(data), "--features", str(cached), "--rows", "20", "--device", "cpu"]
    assert main([*arguments, "--teacher", str(teacher)]) == 0
    assert "cosine mean 0.9" in capsys.readouterr().out
    other = write_teacher(tmp_path / "teacher", data, seed=1)
    assert main([*arguments, "--teacher", str(other)]) == 2
    assert "weights are other" in capsys.readouterr().err
    assert main([*arguments, "--teacher", str(teacher), "--rows", "0"]) == 2
    assert "expected at least 1 row" in capsys.readouterr().err


def test_check_finds_a_single_row_with_the_features_of_another(data, teacher, cached, tmp_path, capsys):
    """Its cosine alone does not tell: averaged over all rows, the promise still holds."""
    copy, tokens = tmp_path / "copy", Manifest.load(data)
    shutil.copytree(cached, copy)
    codec, manifest = load_cache(copy, tokens).codec, json.loads((copy / "manifest.json").read_text())
    for swapped in (False, True):
        rows = list(
            zip(*FeatureRows(str(cached), FeatureManifest.load(cached), "train").read(Span(0, 2, 0, 25)).values())
        )
        rows[7] = rows[8 if swapped else 7]
        written = write_shard(copy / "train-00002.tar", feature_members(codec, ROW_TOKENS), rows)
        manifest["splits"]["train"][2]["sha256"] = written.sha256
        for derived in ("fingerprint", "format_version"):
            manifest.pop(derived, None)
        (copy / "manifest.json").write_text(FeatureManifest.create(**manifest).model_dump_json())
        arguments = ["check", "--data", str(data), "--features", str(copy), "--rows", "200", "--device", "cpu"]
        assert main([*arguments, "--teacher", str(teacher)]) == (2 if swapped else 0)
    printed = capsys.readouterr().err
    assert "in 1 of 177 rows: row 7 of train-00002.tar: mean cosine" in printed
    assert "weights are the same" in printed


def test_check_finds_the_features_of_another_model_that_the_same_code_made(
    data, teacher, tmp_path, monkeypatch, capsys
):
    """As if a cut had gone wrong and its proof too: whoever checks runs the whole model, so it shows."""
    find = hidden_state._find_source
    with monkeypatch.context() as patch:
        patch.setattr(hidden_state, "_find_source", lambda model, *rest: (model.layers[1], find(model, *rest)[1]))
        patch.setattr(hidden_state, "_agrees", lambda *_: True)
        assert main(command(data, teacher, tmp_path / "wrong", "--exact")) == 0
        check = ["check", "--data", str(data), "--features", str(tmp_path / "wrong"), "--teacher", str(teacher)]
        assert main([*check, "--device", "cpu"]) == 2
    assert "does not hold the features of" in capsys.readouterr().err


def test_check_finds_the_only_cache(data, teacher, cached, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, "data")
    check = ["check", "--data", "data", "--rows", "3", "--device", "cpu"]
    assert main(check) == 2
    assert "data holds the feature caches: none; name one with --features" in capsys.readouterr().err
    shutil.copytree(cached, "data/features-teacher")
    config = write_config(tmp_path / "c.json", tmp_path / "data", teacher=str(teacher))
    assert main([*check, "--config", config]) == 0
    shutil.copytree("data/features-teacher", "data/another")
    assert main(check) == 2
    assert "holds the feature caches: another, features-teacher" in capsys.readouterr().err


def test_attack_6c_check_loads_no_teacher_that_a_cache_names(data, cached, monkeypatch, capsys):
    monkeypatch.setattr("data_pipeline.features.check.load_teacher", None)
    assert main(["check", "--data", str(data), "--features", str(cached), "--device", "cpu"]) == 2
    assert "but what a cache says is not loaded: name the model with --teacher" in capsys.readouterr().err


def test_mismatches_are_refused_when_opened(data, cached, tmp_path):
    tokens = Manifest.load(data)
    with pytest.raises(UserError, match="features belong to token shards with fingerprint"):
        load_cache(cached, tokens.model_copy(update={"fingerprint": "1" * 64}))
    copy = tmp_path / "copy"
    shutil.copytree(cached, copy)
    (copy / "train-00001.tar").unlink()
    with pytest.raises(UserError, match=r"train-00001\.tar: missing, expected \d+ bytes"):
        load_cache(copy, tokens)
    shutil.copy(cached / "train-00001.tar", copy)
    codec = bytearray((copy / "codec.safetensors").read_bytes())
    codec[-50] ^= 1
    (copy / "codec.safetensors").write_bytes(codec)
    with pytest.raises(UserError, match="but the features were written with"):
        load_cache(copy, tokens)
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match="is no finished folder"):
        load_cache(copy, tokens)


def test_a_teacher_with_another_tokenizer_is_refused(data, shared, tmp_path, capsys):
    assert main(command(data, shared / "teachers/stories260K", tmp_path / "none")) == 2
    assert "differ in" in capsys.readouterr().err


def test_a_hostfile_that_deepspeed_did_not_find_is_said_before_the_teacher_is_loaded(data, tmp_path):
    script = Path(__file__).parents[2] / "data_pipeline" / "cache_features.py"
    (tmp_path / "teacher").mkdir()
    rank = [sys.executable, str(script), "--data", str(data), "--teacher", str(tmp_path / "teacher")]
    done = launched(tmp_path, ["--hostfile", "nothere"], rank)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no hostfile nothere, without which deepspeed would use")
    assert done.stderr.count("\n") == 1
