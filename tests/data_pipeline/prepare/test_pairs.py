"""prepare of pairs: every window is one record's context and target, cut where they do not fit, and the split travels in the shards."""

import csv
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import webdataset
from tokenizers import Tokenizer, models, pre_tokenizers

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest
from data_pipeline.prepare import passes
from data_pipeline.prepare.__main__ import main
from data_pipeline.prepare.options import PrepareOptions
from data_pipeline.prepare.pack import cut_pair
from data_pipeline.reading.batch import FILLER, PREFIX, SUFFIX, Batch, Split
from data_pipeline.reading.loader import TrainLoader, heldout_batches
from data_pipeline.reading.order import Span
from data_pipeline.reading.shard_pool import TokenRows
from tests.data_pipeline import mutations

NUMBERS = 40
LONGEST, SHORTEST, ROW = 16, 3, 64
END = "<|endoftext|>"


def write_tokenizer(folder: Path) -> None:
    """A token a word; word n has the id n + 1."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate([END, *map(str, range(NUMBERS))])}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([END])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))


def made_pairs(count: int = 400) -> list[tuple[str | None, str | None]]:
    """Random pairs, some of them too long, and one of each kind that is left out or has no context."""
    rng = np.random.default_rng(0)

    def text(words: int) -> str:
        return " ".join(map(str, rng.integers(0, NUMBERS, words)))

    pairs: list[tuple[str | None, str | None]] = [
        (text(int(rng.integers(0, 14))), text(int(rng.integers(3, 14)))) for _ in range(count)
    ]
    return [
        *pairs,
        (text(3), ""),
        (text(3), "  \n"),
        (text(3), None),
        (None, text(5)),
        ("", text(5)),
        ("1", ""),
        ("", "7"),
    ]


PAIRS = made_pairs()


def expected(context: str | None, target: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of both parts, by the rule in other words: target first, at least half each."""
    before = [int(word) + 1 for word in (context or "").split()]
    behind = [*(int(word) + 1 for word in target.split()), 0]
    while len(before) + len(behind) > LONGEST:
        if len(behind) > LONGEST // 2:  # only as far as the context needs the room
            behind.pop()
        else:
            before.pop(0)
    return tuple(before), tuple(behind)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "source").mkdir()
    for name, part in (("a.jsonl", PAIRS[:150]), ("b.jsonl", PAIRS[150:])):
        lines = [json.dumps({"prompt": context, "response": target, "id": 1}) for context, target in part]
        (folder / "source" / name).write_text("\n".join(lines))
    write_tokenizer(folder / "tokenizer")
    run(folder, folder / "out")
    return folder


def run(place: Path, output: Path, source: str = "source", **changes: object) -> Manifest:
    fields: dict = {
        "context_field": "prompt", "target_field": "response", "row_tokens": ROW, "max_document_length": LONGEST,
        "min_document_length": SHORTEST, "heldout_fraction": 0.1, "shards": 4,
    }  # fmt: skip
    manifest = passes.prepare(
        PrepareOptions(str(place / source), str(place / "tokenizer"), output, **(fields | changes))
    )
    assert manifest is not None
    return manifest


def pairs_of(folder: Path) -> Counter:
    """Contexts and targets of all windows, as the reader gives them."""
    manifest, found = Manifest.load(folder), Counter()
    for split, shards in manifest.splits.items():
        for index, shard in enumerate(shards):
            rows = TokenRows(str(folder), manifest, split).read_flat(Span(0, index, 0, shard.rows))
            assert rows.contexts_W is not None
            contexts, lengths = iter(rows.contexts_W.tolist()), iter(rows.lengths_W.tolist())
            for tokens, count in zip(rows.tokens_BR.tolist(), rows.counts_B):
                start = 0
                for _ in range(count):
                    context, length = next(contexts), next(lengths)
                    found[tuple(tokens[start : start + context]), tuple(tokens[start + context : start + length])] += 1
                    start += length
    return found


