"""The same text gives the same arrays in the same rows and shards as on the day on which these hashes were written (f50367b).

Read by the standard library and NumPy alone, so that neither our writer nor our reader can hide a change.
"""

import hashlib
import json
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

WORDS = "the a red blue cat dog house tree sees likes and or but very small large".split()  # noqa: SIM905
CASES = {
    "defaults": (
        ["--row-tokens", "256", "--max-document-length", "64", "--min-document-length", "5"],
        "6a3f2dcf5d19f4e322b99b39e70727859cf2319625057457d36ea985ebc60e47",
    ),
    "deduplicated": (
        ["--row-tokens", "128", "--max-document-length", "128", "--seed", "7", "--dedupe", "--heldout-fraction", "0.1"],
        "e06af38885592f9c8d11c9e31c40e0917f654c9117b16dfa324a23319e4ae24c",
    ),
}


def write_text(folder: Path) -> None:
    """Documents of 1 to 120 words, some twice and some empty, in two files."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, int(rng.integers(1, 120)))) + f" {i}." for i in range(900)]
    texts += [texts[3], "", "  \n", *texts[5:8]]
    for name, part in (("a.jsonl", texts[:400]), ("b.jsonl", texts[400:])):
        (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in part))


def digest(folder: Path) -> str:
    """Hash over every member of every shard, by name and order: dtype, shape and values."""
    total = hashlib.sha256()
    for shard in sorted(folder.glob("*.tar")):
        total.update(shard.name.encode())
        with tarfile.open(shard) as tar:
            for member in tar:
                array = np.load(BytesIO(tar.extractfile(member).read()), allow_pickle=False)
                total.update(f"{member.name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("case", CASES)
def test_fixed_text_gives_the_arrays_that_it_always_gave(case: str, tmp_path: Path):
    flags, expected = CASES[case]
    (tmp_path / "source").mkdir()
    write_text(tmp_path / "source")
    write_tokenizer(tmp_path / "tokenizer")
    command = [
        sys.executable,
        "-m",
        "data_pipeline.prepare",
        "--source",
        "source",
        "--tokenizer",
        "tokenizer",
        "--output",
        "out",
    ]
    root = Path(__file__).resolve().parents[2]
    subprocess.run(
        [*command, *flags], cwd=tmp_path, check=True, env={"PYTHONPATH": str(root), "PATH": "", "HOME": str(tmp_path)}
    )
    assert digest(tmp_path / "out") == expected


def write_tokenizer(folder: Path) -> None:
    """A word-level tokenizer that no training decides."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<|endoftext|>", "<unk>", *WORDS, ".", *"0123456789"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]+|\d|\."), "removed", invert=True)
    backend.add_special_tokens(["<|endoftext|>"])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
