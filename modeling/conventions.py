"""transformers' conventions of `generate`: padded rows in and out, the fields of a GenerationConfig, the record that is returned.

Shape letters: B rows, L tokens of a padded row, T tokens of a text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput

from .prompts import several
from .shapes import DEFAULT_NEW_TOKENS

HONOURED = (
    "max_new_tokens", "max_length", "num_return_sequences", "return_dict_in_generate", "output_scores", "eos_token_id", "pad_token_id",
    "temperature", "guidance_scale", "guidance_interval", "num_steps", "solver", "grid", "seed", "block_size", "best_of", "patience",
)  # fmt: skip
"""What `TextLDM.generate` reads of a GenerationConfig: fields of transformers' own, then ours."""
WITHOUT_EFFECT = ("do_sample", "use_cache", "bos_token_id", "transformers_version", "token_type_ids")
"""What is accepted and changes nothing: every text is drawn, in one way."""
DEFAULTS: dict[str, Any] = {"num_return_sequences": 1, "best_of": 1, "seed": 0, "guidance_interval": (0.0, 1.0)}
"""Of what no source needs to say."""
WHOLE = "a text is drawn whole, not token by token"


@dataclass
class Generated(ModelOutput):
    """What `generate(..., return_dict_in_generate=True)` returns.

    Attributes:
        sequences: as without it.
        scores: float64 [sequences]: upper bounds on the nats of each sequence's new tokens given its prompt, where asked for.
        trajectory: of every solver step, the new tokens [sequences, new tokens] that the one-step estimate decodes to.
        times: [steps], the time of each of them.
    """

    sequences: Any = None
    scores: torch.Tensor | None = None
    trajectory: tuple[torch.Tensor, ...] | None = None
    times: torch.Tensor | None = None


def chosen(
    named: Mapping[str, Any], *sources: Any, honoured: Sequence[str] = HONOURED, why: str = WHOLE
) -> dict[str, Any]:
    """Each honoured setting: as it is named in the call, else in the first source (a GenerationConfig or config) that has it, else None.

    Args:
        honoured: settings that have a meaning for this model; of the others `why` says why they have none.

    Where only a total length is named, what a later source says of new tokens does not count. Raises: ValueError for what a call or its
    GenerationConfig, the first source, asks for in vain.
    """
    passed = sources[0].to_diff_dict() if sources[0] is not None else {}
    for where in (named, passed):
        known = (*honoured, *WITHOUT_EFFECT)
        vain = [name for name, value in where.items() if value is not None and name not in known]
        if vain:
            raise ValueError(
                f"generate() has no use for {', '.join(sorted(vain))}: {why}; expected settings among {', '.join(honoured)}"
            )
    layers = [named, passed, *(vars(source) for source in sources[1:]), DEFAULTS]
    found = {name: next((v for layer in layers if (v := layer.get(name)) is not None), None) for name in honoured}
    for layer in layers:
        if layer.get("max_new_tokens") is not None:
            return found | {"max_length": None}
        if layer.get("max_length") is not None:
            return found | {"max_new_tokens": None}
    return found | {"max_new_tokens": DEFAULT_NEW_TOKENS}


def row_texts(rows_BL: torch.Tensor, attention_mask: Any = None) -> list[torch.Tensor]:
    """The tokens [T] of each row that its mask names, wherever the padding is. Raises: ValueError."""
    rows_BL = rows_BL.cpu()
    if rows_BL.numel() and (rows_BL.is_floating_point() or rows_BL.dtype == torch.bool):
        raise ValueError(f"input_ids are {rows_BL.dtype}; expected integers")
    mask_BL = torch.ones_like(rows_BL) if attention_mask is None else torch.as_tensor(attention_mask).cpu()
    if mask_BL.shape != rows_BL.shape:
        raise ValueError(
            f"attention_mask has shape {list(mask_BL.shape)}; expected that of input_ids, {list(rows_BL.shape)}"
        )
    return [row_L[mask_L.bool()].long() for row_L, mask_L in zip(rows_BL, mask_BL)]


def right_padded(texts: Sequence[torch.Tensor], pad: int) -> torch.Tensor:
    """Int64 [B, L]."""
    return torch.nn.utils.rnn.pad_sequence([ids_T.cpu() for ids_T in texts], batch_first=True, padding_value=pad)


def end_ids(eos_token_id: Any) -> tuple[int, ...]:
    """The tokens that end a text: none, one or several."""
    if eos_token_id is None:
        return ()
    return tuple(int(one) for one in eos_token_id) if several(eos_token_id) else (int(eos_token_id),)
