"""The two pictures: drawn from whatever a run left behind, and honest about what they show."""

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from pretrain.quickstart import report


def write_metrics(run: Path, names: dict[str, float], evaluations: bool = True) -> Path:
    """A run folder whose metrics fall from their given value."""
    run.mkdir()
    lines = []
    for step in range(10, 210, 10):
        values = {name: value / step**0.2 for name, value in names.items()}
        lines.append({"kind": "train", "step": step, "loss": 1.0, **values})
        if evaluations and step % 50 == 0:
            lines.append({"kind": "eval", "step": step, **{f"eval/{name}": value for name, value in values.items()}})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text + '{"kind": "train", "st')  # torn by a kill
    return run


@pytest.fixture
def vae_run(tmp_path: Path) -> Path:
    return write_metrics(tmp_path / "vae", {"ce": 5.0, "token_accuracy": 0.9, "repa_cosine": 0.7})


FLOW = {f"flow_q{q}": 1.5 for q in (1, 2, 3, 4)} | {"nats": 5.0, "unigram_nats": 5.8}
FLOW |= {f"{name}_floor_q{q}": 1.8 for q in (1, 2, 3, 4) for name in ("blind", "covariance")} | {"flow": 1.6}


@pytest.mark.parametrize("evaluations", [True, False])
def test_losses_are_drawn(tmp_path: Path, vae_run: Path, evaluations: bool) -> None:
    run = write_metrics(tmp_path / "dit", FLOW, evaluations)
    (run / "config.json").write_text(json.dumps({"model": {"vae": str(vae_run)}}))
    assert report.vae_of(run) == vae_run
    assert report.main(["--run", str(run), "--output", str(tmp_path / "out")]) == 0
    picture = imread(tmp_path / "out" / "losses.png")
    assert picture.shape[1] > 1200
    assert picture.std() > 0.05
    assert not (tmp_path / "out" / "denoising.png").exists()


def test_a_run_without_metrics_is_a_users_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--run", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "no logged steps" in capsys.readouterr().err


def test_a_trajectory_is_drawn_whatever_characters_it_has(tmp_path: Path) -> None:
    path = tmp_path / "trajectory.json"
    entries = [
        {"t": 1 - i / 50, "text": f"step {i} costs $5 a_b^c \ufffd\x07 日本\n" + "word " * 90} for i in range(51)
    ]
    path.write_text(json.dumps(entries))
    report.draw_denoising(path, tmp_path / "denoising.png")
    assert imread(tmp_path / "denoising.png").shape[1] > 1000


@pytest.mark.parametrize("text", ["{", "[]", '[{"t": 1}]', '{"t": 1, "text": "x"}', "[3]"])
def test_what_is_no_trajectory_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trajectory.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"trajectory"):
        report.draw_denoising(path, tmp_path / "x.png")


def test_chosen_times_run_from_noise_to_data_once_each() -> None:
    entries = [(1 - i / 99, str(i)) for i in range(100)]
    chosen = report.choose(entries)
    assert chosen[0] == entries[0]
    assert chosen[-1] == entries[-1]
    assert len(chosen) == report.SHOWN_TIMES
    assert [t for t, _ in chosen] == sorted({t for t, _ in chosen}, reverse=True)
    assert report.choose(entries[:3]) == entries[:3]


def test_settled_words_are_those_of_the_final_text() -> None:
    words = report.settled_words("the dog ou home", "the dog ran home")
    assert "".join(word for word, _ in words) == "the dog ou home"
    assert [word for word, settled in words if not settled] == ["ou"]


def test_lines_are_wrapped_within_the_columns() -> None:
    words = [(piece, True) for piece in ["a" * 25, " ", "bb", "\n", "ccc", " ", "dddd"]]
    lines = report.wrapped(words, columns=10, max_lines=10)
    texts = ["".join(piece for piece, _ in line) for line in lines]
    assert texts == ["a" * 10, "a" * 10, "aaaaa bb ", "ccc dddd"]
    short = report.wrapped(words, columns=10, max_lines=2)
    assert short[-1][-1] == (" ...", False)


def test_smoothing_starts_at_the_first_value_and_ends_near_the_last() -> None:
    values = [3.0] + [1.0] * 400
    averages = report.smooth(values)
    assert averages[0] == pytest.approx(3.0)
    assert averages[-1] == pytest.approx(1.0, abs=1e-3)
