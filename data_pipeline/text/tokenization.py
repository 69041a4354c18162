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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipeline.core.errors import ENDINGS, UserError, cli, reason
from data_pipeline.core.hub import check_hub_id, use_hub
from data_pipeline.core.outside import LARGEST_MANIFEST, parse_json, read_at_most
from data_pipeline.core.pointers import pointer
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
_MORE_SETTINGS = ("special_tokens_map.json", "generation_config.json", "config.json")
"""Files beside the tokenizer's that may name its end of text, if tokenizer_config.json does not."""
_UNSPEAKABLE = "\U0010ffff\U0010fffe\U0010ffff"  # noncharacters


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer with its identity and the files that reproduce it."""

    backend: Tokenizer
    info: TokenizerInfo
    definition: bytes  # tokenizer.json
    config: dict[str, Any]  # tokenizer_config.json
    spelt: tuple[str, ...] = ()  # special tokens, and the document's end, that the backend would take text for

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
        return _load(path.name, None, partial(_read_local, path))
    if path.is_file():
        return _load(path.parent.name or path.stem, None, partial(_read_local, path.parent), path.name)
    check_hub_id(str(source), "tokenizer", "a folder, a tokenizer.json or a hub id")
    return _load(str(source), revision, _HubFiles(str(source), revision))


def load_prepared_tokenizer(data: str, made_with: TokenizerInfo) -> LoadedTokenizer:
    """The tokenizer beside the shards of a prepared folder, which may be a URL; `made_with` is what the manifest says of it.

    Raises: UserError, also when another one has been put there.
    """
    folder, files = f"{data}/tokenizer", []
    for name in TOKENIZER_FILES:
        try:
            files.append(read_bytes(folder, name))
        except FileNotFoundError:
            raise UserError(f"{folder} has no {name}; expected the folder that textldm prepare wrote") from None
        except OSError as error:
            raise UserError(f"{folder}/{name}: cannot be read ({error.strerror}); copy the folder again") from None
    config = _settings(f"{folder}/{TOKENIZER_FILES[1]}", files[1])
    found = _describe("tokenizer", None, files[0], config, [_named_end(config)])
    for name in ("sha256", "vocab_size", "eos_id"):
        if getattr(found.info, name) != getattr(made_with, name):
            raise UserError(
                f"{folder}/{TOKENIZER_FILES[0]} has the {name} {getattr(found.info, name)}, the manifest says "
                f"{getattr(made_with, name)} ({made_with.name}): copy the folder again, or prepare the data again"
            )
    return found


def load_transformers_tokenizer(source: str | Path) -> "PreTrainedTokenizerFast":
    """The tokenizer as transformers' class, with eos_token set to the document end and padding to the same token."""
    from transformers import PreTrainedTokenizerFast

    loaded = load_tokenizer(source)
    eos = loaded.backend.id_to_token(loaded.info.eos_id) if loaded.info.eos_id is not None else None
    return PreTrainedTokenizerFast(tokenizer_object=loaded.backend, eos_token=eos, pad_token=eos)


def encoder(tokenizer: LoadedTokenizer) -> Tokenizer:
    """Its backend, set to encode documents: no truncation, no padding, no dropout of merges, and special tokens in the text are
    plain text. Decode with the tokenizer's own backend: this one may have other names for special tokens.
    """
    backend = _without_spelt(tokenizer) if tokenizer.spelt else tokenizer.backend
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None  # a text would have other tokens each time
    return backend


def _spelt(fields: dict[str, Any], special: Iterable[str], eos: str | None) -> tuple[str, ...]:
    """Those of the tokens with a role that text can become, although special tokens in text are encoded as text.

    `encode_special_tokens` keeps the backend from looking for added tokens that are marked special. But Unigram, WordPiece and
    WordLevel find any entry of their vocabulary in the text, BPE any that its merges build (tokenizers converted from SentencePiece
    have `</s>` among both), and a document's end may be an added token that is not marked special. A single character stays what it
    is: nothing else could encode it.
    """
    model = fields["model"]
    vocabulary = model["vocab"] if isinstance(model["vocab"], dict) else {token for token, _ in model["vocab"]}
    found = {token for token in (*special, eos) if token and len(token) > 1 and token in vocabulary}
    if found and "merges" in model and not model.get("ignore_merges"):
        prefix = model.get("continuing_subword_prefix") or ""
        found &= {_merged(merge, prefix) for merge in model["merges"]}
    plain = {token["content"] for token in fields.get("added_tokens") or () if not token.get("special")}
    return tuple(sorted(found | (plain & {eos})))


