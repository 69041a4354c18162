"""Masked diffusion of tokens as a Hugging Face model: probabilities of masked tokens, texts drawn from them, and the bound on -log p.

This file and its neighbours travel in exported folders (`trust_remote_code=True`), so they import only torch, transformers and each other.

Shape letters: B rows, L tokens of a padded row, T tokens of all texts, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.modeling_outputs import MaskedLMOutput

from .attention import Segments
from .beyond_window import block_sizes, keyed_generator, latest, repeated, sequence_keys
from .conventions import chosen, end_ids, right_padded, row_texts
from .masked_diffusion import sample_targets, window_nats
from .pretrained import ExportedModel
from .prompts import each, end_of, texts_of
from .shapes import TokenTransformerConfig
from .token_transformer import TokenTransformer

HONOURED = (
    "max_new_tokens", "max_length", "num_return_sequences", "eos_token_id", "pad_token_id", "temperature", "num_steps", "seed",
    "block_size",
)  # fmt: skip
"""What `TextMDLM.generate` reads of a GenerationConfig."""


class TextMDLMConfig(PretrainedConfig):
    """Its shape and the defaults of `generate`.

    Attributes:
        shape: fields of TokenTransformerConfig. The mask's id is its vocab_size.
        num_steps: in which the tokens of a block are revealed, as many in each.
        max_window: longest window, context and continuation together, in tokens.
    """

    model_type = "textmdlm"

    def __init__(self, shape: dict[str, Any] | None = None, num_steps: int = 64, max_window: int = 1024, **kwargs: Any):
        self.shape = shape or dataclasses.asdict(TokenTransformerConfig(vocab_size=256, width=64, head_dim=64))
        self.num_steps, self.max_window = num_steps, max_window
        super().__init__(**kwargs)


class TextMDLM(ExportedModel, GenerationMixin):
    """Prompt in, continuation out: all new tokens are masked at first, and what stood there is drawn a few at a time."""

    config_class = TextMDLMConfig
    config: TextMDLMConfig
    model: TokenTransformer

    def __init__(self, config: TextMDLMConfig):
        shape = TokenTransformerConfig(**config.shape)
        super().__init__(config, model=TokenTransformer(shape, num_marks=1, with_roles=True))
        marks = {name: getattr(config, name, None) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
        self.generation_config = GenerationConfig(do_sample=True, temperature=1.0, num_steps=config.num_steps, **marks)

    @property
    def mask_token_id(self) -> int:
        """The id that stands for a masked token: the one behind the vocabulary."""
        return self.model.config.vocab_size

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        target_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> MaskedLMOutput:
        """Logits [B, L, V] of what stood at each place, fp32, zeros at padding.

        Args:
            input_ids: [B, L], `mask_token_id` where a token is masked.
            target_mask: bool [B, L], what belongs to the continuation, masked or not; None: what is masked. The rest is context.

        Raises: ValueError for masks and ids that do not fit.
        """
        device = self.model.lm_head.weight.device
        texts = row_texts(input_ids, attention_mask)
        self._check_ids(texts, marks=1)
        targets = row_texts(
            (input_ids == self.mask_token_id if target_mask is None else target_mask).long(), attention_mask
        )
        mask_BL = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits_BLV = torch.zeros(*input_ids.shape, self.mask_token_id, device=device)
        if any(map(len, texts)):
            windows = Segments.from_lengths([len(ids_T) for ids_T in texts if len(ids_T)], device)
            hidden_TD = self.model(torch.cat(texts).to(device), windows, torch.cat(targets).bool().to(device))
            logits_BLV[mask_BL.bool().to(device)] = self.model.lm_head(hidden_TD).float()
        return MaskedLMOutput(logits=logits_BLV)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | Sequence[torch.Tensor | Sequence[int]] | None = None,
        max_new_tokens: int | Sequence[int] | None = None,
        num_steps: int | None = None,
        seed: int | Sequence[int] | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **others: Any,
    ) -> Any:
        """Continuations of prompts, by the conventions of `TextLDM.generate`.

        A continuation is a function of its prompt, its seed, its length and the settings alone. What does not fit into a window with its
        prompt is drawn in blocks, each given the latest tokens before it.

        Args:
            input_ids: a list of prompts' token ids, or a [rows, tokens] tensor with its attention_mask; None is one empty prompt.
            max_new_tokens, seed: for all prompts or for each.
            num_steps: evaluations of the network for a block.
            others: temperature, num_return_sequences, max_length, pad_token_id, block_size.

        Returns: for a list of prompts the new tokens of each, up to the end of text; for a tensor the rows as they were given with the new
            tokens and padding behind.
        Raises: ValueError for requests and settings that do not fit.
        """
        named = {"max_new_tokens": max_new_tokens, "num_steps": num_steps, "seed": seed, "eos_token_id": eos_token_id}
        named |= others
        rows: Any = named.pop("inputs", None) if input_ids is None else input_ids
        rows = torch.zeros(1, 0, dtype=torch.int64) if rows is None else rows
        padded = isinstance(rows, torch.Tensor) and rows.dim() == 2
        prompts = row_texts(rows, attention_mask) if padded else texts_of(rows)
        found = chosen(
            named, generation_config, self.generation_config, self.config,
            honoured=HONOURED, why="tokens are revealed in random order",
        )  # fmt: skip
        lengths = found["max_new_tokens"]
        if lengths is None:
            lengths = [found["max_length"] - (rows.shape[1] if padded else len(ids)) for ids in prompts]
        lengths, num = each("max_new_tokens", lengths, len(prompts)), found["num_return_sequences"]
        temperature = 1.0 if found["temperature"] is None else float(found["temperature"])
        if not prompts or min(lengths) < 1 or num < 1 or found["num_steps"] < 1 or not 0 < temperature < float("inf"):
            raise ValueError(
                f"generate() needs a prompt, max_new_tokens, num_return_sequences and num_steps of at least 1 and a temperature above 0,"
                f" found {len(prompts)}, {min(lengths, default=0)}, {num}, {found['num_steps']} and {temperature:g}"
            )
        self._check_ids(prompts)
        keys = sequence_keys(found["seed"], len(prompts), num)
        prompts, lengths = repeated(prompts, num), repeated(lengths, num)
        ends, pad = end_ids(found["eos_token_id"]), found["pad_token_id"]
        texts = self._draw(prompts, lengths, keys, found["num_steps"], temperature, ends, found["block_size"])
        if not padded:
            return [ids[: end_of(ids, ends)] for ids in texts]
        pad = pad if pad is not None else (ends[0] if ends and ends[0] >= 0 else 0)
        return torch.cat((rows.cpu().repeat_interleave(num, 0), right_padded(texts, pad)), 1).to(rows.device)

    def _draw(
        self,
        prompts: Sequence[torch.Tensor],
        lengths: Sequence[int],
        keys: Sequence[tuple[int, int]],
        num_steps: int,
        temperature: float,
        ends: tuple[int, ...],
        block_size: int | None,
    ) -> list[torch.Tensor]:
        """The new tokens of each prompt with the one that ends them, where there is one: a block of each at a time, packed."""
        sizes = self._blocks(prompts, lengths, block_size)
        found = [ids.new_zeros(0) for ids in prompts]
        for block in range(max(map(len, sizes))):
            going = [i for i in range(len(prompts)) if block < len(sizes[i]) and end_of(found[i], ends) is None]
            if not going:
                break
            drawn = sample_targets(
                self.model,
                [latest(torch.cat((prompts[i], found[i])), sizes[i][block], self.config.max_window) for i in going],
                [sizes[i][block] for i in going],
                num_steps,
                [keyed_generator(*keys[i], block) for i in going],
                temperature=temperature,
            )
            for i, ids in zip(going, drawn):
                end = end_of(ids, ends)
                found[i] = torch.cat((found[i], ids if end is None else ids[: end + 1]))
        return found

    @torch.no_grad()
    def nll(
        self,
        input_ids: Sequence[torch.Tensor | Sequence[int]],
        target_ids: Sequence[torch.Tensor | Sequence[int]],
        num_draws: int = 16,
        seed: int | Sequence[int] = 0,
        block_size: int | None = None,
    ) -> torch.Tensor:
        """Upper bounds on -log p(target | prompt, its length), in nats a document: estimates without bias, of `num_draws` numbers of masks.

        A target that does not fit into a window with its prompt is measured in blocks, each given the latest true tokens before it.

        Returns: float64 [documents], on the CPU.
        Raises: ValueError for no documents, empty targets, and ids that do not fit.
        """
        prompts, targets = texts_of(input_ids), texts_of(target_ids)
        if not prompts or len(prompts) != len(targets) or not all(map(len, targets)) or num_draws < 1:
            raise ValueError(
                f"nll() needs as many targets as prompts, none of them empty, and a draw, found {len(prompts)} prompts, targets of"
                f" {[len(ids) for ids in targets][:5]} tokens and num_draws {num_draws}"
            )
        self._check_ids([*prompts, *targets])
        keys, device = sequence_keys(seed, len(targets)), self.model.lm_head.weight.device
        sizes = self._blocks(prompts, [len(ids) for ids in targets], block_size)
        bounds_N = torch.zeros(len(targets), dtype=torch.float64)
        for block in range(max(map(len, sizes))):
            going = [i for i in range(len(targets)) if block < len(sizes[i])]
            texts, is_target, scores, uniform = [], [], [], []
            for i in going:
                size, done = sizes[i][block], sum(sizes[i][:block])
                context = latest(torch.cat((prompts[i], targets[i][:done])), size, self.config.max_window)
                texts.append(torch.cat((context, targets[i][done : done + size])))
                is_target.append(torch.arange(len(texts[-1])) >= len(context))
                drawn = keyed_generator(*keys[i], block)
                uniform.append(torch.rand(1, generator=drawn))
                scores.append(torch.rand(num_draws, len(texts[-1]), generator=drawn))
            windows = Segments.from_lengths([len(ids) for ids in texts], device)
            scores_KT = torch.cat(scores, 1).to(device)
            bounds_N[going] += window_nats(
                self.model, torch.cat(texts).to(device), torch.cat(is_target).to(device), windows, torch.cat(uniform).to(device),
                scores_KT.__getitem__, num_draws,
            ).cpu()  # fmt: skip
        return bounds_N

    def _blocks(
        self, prompts: Sequence[torch.Tensor], lengths: Sequence[int], block_size: int | None
    ) -> list[list[int]]:
        window = self.config.max_window
        if block_size is not None and not 1 <= block_size <= window:
            raise ValueError(f"block_size is {block_size}; expected 1 to the {window} tokens of this model's windows")
        return [block_sizes(len(ids), new, window, block_size) for ids, new in zip(prompts, lengths)]

    def _check_ids(self, texts: Sequence[torch.Tensor], marks: int = 0) -> None:
        beyond = [id_ for ids in texts for id_ in ids.tolist() if not 0 <= id_ < self.mask_token_id + marks]
        if beyond:
            raise ValueError(
                f"token id {beyond[0]} is beyond the vocabulary of {self.mask_token_id}; use this model's tokenizer"
            )
