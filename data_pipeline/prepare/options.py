"""Options of a preparation, and those of them that must not change between two runs on one output."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import MAX_SHARDS
from data_pipeline.text.sources import source_name
from data_pipeline.text.tokenization import LoadedTokenizer

TEXT_FIELD = "text"


@dataclass(frozen=True)
class PrepareOptions:
    """Arguments of a preparation; see the command's help for each."""

    source: str
    tokenizer: str
    output: Path
    text_field: str = TEXT_FIELD
    context_field: str | None = None
    target_field: str | None = None
    split: str | None = None
    tokenizer_revision: str | None = None
    row_tokens: int = 2048
    max_document_length: int = 1024
    min_document_length: int = 8
    shards: int | None = None
    heldout_fraction: float = 0.005
    seed: int = 0
    max_documents: int | None = None
    dedupe: bool = False
    workers: int = 1
    follow_links: bool = False

    def __post_init__(self) -> None:
        if (self.context_field is None) != (self.target_field is None):
            raise UserError("--context-field and --target-field belong together: give both, or --text-field alone")
        if self.context_field is not None and self.text_field != TEXT_FIELD:
            raise UserError(
                f"--text-field {self.text_field} beside --context-field: windows are whole texts or pairs; drop one"
            )
        if self.context_field is not None and self.context_field == self.target_field:
            raise UserError(f"--context-field and --target-field are both {self.context_field}: name two fields")
        for name in ("row_tokens", "max_document_length", "min_document_length", "workers"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")
        if self.max_document_length < 2 * self.min_document_length:
            raise UserError(
                f"--max-document-length {self.max_document_length} is less than twice --min-document-length "
                f"{self.min_document_length}: "
                "a document slightly too long for one window could not be cut into two; raise the one or lower the "
                "other"
            )
        if self.row_tokens < self.max_document_length:
            raise UserError(
                f"--row-tokens {self.row_tokens} is less than --max-document-length {self.max_document_length}: "
                "a window must fit a row; raise the one or lower the other"
            )
        if self.shards is not None and not 1 <= self.shards <= MAX_SHARDS:
            raise UserError(f"--shards {self.shards}: expected 1 to {MAX_SHARDS}, or auto")
        if self.max_documents is not None and self.max_documents < 1:
            raise UserError(f"--max-documents {self.max_documents}: expected at least 1")
        if not 0 <= self.heldout_fraction < 1:
            raise UserError(f"--heldout-fraction {self.heldout_fraction}: expected a share in [0, 1)")

    @property
    def document_field(self) -> str:
        """The field of a record that holds its text, of pairs its target."""
        return self.target_field or self.text_field

    def arguments(self, tokenizer: LoadedTokenizer) -> dict[str, Any]:
        """Those that must not change between two runs on the same output, by their names on the command line."""
        return {
            "--source": source_name(self.source, self.split),
            "--text-field": self.text_field if self.context_field is None else None,
            "--context-field": self.context_field or "none",
            "--target-field": self.target_field or "none",
            "--tokenizer (hash)": tokenizer.info.sha256,
            "--row-tokens": self.row_tokens,
            "--max-document-length": self.max_document_length,
            "--min-document-length": self.min_document_length,
            "--heldout-fraction": float(self.heldout_fraction),
            "--seed": self.seed,
            "--max-documents": self.max_documents or "all",
            "--dedupe": self.dedupe,
            "--shards": self.shards or "auto",
        }