def _without_spelt(tokenizer: LoadedTokenizer) -> Tokenizer:
    """A backend in which no text becomes one of those tokens: their ids are the same, their names cannot occur."""
    fields = json.loads(tokenizer.definition)
    names = {token: f"{_UNSPEAKABLE}{number}" for number, token in enumerate(tokenizer.spelt)}
    model = fields["model"]
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            merge for merge in model["merges"] if not names.keys() & {*_parts(merge), _merged(merge, prefix)}
        ]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): id_ for token, id_ in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    for token in fields.get("added_tokens") or ():
        token["content"] = names.get(token["content"], token["content"])
    fields["post_processor"] = None  # it adds special tokens, by names, which documents do not get
    return Tokenizer.from_str(json.dumps(fields))


def _parts(merge: str | list[str]) -> list[str]:
    """The two parts of a merge, in either of the forms that tokenizer.json knows."""
    return merge.split(" ") if isinstance(merge, str) else merge


def _merged(merge: str | list[str], prefix: str) -> str:
    """What a merge builds."""
    first, second = _parts(merge)
    return first + second[len(prefix) :]


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
    return _describe(f"byte-level-bpe-{vocab_size}", None, backend.to_str(pretty=True).encode(), config, [END_OF_TEXT])


def tokenizer_hash(definition: bytes) -> str:
    """SHA-256 of a tokenizer.json's meaning: independent of its formatting, key order, truncation and padding
    settings.
    """
    return _hash(parse_json(definition))


