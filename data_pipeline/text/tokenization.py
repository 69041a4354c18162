"""Tokenizers: loading (hub id, folder or tokenizer.json), identity, training. Called tokenization.py because
tokenize.py would shadow the stdlib.

Documents are encoded without any special token added, text that looks like a special token is encoded as text, and
every document ends with the tokenizer's end-of-text token where it has one (`TokenizerInfo.eos_id`); nothing marks a
document's beginning.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipeline.core.errors import UserError, cli
from data_pipeline.core.storage import atomic_write, read_bytes
from data_pipeline.format.manifest import TokenizerInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
END_OF_TEXT = "<|endoftext|>"
# Marks between documents in the tokenizers' own pretraining. They go before the configured eos_token, which in chat
# models ends a turn instead.
_DOCUMENT_ENDS = (END_OF_TEXT, "<|end_of_text|>")
_USUAL_EOS = ("</s>", "<eos>", "[SEP]")


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer with its identity and the files that reproduce it."""

    backend: Tokenizer
    info: TokenizerInfo
    definition: bytes  # tokenizer.json
    config: dict[str, Any]  # tokenizer_config.json

    def save(self, folder: Path) -> None:
        """Write a folder that AutoTokenizer.from_pretrained and `load_tokenizer` read."""
        definition, config = TOKENIZER_FILES
        with atomic_write(folder / definition) as file:
            file.write(self.definition)
        with atomic_write(folder / config) as file:
            file.write(json.dumps(self.config, indent=2, ensure_ascii=False).encode())


def load_tokenizer(source: str | Path, revision: str | None = None) -> LoadedTokenizer:
    """Load a tokenizer from a folder, a tokenizer.json or the Hugging Face hub.

    Raises:
        UserError: nothing there, or not a fast tokenizer.
    """
    path = Path(source)
    if path.is_dir():
        return _load_files(path.name, None, path / "tokenizer.json", path / "tokenizer_config.json")
    if path.is_file():
        return _load_files(path.parent.name or path.stem, None, path, path.parent / "tokenizer_config.json")
    if path.suffix == ".json" or path.is_absolute() or str(source).startswith("."):
        raise UserError(f"tokenizer {source}: no such file or folder")
    return _download(str(source), revision)


def load_prepared_tokenizer(data: str) -> LoadedTokenizer:
    """The tokenizer beside the shards of a prepared folder, which may be a URL. Raises: UserError."""
    folder, files = f"{data}/tokenizer", []
    for name in TOKENIZER_FILES:
        try:
            files.append(read_bytes(folder, name))
        except FileNotFoundError:
            raise UserError(f"{folder} has no {name}; expected the folder that textldm prepare wrote") from None
        except OSError as error:
            raise UserError(f"{folder}/{name}: cannot be read ({error.strerror}); copy the folder again") from None
    return _describe("tokenizer", None, files[0], _settings(f"{folder}/{TOKENIZER_FILES[1]}", files[1]))


def load_transformers_tokenizer(source: str | Path) -> "PreTrainedTokenizerFast":
    """The tokenizer as transformers' class, with eos_token set to the document end and padding to the same token."""
    from transformers import PreTrainedTokenizerFast

    loaded = load_tokenizer(source)
    eos = loaded.backend.id_to_token(loaded.info.eos_id) if loaded.info.eos_id is not None else None
    return PreTrainedTokenizerFast(tokenizer_object=loaded.backend, eos_token=eos, pad_token=eos)


