"""How many tokens a stage's embedding and head are for."""

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest


def vocab_size_of(wanted: int, manifest: Manifest, data: str) -> int:
    """Rows of an embedding: `wanted`, or for 0 the size of the data's tokenizer. Raises: UserError for too few."""
    if wanted and wanted < manifest.tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size is {wanted}, but {data} has tokens up to {manifest.tokenizer.vocab_size - 1}: expected at"
            f" least {manifest.tokenizer.vocab_size}; 0 takes it from the data"
        )
    return wanted or manifest.tokenizer.vocab_size
