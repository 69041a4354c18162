"""Does a teacher fit the data? Before anything long begins: what would fail on some window later is refused at once."""

from tokenizers import Tokenizer

from data_pipeline.core.errors import UserError
from data_pipeline.core.storage import read_bytes
from data_pipeline.features.teacher import Teacher
from data_pipeline.format.manifest import Manifest
from data_pipeline.text.tokenization import load_tokenizer


def check_same_tokenizer(name: str, revision: str | None, data: str, tokens: Manifest) -> None:
    """Refuse a teacher for which the data's token ids mean something else. Needs no weights.

    Its tokenizer must be that of the prepared folder `data`, or at least give each of its tokens the same id: chat
    models add special tokens behind a shared vocabulary.
    """
    theirs = load_tokenizer(name, revision)
    if theirs.info.sha256 == tokens.tokenizer.sha256:
        return
    vocabulary = theirs.backend.get_vocab()
    try:
        ours = Tokenizer.from_buffer(read_bytes(f"{data}/tokenizer", "tokenizer.json")).get_vocab()
    except FileNotFoundError:
        raise UserError(f"{data}/tokenizer/tokenizer.json does not exist: copy the prepared folder again") from None
    differing = [token for token, index in ours.items() if vocabulary.get(token) != index]
    if differing:
        token = min(differing, key=ours.__getitem__)
        raise UserError(
            f"the data's tokenizer {tokens.tokenizer.name} ({len(ours)} tokens) and that of teacher {name} "
            f"({len(vocabulary)} tokens) differ in {len(differing)} tokens, first {token!r}: id {ours[token]} and "
            f"{vocabulary.get(token)}; prepare the data with the teacher's tokenizer or take another teacher"
        )


def check_fit(teacher: Teacher, data: str, tokens: Manifest) -> None:
    """Refuse foreign tokens and windows beyond the teacher's positions.

    A tokenizer may know more ids than its model has embeddings for. Text becomes no special token, but for the one that ends
    documents: if all others beyond are such, none occurs. Else the teacher looks for them in every pass.
    """
    check_same_tokenizer(teacher.name, teacher.revision, data, tokens)
    info = tokens.tokenizer
    if info.vocab_size > teacher.vocab_size:
        if info.eos_id is not None and info.eos_id >= teacher.vocab_size:
            raise UserError(
                f"every document of the data ends with token {info.eos_id} of tokenizer {info.name}, but teacher {teacher.name} "
                f"has embeddings for {teacher.vocab_size} tokens: give its tokenizer an eos_token that the model knows and "
                "prepare the data again, or take another teacher"
            )
        beyond = sum(id_ >= teacher.vocab_size for id_ in info.special_ids.values())
        teacher.check_ids = info.vocab_size - teacher.vocab_size > beyond
    if teacher.max_positions and tokens.max_window > teacher.max_positions:
        raise UserError(
            f"windows of up to {tokens.max_window} tokens, but teacher {teacher.name} has {teacher.max_positions} "
            f"positions: prepare the data with --max-document-length {teacher.max_positions} or take another teacher"
        )