def encoder(tokenizer: LoadedTokenizer) -> Tokenizer:
    """Its backend, set to encode documents: no truncation, no padding, and special tokens in the text are plain text."""
    tokenizer.backend.no_truncation()
    tokenizer.backend.no_padding()
    tokenizer.backend.encode_special_tokens = True
    return tokenizer.backend


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> LoadedTokenizer:
    """Byte-level BPE with `<|endoftext|>` as its one special token: any text is encodable and decodes to itself."""
    if vocab_size < 257:
        raise UserError(
            f"vocabulary size {vocab_size}: byte-level BPE needs at least 257 (256 bytes and {END_OF_TEXT})"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(texts, trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**9,
    }
    return _describe(f"byte-level-bpe-{vocab_size}", None, backend.to_str(pretty=True).encode(), config)


def tokenizer_hash(definition: bytes) -> str:
    """SHA-256 of a tokenizer.json's meaning: independent of its formatting, key order, truncation and padding
    settings.
    """
    fields = {name: value for name, value in json.loads(definition).items() if name not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _load_files(name: str, revision: str | None, definition: Path, config: Path) -> LoadedTokenizer:
    try:
        data = definition.read_bytes()
        settings = _settings(config, config.read_bytes()) if config.is_file() else {}
    except OSError as error:
        raise UserError(
            f"tokenizer {definition}: cannot be read ({error.strerror}); expected the tokenizer.json of a fast "
            "tokenizer"
        ) from None
    return _describe(name, revision, data, settings)


def _settings(config: Path | str, data: bytes) -> dict[str, Any]:
    """A tokenizer_config.json."""
    try:
        found = json.loads(data)
    except ValueError as error:
        raise UserError(f"tokenizer {config}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"tokenizer {config}: found {type(found).__name__}, expected a JSON object")
    return found


def _describe(name: str, revision: str | None, definition: bytes, config: dict[str, Any]) -> LoadedTokenizer:
    try:
        backend = Tokenizer.from_buffer(definition)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"tokenizer {name}: its tokenizer.json is not a tokenizer ({error})") from None
    special = {token.content: id_ for id_, token in sorted(backend.get_added_tokens_decoder().items()) if token.special}
    info = TokenizerInfo(
        name=name,
        revision=revision,
        sha256=tokenizer_hash(definition),
        vocab_size=1 + max(backend.get_vocab(with_added_tokens=True).values()),
        special_ids=special,
        eos_id=_eos_id(backend, special, config),
    )
    return LoadedTokenizer(backend, info, definition, {"tokenizer_class": "PreTrainedTokenizerFast"} | config)


def _eos_id(backend: Tokenizer, special: dict[str, int], config: dict[str, Any]) -> int | None:
    """The token that ends a document: an end-of-text mark, else the configured eos_token, else a usual one."""
    configured = config.get("eos_token")
    configured = configured.get("content") if isinstance(configured, dict) else configured
    for token in (*_DOCUMENT_ENDS, configured, *_USUAL_EOS):
        if token in special:
            return special[token]
        if token and token == configured and backend.token_to_id(token) is not None:
            return backend.token_to_id(token)
    return None


def _download(name: str, revision: str | None) -> LoadedTokenizer:
    """Tokenizer files of a hub repository, from the local cache when there is no network."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        definition = Path(hf_hub_download(name, "tokenizer.json", revision=revision))
        try:
            config = Path(hf_hub_download(name, "tokenizer_config.json", revision=revision))
        except EntryNotFoundError:
            config = definition.parent / "tokenizer_config.json"
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, EntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"tokenizer {name}: neither a local path nor a tokenizer.json that the Hugging Face hub gives ({reason}); "
            "without a network, give a local folder or tokenizer.json"
        ) from None
    return _load_files(name, revision or _snapshot(definition), definition, config)


def _snapshot(path: Path) -> str | None:
    """Commit of a file in the hub's cache (.../snapshots/<commit>/<file>)."""
    return path.parent.name if path.parent.parent.name == "snapshots" else None


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="textldm tokenizer", description=main.__doc__)
    train = parser.add_subparsers(dest="command", required=True).add_parser("train", help="train byte-level BPE")
    train.add_argument("--source", required=True, help="as in textldm prepare")
    train.add_argument("--text-field", default="text", help="field of the source's records that holds the text")
    train.add_argument("--vocab-size", type=int, required=True, help=f"number of tokens, {END_OF_TEXT} included")
    train.add_argument("--max-megabytes", type=float, default=256, help="read no more text than this")
    train.add_argument("--output", type=Path, required=True, help="folder for the tokenizer's files")
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    """Train a tokenizer."""
    arguments = make_parser().parse_args(argv)
    from data_pipeline.text.sources import open_source

    texts = _first_megabytes(open_source(arguments.source, arguments.text_field), arguments.max_megabytes)
    tokenizer = train_tokenizer(texts, arguments.vocab_size)
    if tokenizer.info.vocab_size < arguments.vocab_size:
        print(f"the text gave only {tokenizer.info.vocab_size} of {arguments.vocab_size} tokens", file=sys.stderr)
    tokenizer.save(arguments.output)
    print(f"{arguments.output}: {tokenizer.info.vocab_size} tokens, sha256 {tokenizer.info.sha256[:16]}")


def _first_megabytes(texts: Iterable[str], megabytes: float) -> Iterator[str]:
    remaining = megabytes * 1e6
    for text in texts:
        if remaining <= 0:
            return
        remaining -= len(text.encode())
        yield text


if __name__ == "__main__":
    raise SystemExit(main())
