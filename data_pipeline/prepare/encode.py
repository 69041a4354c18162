"""First pass of prepare: a bundle of the source's units becomes token ids in spill chunks. Runs in worker processes, one bundle
at a time.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from data_pipeline.core.errors import ENDINGS, UserError, reason
from data_pipeline.core.storage import write_text
from data_pipeline.prepare.pack import cut_pair
from data_pipeline.prepare.spill import write_chunk
from data_pipeline.text.sources import Bundle, read_bundle, read_pairs
from data_pipeline.text.tokenization import LoadedTokenizer, encoder

CHUNK_TOKENS = 16 << 20  # memory of a worker: a chunk is held until it is written
_BATCH_CHARACTERS = 1 << 20
_CACHED_WORDS = 1 << 17  # of the tokenizer: 10,000 by default, which costs a tenth of its speed
_tokenizer: Tokenizer


@dataclass(frozen=True)
class EncodeTask:
    """What a worker needs to encode a bundle of units; with a `context_field`, `text_field` is that of the targets."""

    index: int
    bundle: Bundle
    text_field: str
    work: Path
    eos_id: int | None
    token_dtype: str
    min_window: int
    seed: int
    max_window: int
    context_field: str | None = None
    max_documents: int | None = None


@dataclass
class BundleResult:
    """Counts of an encoded bundle, kept beside its chunks; its presence says that the bundle is finished.

    Of the documents found, those without text (null where text should be), empty (nothing but blanks) and too short go; of pairs,
    that is said of their targets, and `without_context`, `contexts_cut` and `targets_cut` count pairs that are kept.
    """

    documents: int = 0
    without_text: int = 0
    empty: int = 0
    too_short: int = 0
    tokens: int = 0
    text_bytes: int = 0
    without_context: int = 0
    contexts_cut: int = 0
    targets_cut: int = 0
    chunks: list[str] = field(default_factory=list)


def use_tokenizer(tokenizer: LoadedTokenizer) -> None:
    """Set what `encode_bundle` encodes with, in this process and those forked from it."""
    global _tokenizer
    _tokenizer = encoder(tokenizer)
    if hasattr(_tokenizer.model, "_resize_cache"):  # WordPiece and WordLevel look words up without one
        _tokenizer.model._resize_cache(_CACHED_WORDS)


def encode_bundle(task: EncodeTask, progress: Callable[[int, int], None]) -> BundleResult:
    """Encode the bundle's documents into chunks and write its result; calls progress(documents, bytes of text)."""
    result = BundleResult()
    hashes: list[bytes] = []
    documents: list[np.ndarray] = []
    contexts: list[int] = []
    held = 0
    for texts in _batches(task, result):
        before = result.text_bytes
        for data, tokens, context in _encode(texts, task, result):
            result.text_bytes += len(data)
            if len(tokens) < task.min_window:
                result.too_short += 1
                continue
            hashes.append(document_hash(data, task.seed))
            documents.append(tokens)
            contexts.append(context)
            held += len(tokens)
        if held >= CHUNK_TOKENS:
            _flush(task, result, hashes, documents, contexts)
            held = 0
        progress(len(texts), result.text_bytes - before)
    _flush(task, result, hashes, documents, contexts)
    write_text(result_path(task.work, task.index), json.dumps(asdict(result)))
    return result


def result_path(work: Path, index: int) -> Path:
    """Path of a bundle's result. The file exists once the bundle is encoded."""
    return work / "bundles" / f"{index:06d}.json"


def load_result(work: Path, index: int) -> BundleResult | None:
    """The result of a finished bundle."""
    path = result_path(work, index)
    return BundleResult(**json.loads(path.read_bytes())) if path.exists() else None


def document_hash(data: bytes, seed: int) -> bytes:
    """128-bit keyed hash of a document's text; decides its place: held-out or train, which group, and which are
    equal.
    """
    return hashlib.blake2b(data, digest_size=16, key=f"textldm document {seed}".encode()).digest()


def _records(task: EncodeTask) -> Iterator[tuple[str, str | None]]:
    """Context and text of each record; the context is "" where there is none."""
    if task.context_field is None:
        return (("", text) for text in read_bundle(task.bundle, task.text_field))
    return ((context or "", text) for context, text in read_pairs(task.bundle, task.context_field, task.text_field))


