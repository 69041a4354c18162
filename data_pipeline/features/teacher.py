"""The frozen language model whose hidden states the TextVAE's encoder is aligned to (REPA).

Windows never see each other: each is a sequence of its own, so that the features of a packed row are exactly those of its
windows, run one at a time.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_pipeline.core.errors import UserError
from data_pipeline.features.hidden_state import HiddenState


@dataclass
class Teacher:
    """A causal LM: tokens in, hidden states of one layer out. T packed tokens, W windows padded to L, F features."""

    state: HiddenState
    """Computes the hidden state `state.layer`, an index into transformers' `hidden_states`: 0 is the embeddings, -1 the output of the
    final norm."""
    name: str
    revision: str | None
    feature_dim: int
    vocab_size: int
    """Ids that it has embeddings for."""
    max_positions: int | None
    """Longest window that the model was built for, tokens; None where its configuration names no limit."""
    dtype: torch.dtype
    token_budget: int = 16384
    """Padded tokens in one forward pass: bounds the memory."""
    check_ids: bool = False
    """Look for ids beyond the vocabulary on an accelerator, too, which waits for it at every pass."""
    _fingerprint: str | None = field(default=None, repr=False)

    @property
    def model(self) -> nn.Module:
        return self.state.model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> "Teacher":
        self.model.to(device)
        return self

    def fingerprint(self) -> str:
        """Hash over the weights that take part: a name does not say which weights made the features."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(digest_size=16)
            for name, tensor in sorted(self.model.state_dict().items()):
                if not name.startswith(self.state.unused):
                    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def describe(self) -> dict[str, Any]:
        """The teacher as a cache's manifest names it."""
        return {
            "name": Path(self.name).name if Path(self.name).is_dir() else self.name,
            "revision": self.revision,
            "layer": self.state.layer,
            "num_layers": self.state.num_layers,
            "dtype": str(self.dtype).removeprefix("torch."),
            "weights": self.fingerprint(),
        }

    @torch.inference_mode()
    def features(
        self, tokens_T: torch.Tensor, window_lengths: Sequence[int], wanted: Sequence[bool] | None = None
    ) -> torch.Tensor:
        """Hidden states of packed windows -> float32 [T, F] on the teacher's device.

        `window_lengths` sums to T. Windows that are not `wanted` (a row's filler) are not run, their features are zero.
        Raises UserError for a window beyond the teacher's positions or a token beyond its vocabulary.
        """
        if sum(window_lengths) != len(tokens_T):
            raise UserError(
                f"window lengths sum to {sum(window_lengths)} for {len(tokens_T)} tokens; they must be equal"
            )
        tokens_T = tokens_T.to(self.device, torch.int64)
        features_TF = torch.zeros(len(tokens_T), self.feature_dim, device=self.device)
        for starts, lengths in self._groups(window_lengths, wanted):
            # Right padding needs no mask: a causal model's real tokens cannot see what stands behind them.
            offsets_L = torch.arange(int(lengths.max()), device=self.device)
            real_WL = offsets_L < lengths.to(self.device)[:, None]
            where_WL = (starts.to(self.device)[:, None] + offsets_L) * real_WL
            tokens_WL = tokens_T[where_WL] * real_WL
            self._check_vocabulary(tokens_WL)
            features_TF[where_WL[real_WL]] = self.state(tokens_WL)[real_WL].float()
        return features_TF

    def _groups(
        self, window_lengths: Sequence[int], wanted: Sequence[bool] | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(starts, lengths) of windows of similar length, each group within the token budget once padded."""
        lengths_W = torch.as_tensor(window_lengths, dtype=torch.int64)
        starts_W = lengths_W.cumsum(0) - lengths_W
        keep_W = lengths_W > 0 if wanted is None else (lengths_W > 0) & torch.as_tensor(wanted, dtype=torch.bool)
        lengths_W, starts_W = lengths_W[keep_W], starts_W[keep_W]
        if self.max_positions and len(lengths_W) and int(lengths_W.max()) > self.max_positions:
            raise UserError(
                f"a window of {int(lengths_W.max())} tokens is longer than the {self.max_positions} positions of "
                f"teacher {self.name}; prepare the data with --max-document-length {self.max_positions} or take "
                "another teacher"
            )
        order = lengths_W.argsort(descending=True, stable=True)
        first = 0
        while first < len(order):
            count = max(1, self.token_budget // int(lengths_W[order[first]]))
            group = order[first : first + count]
            yield starts_W[group], lengths_W[group]
            first += count

    def _check_vocabulary(self, tokens_WL: torch.Tensor) -> None:
        if (self.check_ids or tokens_WL.device.type == "cpu") and int(tokens_WL.max()) >= self.vocab_size:
            raise UserError(
                f"token id {int(tokens_WL.max())} is beyond the {self.vocab_size} of teacher {self.name}; "
                "the data was prepared with another tokenizer: prepare it with the teacher's or take another teacher"
            )
