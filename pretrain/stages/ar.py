"""The causal baseline: a language model of the VAE's and DiT's blocks, over the same windows, contexts and targets.

Shape letters: T packed tokens, D width, W windows.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.batch import PREFIX, SUFFIX, Batch
from data_pipeline.reading.prompts import Prompt
from modeling import losses
from modeling.attention import Segments
from modeling.beyond_window import noise_key
from modeling.stock_language_model import continuation, stock_language_model
from modeling.token_transformer import TokenTransformer, causal_inputs
from pretrain.engine.pieces import weights_on
from pretrain.stages.base import StageOutput
from pretrain.stages.token_config import ARRun
from pretrain.stages.token_stage import TokenStage
from pretrain.stages.vocabulary import vocab_size_of


class ARStage(TokenStage):
    """L = -log p(token | all before it in its window), over targets and, with a weight, contexts.

    A window begins with the end-of-text token, so that its first token has a probability too.
    """

    config: ARRun

    def __init__(self, config: ARRun, manifest: Manifest, device: torch.device):
        super().__init__()
        self.config = config
        if manifest.tokenizer.eos_id is None:
            raise UserError(
                f"{config.data.path} was made with a tokenizer without an end-of-text token, with which stage ar begins"
                " every window: prepare the data with one that has it"
            )
        self.start_id = manifest.tokenizer.eos_id
        self.max_window = manifest.max_window
        shape = config.model.architecture()
        shape.vocab_size = vocab_size_of(shape.vocab_size, manifest, config.data.path)
        with weights_on(device):
            self.model = TokenTransformer(shape)

    def token_counts(self, batch: Batch) -> dict[str, int]:
        """`targets` and `contexts`."""
        return {"targets": batch.num_tokens(SUFFIX), "contexts": batch.num_tokens(PREFIX)}

    def flops(self, batch: Batch) -> float:
        return self.step_flops(batch, causal=True)

    def forward(self, batch: Batch, counts: dict[str, int]) -> StageOutput:
        if not self.training:
            return self.heldout(batch, counts)
        roles_T = batch.roles_T
        weight = self.config.ar.context_weight
        weights_T = (roles_T == SUFFIX).float() + weight * (roles_T == PREFIX).float()
        hidden_TD, _ = self._hidden(batch)
        ce_sum, _ = losses.linear_cross_entropy(hidden_TD, self.model.lm_head.weight, batch.tokens_T, weights_T)
        loss = ce_sum / (counts["targets"] + weight * counts["contexts"])
        return StageOutput(loss, {"nats_with_contexts": torch.stack((ce_sum.detach(), weights_T.sum()))})

    def _hidden(self, batch: Batch) -> tuple[Tensor, Segments]:
        """Hidden states [T, D] that predict `tokens_T`, and the windows."""
        windows = Segments.from_lengths(batch.window_lengths, batch.tokens_T.device, causal=True)
        return self.model(causal_inputs(batch.tokens_T, windows, self.start_id), windows), windows

    @torch.no_grad()
    def window_nats(self, batch: Batch, num_draws: int = 1) -> Tensor:
        """Exact: nothing is drawn."""
        hidden_TD, windows = self._hidden(batch)
        is_target_T = batch.roles_T == SUFFIX
        nats_T = self.model.token_nats(hidden_TD, batch.tokens_T) * is_target_T
        return nats_T.new_zeros(len(windows.lengths), dtype=torch.float64).index_add(0, windows.ids_T, nats_T.double())

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], num_steps: int, seed: int = 0, tick: Callable[[], None] = lambda: None
    ) -> list[list[int]]:
        """Token by token, drawn from the model's probabilities, by the class that is exported."""
        stock = stock_language_model(self.model, self.start_id, self.max_window)
        stock.to(self.model.lm_head.weight.device)  # type: ignore[arg-type]  # transformers wraps it without its types
        found = []
        for index, prompt in enumerate(prompts):
            found.append(continuation(stock, prompt.context_T, len(prompt.target_T), noise_key(seed, index)))
        for _ in range(num_steps):
            tick()
        return found