def _hash(fields: dict[str, Any]) -> str:
    meaning = {name: value for name, value in fields.items() if name not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(meaning, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _load(
    name: str, revision: str | None, read: Callable[[str], bytes | None], definition_name: str = TOKENIZER_FILES[0]
) -> LoadedTokenizer:
    """A tokenizer of files that `read` gives by their names."""
    definition = read(definition_name)
    if definition is None:
        raise UserError(f"tokenizer {name}: has no {definition_name}; expected the tokenizer.json of a fast tokenizer")
    found = read(TOKENIZER_FILES[1])
    config = _settings(f"{name}/{TOKENIZER_FILES[1]}", found) if found is not None else {}

    def ends() -> Iterator[Any]:
        yield _named_end(config)
        for file in _MORE_SETTINGS:
            found = read(file)
            yield _named_end(_settings(f"{name}/{file}", found)) if found is not None else None

    return _describe(name, revision or getattr(read, "commit", None), definition, config, ends())


def _read_local(folder: Path, file: str) -> bytes | None:
    """A file of the folder, None if there is none."""
    try:
        path = folder / file
        if not path.is_file():
            return None
        if what := pointer(path):
            raise UserError(f"tokenizer {path}: a {what} instead of the contents, which were not fetched")
        with path.open("rb") as opened:
            return read_at_most(opened, LARGEST_MANIFEST)
    except OSError as error:
        raise UserError(f"tokenizer {folder / file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"tokenizer {folder / file}: {error}") from error


class _HubFiles:
    """Files of a hub repository, from the local cache when there is no network."""

    commit: str | None = None

    def __init__(self, name: str, revision: str | None):
        self._name, self._revision = name, revision

    def __call__(self, file: str) -> bytes | None:
        use_hub()
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            path = Path(hf_hub_download(self._name, file, revision=self._revision))
        except Exception as error:  # of the hub, of its network library, of the cache's disk
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                return None
            if self.commit is not None and isinstance(error, LocalEntryNotFoundError):
                return None  # without a network: others of its files are in the cache
            raise UserError(
                f"tokenizer {self._name}: neither a local path nor a {file} that the Hugging Face hub gives ({reason(error)}); "
                "check the name and the network, or give a local folder or tokenizer.json"
            ) from error
        if path.parent.parent.name == "snapshots":  # .../snapshots/<commit>/<file> in the hub's cache
            self.commit = path.parent.name
        return path.read_bytes()


def _named_end(settings: dict[str, Any]) -> Any:
    """The end of text that a file of settings names: a token, an id, or several ids."""
    token = _named_token(settings)
    return token if token is not None else settings.get("eos_token_id")


def _named_token(settings: dict[str, Any]) -> str | None:
    token = settings.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _settings(config: Path | str, data: bytes) -> dict[str, Any]:
    """A tokenizer_config.json."""
    try:
        found = parse_json(data)
    except ValueError as error:
        raise UserError(f"tokenizer {config}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"tokenizer {config}: found {type(found).__name__}, expected a JSON object")
    return found


def _describe(
    name: str, revision: str | None, definition: bytes, config: dict[str, Any], ends: Iterable[Any]
) -> LoadedTokenizer:
    """A tokenizer of its files; `ends` are the ends of text that settings name, the first valid one counts."""
    try:
        backend = Tokenizer.from_buffer(definition)
    except BaseException as error:  # the library raises plain Exception, and where it panics not even that
        if isinstance(error, ENDINGS):
            raise
        raise UserError(f"tokenizer {name}: its tokenizer.json is not a tokenizer ({reason(error)})") from error
    fields = parse_json(definition)
    special = {token.content: id_ for id_, token in sorted(backend.get_added_tokens_decoder().items()) if token.special}
    eos_id = _eos_id(backend, special, ends)
    eos = backend.id_to_token(eos_id) if eos_id is not None else None
    info = TokenizerInfo(
        name=name,
        revision=revision,
        sha256=_hash(fields),
        vocab_size=1 + max(backend.get_vocab(with_added_tokens=True).values()),
        special_ids=special,
        eos_id=eos_id,
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    if eos is not None and backend.token_to_id(_named_token(config) or "") is None:
        config["eos_token"] = eos  # so that the files that `save` writes say it, whatever said it first
    return LoadedTokenizer(backend, info, definition, config, _spelt(fields, special, eos))


def _eos_id(backend: Tokenizer, special: dict[str, int], ends: Iterable[Any]) -> int | None:
    """The token that ends a document: an end-of-text mark, else what settings name, else a usual one."""
    for token in _DOCUMENT_ENDS:
        if token in special:
            return special[token]
    for end in ends:
        for named in end if isinstance(end, list) else [end]:
            if isinstance(named, str) and (id_ := backend.token_to_id(named)) is not None:
                return id_
            if type(named) is int and named >= 0 and backend.id_to_token(named) is not None:
                return named
    return next((special[token] for token in _USUAL_EOS if token in special), None)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="textldm tokenizer", description=main.__doc__)
    train = parser.add_subparsers(dest="command", required=True).add_parser("train", help="train byte-level BPE")
    train.add_argument("--source", required=True, help="as in textldm prepare")
    train.add_argument("--text-field", default="text", help="field of the source's records that holds the text")
    train.add_argument("--split", help="as in textldm prepare")
    train.add_argument("--follow-links", action="store_true", help="as in textldm prepare")
    train.add_argument("--vocab-size", type=int, required=True, help=f"number of tokens, {END_OF_TEXT} included")
    train.add_argument("--max-megabytes", type=float, default=256, help="read no more text than this")
    train.add_argument("--output", type=Path, required=True, help="folder for the tokenizer's files")
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    """Train a tokenizer."""
    arguments = make_parser().parse_args(argv)
    from data_pipeline.text.sources import open_source

    source = open_source(arguments.source, arguments.text_field, arguments.split, follow_links=arguments.follow_links)
    texts = _first_megabytes(source, arguments.max_megabytes)
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
