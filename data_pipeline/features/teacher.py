"""The frozen language model whose hidden states the TextVAE's encoder is aligned to (REPA).

Only the layers up to the wanted one are loaded and run. Windows never see each other: each is a sequence of its own,
so that the features of a packed row are exactly those of its windows, run one at a time.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from data_pipeline.core.errors import UserError
from data_pipeline.core.storage import read_bytes
from data_pipeline.format.manifest import Manifest
from data_pipeline.text.tokenization import load_tokenizer

# What causal decoders of transformers call the norm behind their last layer.
FINAL_NORM_NAMES = ("norm", "ln_f", "final_layernorm", "final_layer_norm")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Teacher:
    """A truncated causal LM: tokens in, hidden states of one layer out."""

    model: nn.Module
    name: str
    revision: str | None
    layer: int
    """As asked for: an index into transformers' `hidden_states`, 0 the embeddings, -1 behind last layer and final
    norm."""
    num_layers: int
    """Layers that are loaded and run."""
    feature_dim: int
    vocab_size: int
    max_positions: int
    """Longest window that the model was built for, tokens."""
    dtype: torch.dtype
    token_budget: int = 16384
    """Padded tokens in one forward pass: bounds the memory."""
    _fingerprint: str | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> "Teacher":
        self.model.to(device)
        return self

    def fingerprint(self) -> str:
        """Hash over the loaded weights: a name does not say which weights made the features."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(digest_size=16)
            for name, tensor in sorted(self.model.state_dict().items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def describe(self) -> dict[str, Any]:
        """The teacher as a cache's manifest names it."""
        return {
            "name": Path(self.name).name if Path(self.name).is_dir() else self.name,
            "revision": self.revision,
            "layer": self.layer,
            "num_layers": self.num_layers,
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
            hidden_WLF = self.model(input_ids=tokens_WL, use_cache=False).last_hidden_state
            features_TF[where_WL[real_WL]] = hidden_WLF[real_WL].float()
        return features_TF

    def _groups(
        self, window_lengths: Sequence[int], wanted: Sequence[bool] | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(starts, lengths) of windows of similar length, each group within the token budget once padded."""
        lengths_W = torch.as_tensor(window_lengths, dtype=torch.int64)
        starts_W = lengths_W.cumsum(0) - lengths_W
        keep_W = lengths_W > 0 if wanted is None else (lengths_W > 0) & torch.as_tensor(wanted, dtype=torch.bool)
        lengths_W, starts_W = lengths_W[keep_W], starts_W[keep_W]
        if len(lengths_W) and int(lengths_W.max()) > self.max_positions:
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
        # On an accelerator the check would halt the queue at every batch; there the embedding itself asserts.
        if tokens_WL.device.type == "cpu" and int(tokens_WL.max()) >= self.vocab_size:
            raise UserError(
                f"token id {int(tokens_WL.max())} is beyond the {self.vocab_size} of teacher {self.name}; "
                "the data was prepared with another tokenizer: prepare it with the teacher's or take another teacher"
            )


def load_teacher(
    name_or_path: str | Path,
    layer: int = -3,
    revision: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    token_budget: int = 16384,
) -> Teacher:
    """Load a causal LM up to `layer` from the hub or a local folder, in evaluation mode, on the CPU.

    `layer` indexes transformers' `hidden_states`: of L layers there are L + 1, so -3 is what layer L - 2 puts out.
    Raises UserError for a model that cannot be read, that is not causal, or that has no such layer.
    """
    name = str(name_or_path)
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no teacher at {name}: {_first_line(error)}; give a hub id or a local Hugging Face folder"
        ) from error
    total = config.num_hidden_layers
    if not -(total + 1) <= layer <= total:
        raise UserError(f"teacher {name} has {total} layers: layer must be in [{-total - 1}, {total}], found {layer}")
    used = layer % (total + 1)
    _truncate(config, used)
    model = _load_weights(name, revision, config, dtype)
    model.eval().requires_grad_(False)
    if used < total:
        _drop_final_norm(model, name)
    _refuse_bidirectional(model, name, config.vocab_size)
    return Teacher(
        model=model,
        name=name,
        revision=revision or getattr(config, "_commit_hash", None),
        layer=layer,
        num_layers=used,
        feature_dim=config.hidden_size,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        dtype=dtype,
        token_budget=token_budget,
    )


def _truncate(config: PreTrainedConfig, num_layers: int) -> None:
    """Keep the first layers alone, per-layer settings included."""
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    config.num_hidden_layers = num_layers


def _load_weights(name: str, revision: str | None, config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The truncated model; every weight it has must come from the checkpoint."""
    try:
        with _quiet_transformers():
            model, info = AutoModel.from_pretrained(
                name,
                revision=revision,
                config=config,
                dtype=dtype,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load teacher {name}: {_first_line(error)}") from error
    # A pooler is random in checkpoints without one, and nothing here reads it.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise UserError(
            f"teacher {name} has no weights for {missing[0]} (and {len(missing) - 1} more): they would be random; "
            "check that the folder holds the model that its config.json describes"
        )
    return model


def _drop_final_norm(model: nn.Module, name: str) -> None:
    """Below the last layer, `hidden_states` are taken before the final norm: take it out."""
    for attribute in FINAL_NORM_NAMES:
        if isinstance(getattr(model, attribute, None), nn.Module):
            setattr(model, attribute, nn.Identity())
            return
    raise UserError(
        f"teacher {name} ({type(model).__name__}) has no final norm under a known name {FINAL_NORM_NAMES}; "
        "Llama- and Qwen-like decoders work"
    )


@torch.inference_mode()
def _refuse_bidirectional(model: nn.Module, name: str, vocab_size: int) -> None:
    """Tried rather than believed: changing the last token must leave the features before it alone."""
    tokens_WL = (torch.arange(16).expand(2, 16) * 7 + 1) % vocab_size
    tokens_WL = tokens_WL.clone()
    tokens_WL[1, -1] = (tokens_WL[1, -1] + 1) % vocab_size
    first, second = model(input_ids=tokens_WL.to(next(model.parameters()).device)).last_hidden_state.float()
    changed = ((first - second)[:-1].norm(dim=-1) / first[:-1].norm(dim=-1)).max()
    if changed > 4 * torch.finfo(next(model.parameters()).dtype).eps:
        raise UserError(
            f"teacher {name} is not causal: its features of a prefix depend on what follows, so neither truncation nor "
            "the feature cache would be exact; take a causal language model"
        )


def check_same_tokenizer(name: str, revision: str | None, data: str, tokens: Manifest) -> None:
    """Refuse a teacher for which the data's token ids mean something else.

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
    """Refuse at once what would fail on some window later: foreign tokens, windows beyond the teacher's positions."""
    check_same_tokenizer(teacher.name, teacher.revision, data, tokens)
    if tokens.tokenizer.vocab_size > teacher.vocab_size:
        raise UserError(
            f"the data's tokenizer {tokens.tokenizer.name} has ids up to {tokens.tokenizer.vocab_size - 1}, teacher "
            f"{teacher.name} knows {teacher.vocab_size}: prepare the data with the teacher's tokenizer or take "
            "another teacher"
        )
    if tokens.max_window > teacher.max_positions:
        raise UserError(
            f"windows of up to {tokens.max_window} tokens, but teacher {teacher.name} has {teacher.max_positions} "
            f"positions: prepare the data with --max-document-length {teacher.max_positions} or take another teacher"
        )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No warnings about the layers that are left out on purpose, no progress bar of a second."""
    verbosity = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
