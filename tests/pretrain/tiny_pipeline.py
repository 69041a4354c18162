"""Both stages trained for two steps each on random data with a real tokenizer, by the public code: what an export is made of."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data_pipeline.format.manifest import Manifest
from data_pipeline.text.tokenization import tokenizer_hash
from pretrain import train
from tests.pretrain import tiny_run

WORDS = ["<|endoftext|>", *(f"w{i}" for i in range(1, tiny_run.VOCABULARY))]


def write_data(folder: Path, seed: int = 0) -> Path:
    """`tiny_run.write_data` with a tokenizer of words w1 ... w63, the end-of-text token being 0."""
    tiny_run.write_data(folder, seed)
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w1"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    backend.add_special_tokens(["<|endoftext|>"])
    definition = backend.to_str().encode()
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_bytes(definition)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": WORDS[0]}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    fields = json.loads((folder / "manifest.json").read_text())
    fields["tokenizer"] |= {"sha256": tokenizer_hash(definition), "eos_id": 0, "special_ids": {WORDS[0]: 0}}
    for derived in ("fingerprint", "format_version"):
        del fields[derived]
    (folder / "manifest.json").write_text(Manifest.create(**fields).model_dump_json())
    return folder


def dit_values(data: Path, vae: Path, run: Path, model: dict | None = None, **train_section: object) -> dict:
    """A configuration of stage dit."""
    values = tiny_run.config_values(data, run, steps=2, eval_every=0, **train_section)
    values |= {"stage": "dit", "flow": {"statistics_rows": 8, "time_std": 1.2}}
    values["model"] = {"vae": str(vae), "latent_dim": 4, "width": 32, "num_layers": 2, "head_dim": 16} | (model or {})
    values["data"]["split"] = {"kind": "context", "min_tokens": 2}
    del values["repa"]
    return values


def start(folder: Path, values: dict) -> Path:
    """Train in this process; returns the run folder."""
    config = tiny_run.write_config(folder / f"{Path(values['train']['run']).name}.json", values)
    assert train.main(["--config", str(config)]) == 0
    return Path(values["train"]["run"])


def train_both(folder: Path) -> tuple[Path, Path, Path]:
    """(data, run of stage 1, run of stage 2) below `folder`."""
    data = write_data(folder / "data")
    vae = start(folder, tiny_run.config_values(data, folder / "vae", steps=2, eval_every=0))
    # A learning rate at which two steps give every token its own latent and the output head something to say.
    dit = start(folder, dit_values(data, vae, folder / "dit"))
    return data, vae, dit