def _batches(task: EncodeTask, result: BundleResult) -> Iterator[list[tuple[str, str]]]:
    """Contexts and texts of documents that are not empty, a megabyte of text at a time, across the bundle's units."""
    batch: list[tuple[str, str]] = []
    size = 0
    for context, text in islice(_records(task), task.max_documents):
        result.documents += 1
        if text is None:
            result.without_text += 1
            continue
        if not text or text.isspace():
            result.empty += 1
            continue
        batch.append((context, text))
        size += len(context) + len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(
    batch: list[tuple[str, str]], task: EncodeTask, result: BundleResult
) -> Iterator[tuple[bytes, np.ndarray, int]]:
    """UTF-8 bytes and token ids, the document end included, of each document, and how many of the tokens are its context.

    A pair's context and target are tokenised apart, as a prompt is when the model is used, and fit one window. Raises: UserError.
    """
    tail = [] if task.eos_id is None else [task.eos_id]
    texts = [text for _, text in batch]
    if task.context_field is None:
        for text, document in zip(texts, _token_ids(texts, task), strict=True):
            yield text.encode(), np.array(document + tail, dtype=task.token_dtype), 0
        return
    contexts = [context for context, _ in batch]
    pairs = zip(contexts, texts, _token_ids(contexts, task), _token_ids(texts, task), strict=True)
    for context, text, context_ids, target_ids in pairs:
        before, behind = cut_pair(len(context_ids), len(target_ids) + len(tail), task.max_window)
        tokens = context_ids[len(context_ids) - before :] + (target_ids + tail)[:behind]
        is_kept = len(tokens) >= task.min_window
        if not behind:
            is_kept, tokens, before = False, [], 0  # a text that the tokenizer makes nothing of
        result.without_context += is_kept and not before
        result.contexts_cut += is_kept and before < len(context_ids)
        result.targets_cut += is_kept and behind < len(target_ids) + len(tail)
        data = context.encode()
        # With its length before it, so that no other pair has the same bytes.
        yield b"%d " % len(data) + data + text.encode(), np.array(tokens, dtype=task.token_dtype), before


def _token_ids(texts: list[str], task: EncodeTask) -> list[list[int]]:
    """Token ids of each text. Raises UserError if the tokenizer fails at one, or gives document ends within it, which training would
    take for the ends of documents.
    """
    place = f"source {task.bundle[0].location}" + (f" and {len(task.bundle) - 1} more" if len(task.bundle) > 1 else "")
    try:
        encodings = _tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    except BaseException as error:  # the library raises plain Exception, and where it panics not even that
        if isinstance(error, ENDINGS):
            raise
        raise UserError(
            f"{place}: the tokenizer cannot encode a text there ({reason(error)}); use another tokenizer, or mend this one's "
            "tokenizer.json"
        ) from error
    documents = [encoding.ids for encoding in encodings]
    if task.eos_id is not None:
        ends = [document.count(task.eos_id) for document in documents]
        if any(ends):
            first = next(text for text, count in zip(texts, ends) if count)
            raise UserError(
                f"{place}: the tokenizer's end-of-text token (id {task.eos_id}) occurs {sum(ends)} times within "
                f"{sum(map(bool, ends))} of {len(texts)} texts there, of which the first begins {first[:60]!r}; if it stands for "
                "unknown words too, use another tokenizer, or give this one another eos_token in tokenizer_config.json"
            )
    return documents


def _flush(
    task: EncodeTask, result: BundleResult, hashes: list[bytes], documents: list[np.ndarray], contexts: list[int]
) -> None:
    """Write what is held as the bundle's next chunk."""
    if not documents:
        return
    name = f"{task.index:06d}-{len(result.chunks):03d}.spill"
    halves = np.frombuffer(b"".join(hashes), ">u8").reshape(-1, 2).astype(np.uint64)
    write_chunk(task.work / "bundles" / name, halves, documents, task.token_dtype, contexts)
    result.chunks.append(name)
    result.tokens += sum(map(len, documents))
    for held in (hashes, documents, contexts):
        held.clear()
