"""Token ids of prepared data back to text."""

from collections.abc import Iterable, Sequence

from data_pipeline.format.manifest import Manifest
from data_pipeline.text.tokenization import load_prepared_tokenizer


class Detokenizer:
    """By the tokenizer that the data was made with. Raises: UserError when its folder is not there, or holds another."""

    def __init__(self, data: str, manifest: Manifest):
        self._backend = load_prepared_tokenizer(data, manifest.tokenizer).backend
        self._eos = manifest.tokenizer.eos_id
        self._special = set(manifest.tokenizer.special_ids.values())

    def texts(self, tokens: Iterable[Sequence[int]]) -> list[str]:
        """The texts up to the end-of-text token; other special tokens become spaces."""
        parts = [self._parts(ids) for ids in tokens]
        decoded = iter(self._backend.decode_batch([part for of_text in parts for part in of_text]))
        return [" ".join(next(decoded) for _ in of_text) for of_text in parts]

    def _parts(self, ids: Sequence[int]) -> list[list[int]]:
        parts: list[list[int]] = [[]]
        for token in ids:
            if token == self._eos:
                break
            if token in self._special:
                parts.append([])
            else:
                parts[-1].append(token)
        return parts
