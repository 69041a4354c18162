"""The benchmarks of models and kernels run, and say what the documents quote; in miniature."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import attention, lm_head, sampling, train_step
from benchmarks.lm_head import peak_bytes
from benchmarks.plain_dit import PlainDiT
from data_pipeline.core.errors import UserError
from data_pipeline.text.tokenization import train_tokenizer
from modeling.attention import Segments
from modeling.text_dit import TextDiT, TextDiTConfig


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder with `text.jsonl` of short documents and a tokenizer."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["red", "old", "tree", "house"], size=int(rng.integers(10, 60)))) for _ in range(120)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    train_tokenizer(texts, 270).save(tmp_path / "tokenizer")
    return tmp_path


def last_line(capsys: pytest.CaptureFixture[str]) -> dict:
    """The JSON object that ends the output."""
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"machine", "versions", "commit", "date"} <= figures.keys()
    return figures


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_train_step(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    corpus = str(text / "text.jsonl")
    sizes = ["--rows", "2", "--row-tokens", "128", "--width", "64", "--layers", "1", "--vocab-size", "4096"]
    arguments = ["--openwebtext", corpus, "--tinystories", corpus, "--tokenizer", str(text / "tokenizer"), *sizes]
    try:
        assert train_step.main([*arguments, "--head-tokens", "4096", "--repetitions", "1", "--threads", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    figures = last_line(capsys)
    bars = ("cpu_utilisation", "padded_over_packed_openwebtext", "padded_over_packed_tinystories")
    assert all(figures[name] > 0 for name in (*bars, "head_time_ratio"))
    # The naive one's logits alone are 64 MiB: they always show in a process's size. Our chunks may fit into memory that it has anyway.
    assert figures["head_naive_peak_gb"] > 0.06
    assert figures["head_memory_ratio"] < 1
    assert "utilisation_openwebtext_cpu" in figures


def test_a_head_too_small_to_be_measured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "peak_bytes", lambda run, device: 0)
    with pytest.raises(UserError, match=r"logits of \(3, 8\) are too small .* raise --head-tokens"):
        lm_head.Head(3, 4, 8, torch.device("cpu"), torch.float32).figures(1)


def test_rows_are_full_and_as_the_text_is(text: Path) -> None:
    rows = train_step.rows_of(text / "text.jsonl", str(text / "tokenizer"), 128, 3)
    assert [sum(row) for row in rows] == [128] * 3


def test_the_plain_model_is_ours_on_padded_windows() -> None:
    torch.manual_seed(0)
    ours = TextDiT(TextDiTConfig(latent_dim=8, width=32, num_layers=2, head_dim=16)).eval()
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.2)
    plain = PlainDiT(8, 32, 2, 16, 12)
    names = {"transformer.": "", "attention.": "", "mlp_in": "mlp.0", "mlp_out": "mlp.2", "head.": ""}
    state = ours.state_dict()
    for old, new in names.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert (sorted(missing), unexpected) == (["cos_LK", "sin_LK"], [])
    lengths = torch.tensor([12, 5, 9])
    padded_BLZ = torch.randn(3, 12, 8)
    real_BL = torch.arange(12) < lengths[:, None]
    found = plain(padded_BLZ, real_BL[:, None, None, :])[real_BL]
    is_target_T = torch.ones(26, dtype=torch.bool)
    expected = ours(padded_BLZ[real_BL], is_target_T, torch.zeros(26), Segments.from_lengths(lengths.tolist()))
    torch.testing.assert_close(found, expected.velocity_TZ, rtol=1e-4, atol=1e-4)
    # So both have as many FLOPs to do on real tokens.
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in ours.parameters())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_peak_memory_is_what_a_call_holds_beyond_before() -> None:
    kept = torch.ones(16 << 20)
    # What other threads of this process give back meanwhile hides some of it.
    peak = max(peak_bytes(lambda: kept.mul(2).add_(1), torch.device("cpu")) for _ in range(3))
    assert 0.9 < peak / (4 * kept.numel()) < 1.5


def test_attention(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--width", "128", "--lengths", "40", "9", "--repetitions", "1", "--device", "cpu"]
    assert attention.main(sizes) == 0
    figures = last_line(capsys)
    assert 0 < figures["largest_error"] < 1e-5
    assert set(figures["tflops"]) == {"sdpa 64", "sdpa 128"}
    assert set(figures["errors"]["sdpa 64"]) == {"one", "single tokens", "tiny", "ragged"}


def test_sampling_is_scored_against_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right tokens are 0 to 9, in two prompts; each run gets as many right as it has tens of steps, twice on the even grid."""

    def sample(
        stage: object, prompts: object, scale: float, num_steps: int, solver: str, grid: str = "training", **_: object
    ) -> SimpleNamespace:
        right = num_steps // 10 * (2 if grid == "even" else 1)
        tokens = [i if i < right else -1 for i in range(10)]
        return SimpleNamespace(tokens=[tokens[:4], tokens[4:]])

    monkeypatch.setattr(sampling, "sample", sample)
    figures = sampling.measure(None, [], 1.0, [16], 100, 0)  # type: ignore[arg-type]
    assert (figures["agreement_16"], figures["agreement_euler50"], figures["reference_agreement"]) == (0.2, 0.5, 0.5)
    # 2 of 4 less in the first prompt, 1 of 6 in the second: of the sum, sqrt(2) standard deviations of 1 / 2.
    assert figures["difference_error"] == pytest.approx(math.sqrt(2) * 0.5 / 10)
    assert figures["best_16"] == "multistep, even grid"  # as good as Heun's method, with fewer evaluations
    assert (figures["evaluations_16"], figures["evaluations_euler50"]) == (16, 50)
    evaluations = {(row["solver"], row["steps"]): row["evaluations"] for row in figures["table"]}
    assert (evaluations["heun", 16], evaluations["multistep", 16]) == (31, 16)
