"""The baseline that denoises tokens: masked diffusion (MDLM, arXiv 2406.07524) with the VAE's and DiT's blocks, over the same windows.

Shape letters: T packed tokens, D width, W windows.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.batch import SUFFIX, Batch
from data_pipeline.reading.prompts import Prompt
from modeling import losses
from modeling.attention import Segments
from modeling.beyond_window import keyed_generator
from modeling.masked_diffusion import draw_masks, masked_inputs, sample_targets, window_nats
from modeling.token_transformer import TokenTransformer
from pretrain.engine.pieces import weights_on
from pretrain.stages.base import StageOutput, row_noise
from pretrain.stages.token_config import MDLMRun
from pretrain.stages.token_stage import TokenStage
from pretrain.stages.vocabulary import vocab_size_of


class MDLMStage(TokenStage):
    """The bound on -log p(targets | context) of modeling/masked_diffusion.py, one number of masks a window and step."""

    config: MDLMRun

    def __init__(self, config: MDLMRun, manifest: Manifest, device: torch.device):
        super().__init__()
        self.config = config
        shape = config.model.architecture()
        shape.vocab_size = vocab_size_of(shape.vocab_size, manifest, config.data.path)
        with weights_on(device):
            self.model = TokenTransformer(shape, num_marks=1, with_roles=True)

    def token_counts(self, batch: Batch) -> dict[str, int]:
        """`targets`."""
        return {"targets": batch.num_tokens(SUFFIX)}

    def flops(self, batch: Batch) -> float:
        return self.step_flops(batch, causal=False)

    def forward(self, batch: Batch, counts: dict[str, int]) -> StageOutput:
        if not self.training:
            return self.heldout(batch, counts)
        is_target_T, windows = self._windows(batch)
        masks = draw_masks(is_target_T, windows, batch.window_uniforms_W2[:, 0], _scores(batch, 0))
        inputs_T = masked_inputs(batch.tokens_T, masks.is_masked_T, self.model.config.vocab_size)
        hidden_TD = self.model(inputs_T, windows, is_target_T)
        ce_sum, _ = losses.linear_cross_entropy(hidden_TD, self.model.lm_head.weight, batch.tokens_T, masks.weights_T)
        return StageOutput(
            ce_sum / counts["targets"], {"nats_per_token": torch.stack((ce_sum.detach(), is_target_T.float().sum()))}
        )

    def _windows(self, batch: Batch) -> tuple[Tensor, Segments]:
        """Where targets are, bool [T], and the windows."""
        device = batch.tokens_T.device
        is_target_T = batch.roles_T == SUFFIX
        return is_target_T, Segments.from_lengths(batch.window_lengths, device)

    def window_nats(self, batch: Batch, num_draws: int) -> Tensor:
        """Of the bound, over `num_draws` numbers of masks."""
        is_target_T, windows = self._windows(batch)
        uniform_W = batch.window_uniforms_W2[:, 0]
        return window_nats(
            self.model, batch.tokens_T, is_target_T, windows, uniform_W, lambda i: _scores(batch, i), num_draws
        )

    def generate(
        self, prompts: Sequence[Prompt], num_steps: int, seed: int = 0, tick: Callable[[], None] = lambda: None
    ) -> list[list[int]]:
        """An equal share of the masks revealed in each step."""
        contexts, lengths = [prompt.context_T for prompt in prompts], [len(prompt.target_T) for prompt in prompts]
        generators = [keyed_generator(seed, index) for index in range(len(prompts))]
        found = sample_targets(self.model, contexts, lengths, num_steps, generators, tick)
        return [tokens_T.tolist() for tokens_T in found]


def _scores(batch: Batch, draw: int) -> Tensor:
    """By which targets are masked first, fp32 [T], a function of the rows' keys."""
    return row_noise(batch, 1, purpose=draw)[:, 0]