def test_every_pair_is_a_window_cut_where_it_does_not_fit(place: Path) -> None:
    kept = [(context, target) for context, target in PAIRS if target and target.strip()]
    wanted = [expected(context, target) for context, target in kept]
    wanted = [(before, behind) for before, behind in wanted if len(before) + len(behind) >= SHORTEST]
    assert pairs_of(place / "out") == Counter(wanted)
    counts = Manifest.load(place / "out").statistics
    assert (counts["documents"], counts["empty"], counts["without_text"], counts["too_short"]) == (len(PAIRS), 3, 1, 1)
    assert counts["train_documents"] + counts["heldout_documents"] == len(wanted)
    assert counts["without_context"] == sum(not before for before, _ in wanted) > 2
    full = [(len((context or "").split()), len(target.split()) + 1) for context, target in kept]
    assert counts["contexts_cut"] == sum(c > LONGEST - min(t, LONGEST // 2) for c, t in full) > 10
    assert counts["targets_cut"] == sum(t > max(LONGEST - c, LONGEST // 2) for c, t in full) > 10


@pytest.mark.parametrize("window", [2, 7, 16])
def test_a_cut_pair_fills_its_window_and_neither_side_starves(window: int) -> None:
    for context in range(40):
        for target in range(1, 40):
            before, behind = cut_pair(context, target, window)
            assert before <= context
            assert 1 <= behind <= target
            assert before + behind == min(window, context + target)
            assert before >= min(context, window // 2)
            assert behind >= min(target, (window + 1) // 2)


def test_bytes_depend_on_the_pairs_alone(place: Path, tmp_path: Path) -> None:
    (tmp_path / "csv").mkdir()
    with (tmp_path / "csv" / "all.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["response", "prompt"])
        table.writerows((target or "", context or "") for context, target in reversed(PAIRS))
    (tmp_path / "tokenizer").symlink_to(place / "tokenizer")
    other = run(tmp_path, tmp_path / "out", "csv", workers=2)
    first = Manifest.load(place / "out")
    assert other.splits == first.splits
    assert other.fingerprint == first.fingerprint
    for shards in first.splits.values():
        for shard in shards:
            assert (tmp_path / "out" / shard.name).read_bytes() == (place / "out" / shard.name).read_bytes()


def test_stock_readers_read_the_shards(place: Path) -> None:
    shard = Manifest.load(place / "out").splits["train"][0]
    path = place / "out" / shard.name
    with tarfile.open(path) as tar:
        names = [member.name for member in tar]
    assert names[:3] == ["000000000.tokens.npy", "000000000.lengths.npy", "000000000.contexts.npy"]
    rows = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert len(rows) == shard.rows
    for row in rows:
        lengths, contexts = (
            np.load(BytesIO(row[f"{name}.npy"]), allow_pickle=False) for name in ("lengths", "contexts")
        )
        assert contexts.dtype == np.int32
        assert contexts.shape == lengths.shape
        assert ((contexts >= 0) & (contexts < lengths)).all()


def windows_of(batch: Batch) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Context and target of every window of a batch, by its roles."""
    start, parts = 0, {}
    for length, role, window in zip(batch.segment_lengths, batch.segment_roles, batch.segment_windows):
        if role != FILLER:
            parts.setdefault(window, {PREFIX: (), SUFFIX: ()})[role] = tuple(
                batch.tokens_T[start : start + length].tolist()
            )
        start += length
    return ((found[PREFIX], found[SUFFIX]) for found in parts.values())


@pytest.mark.parametrize("streams", [1, 4])
def test_the_loader_splits_windows_where_the_data_says(place: Path, streams: int) -> None:
    manifest, split = Manifest.load(place / "out"), Split(kind="data")
    heldout = heldout_batches(place / "out", None, split=split, seed=0, micro_batch_rows=3)
    found = Counter(pair for batch in heldout for pair in windows_of(batch))
    rows = sum(shard.rows for shard in manifest.splits["train"])
    with TrainLoader(
        place / "out", None, seed=1, streams=streams, rows_per_step=4, micro_batch_rows=2, split=split
    ) as loader:  # fmt: skip
        steps = [loader.next_step() for _ in range(rows)]
    trained: dict = {}
    for batch in (batch for step in steps for batch in step):
        for pair in windows_of(batch):
            trained[pair] = True
    assert set(found) | set(trained) == set(pairs_of(place / "out"))


def test_other_splits_take_the_windows_as_any_others(place: Path) -> None:
    for kind in ("none", "truncate", "context"):
        batches = list(heldout_batches(place / "out", None, split=Split(kind=kind), seed=0, micro_batch_rows=2))
        assert (
            sum(batch.num_tokens(PREFIX, SUFFIX) for batch in batches)
            == Manifest.load(place / "out").splits["heldout"][0].tokens
        )


def test_whole_texts_have_no_split_of_their_own(prepared: Path) -> None:
    with pytest.raises(
        UserError, match=r"data\.split\.kind is data, but .* set data\.split\.kind=context, or prepare pairs"
    ):
        next(heldout_batches(prepared, None, split=Split(kind="data"), seed=0, micro_batch_rows=1))
    with pytest.raises(UserError, match=r"data\.split\.kind is data"):
        TrainLoader(prepared, None, seed=0, streams=1, rows_per_step=1, micro_batch_rows=1, split=Split(kind="data"))
    assert "pairs" not in json.loads((prepared / "manifest.json").read_text())


def damaged(place: Path, folder: Path, edit: object) -> Path:
    """The first train shard with the context lengths of its row 1 changed."""
    manifest = Manifest.load(place / "out")
    shard = manifest.splits["train"][0]
    entries = mutations.parse((place / "out" / shard.name).read_bytes())
    number = next(i for i, entry in enumerate(entries) if entry.name == b"000000001.contexts.npy")
    replacement = edit(np.load(BytesIO(entries[number].data)).copy())  # type: ignore[operator]
    if replacement is None:
        del entries[number]
    else:
        file = BytesIO()
        np.save(file, replacement)
        entries[number] = mutations.Entry(entries[number].name, file.getvalue())
    data = mutations.archive(entries)
    folder.mkdir(exist_ok=True)
    (folder / shard.name).write_bytes(data)
    fields = manifest.model_dump(exclude={"fingerprint", "format_version"})
    fields["splits"]["train"][0]["bytes"] = len(data)
    (folder / "manifest.json").write_text(Manifest.create(**fields).model_dump_json())
    return folder


def at(place: int, value: int) -> object:
    def edit(contexts: np.ndarray) -> np.ndarray:
        contexts[place] = value
        return contexts

    return edit


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (at(2, 1000), r"row 1 has a context of 1000 tokens in a window of \d+, expected 0 to"),
        (at(0, -1), r"row 1 has a context of -1 tokens in a window of"),
        (lambda contexts: contexts[:-1], r"row 1 has \d+ context lengths for \d+ windows"),
        (lambda contexts: contexts.astype(np.int16), r"000000001\.contexts\.npy"),
        (lambda contexts: contexts.astype(np.int64), r"000000001\.contexts\.npy is not the expected array of int32"),
        (lambda contexts: contexts.astype(np.float32), r"000000001\.contexts\.npy is not the expected array of int32"),
        (lambda contexts: None, r"expected 000000001\.contexts\.npy .* found the name '000000002\.tokens\.npy'"),
    ],
)
def test_wrong_context_lengths_are_one_line_with_shard_and_row(
    place: Path, tmp_path: Path, edit: object, said: str
) -> None:
    folder = damaged(place, tmp_path / "damaged", edit)
    manifest = Manifest.load(folder)
    rows = TokenRows(str(folder), manifest, "train", verify=False)
    with pytest.raises(UserError, match=rf"train-00000\.tar: .*{said}") as error:
        rows.read(Span(0, 0, 0, manifest.splits["train"][0].rows))
    assert "\n" not in str(error.value)
    assert "prepare the data again" in str(error.value)


def test_a_context_that_takes_the_whole_window_is_refused(place: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(place / "out")
    rows = TokenRows(str(place / "out"), manifest, "train").read_flat(Span(0, 0, 1, 2))
    folder = damaged(place, tmp_path / "damaged", lambda _: rows.lengths_W.copy())
    with pytest.raises(UserError, match=r"train-00000\.tar: row 1 has a context of (\d+) tokens in a window of \1,"):
        TokenRows(str(folder), Manifest.load(folder), "train", verify=False).read(Span(0, 0, 1, 2))


def test_the_manifest_and_the_shards_must_agree_on_it(place: Path, tmp_path: Path) -> None:
    folder = damaged(place, tmp_path / "damaged", at(0, 0))
    fields = Manifest.load(folder).model_dump(exclude={"fingerprint", "format_version", "pairs"})
    (folder / "manifest.json").write_text(Manifest.create(**fields).model_dump_json())
    manifest = Manifest.load(folder)
    with pytest.raises(
        UserError, match=r"train-00000\.tar: expected 000000001\.tokens\.npy .* '000000000\.contexts\.npy'"
    ):
        TokenRows(str(folder), manifest, "train", verify=False).read(Span(0, 0, 0, 2))
    text = json.loads((place / "out" / "manifest.json").read_text())
    del text["pairs"]
    (folder / "manifest.json").write_text(json.dumps(text))
    with pytest.raises(UserError, match=r"the fingerprint .* does not match"):
        Manifest.load(folder)


def test_the_commands_show_and_check_the_split(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, tokenizer = str(place / "source"), str(place / "tokenizer")
    sizes = ["--row-tokens", str(ROW), "--max-document-length", str(LONGEST), "--min-document-length", str(SHORTEST)]
    base = ["--source", source, "--tokenizer", tokenizer, "--output", str(tmp_path / "out"), "--workers", "1", *sizes]
    fields = ["--context-field", "prompt", "--target-field", "response"]
    for wrong, said in (
        (fields[:2], "--context-field and --target-field belong together"),
        ([*fields, "--text-field", "id"], "drop one"),
        (["--context-field", "response", *fields[2:]], "are both response"),
        (["--context-field", "question", *fields[2:]], "no field 'question' (found 'prompt', 'response', 'id')"),
    ):
        assert main([*base, *wrong]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "plain.txt").write_text("1 2 3 4 5")
    assert main([*base, *fields, "--source", str(tmp_path / "plain.txt")]) == 2
    assert "plain.txt: plain text, which has no fields" in capsys.readouterr().err
    assert not main([*base, *fields])
    counts = Manifest.load(place / "out").statistics
    assert (
        f"{counts['contexts_cut']} contexts at their beginning, {counts['targets_cut']} targets"
        in capsys.readouterr().out
    )
    assert main([*base, "--text-field", "response"]) == 2
    assert "--context-field was 'prompt', now 'none'" in capsys.readouterr().err
    assert not main(["inspect", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "each window a context of field 'prompt' and a target of field 'response'" in said
    assert "context length (tokens): mean" in said
    assert "' -> '" in said
    assert not main(["verify", str(tmp_path / "out")])
    assert "rows, a context and a target in each window: all as the manifest says" in capsys.readouterr().out
