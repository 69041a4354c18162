"""The exact negative log-likelihood of the teacher on the targets that a model is judged by: what a causal language model knows of them.

Shape letters: W windows, L tokens of one window, V vocabulary.
"""

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM

from data_pipeline.core.errors import ENDINGS, UserError, reason
from data_pipeline.core.hub import find_model
from data_pipeline.features.teacher_fit import check_same_tokenizer
from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.batch import SUFFIX, Batch
from pretrain.diagnose.diagnosis import phase, say
from pretrain.stages.vae_config import VAERun


def teacher_figures(vae: VAERun, data: str, batches: Sequence[Batch], unigram_V: torch.Tensor) -> dict[str, float]:
    """`teacher_nats`: a token of the batches' targets given their contexts, under the causal model that the VAE was aligned with.

    Nothing, with a line that says why, where there was none or it cannot be had any more.

    Args:
        data: folder of the prepared data; its tokenizer must be the teacher's.
        unigram_V: nats of each token by its frequency, for a target that no token precedes.
    """
    try:
        found = _teacher(vae, data)
        if found is None:
            return {}
        name, revision = found
        model = load_causal(name, revision).to(batches[0].tokens_T.device)
    except UserError as error:
        say(f"  the teacher's nats per token are left out: {error}")
        return {}
    total, count = 0.0, 0
    with phase("teacher: nats per token", len(batches)) as tick:
        for batch in batches:
            total += float(window_nats(model, batch, unigram_V).sum())
            count += batch.num_tokens(SUFFIX)
            tick()
    return {"teacher_nats": total / count}


def _teacher(vae: VAERun, data: str) -> tuple[str, str | None] | None:
    """Name or folder and revision of the model that a VAE was aligned with, if there was one: as its configuration says it, and not what
    a cache says of itself. Raises: UserError.
    """
    manifest, repa = Manifest.load(data), vae.repa
    name, revision = (repa.teacher, repa.revision) if vae.features_folder() else (repa.online_teacher, repa.revision)
    if not repa.weight or not (name or vae.features_folder()):
        return None
    if name is None:
        raise UserError("the VAE's run does not say which model made its features: repa.teacher")
    check_same_tokenizer(name, revision, data, manifest)
    return name, revision


def load_causal(name: str, revision: str | None = None) -> torch.nn.Module:
    """A causal language model with its LM head, in evaluation mode, fp32. Raises: UserError."""
    find_model(name, "no teacher at", "a hub id or a local Hugging Face folder")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=torch.float32, trust_remote_code=False
        )
        return model.eval()
    except ENDINGS:
        raise
    except BaseException as error:  # what transformers and the hub raise cannot be listed
        raise UserError(f"{name} cannot be loaded as a causal language model: {reason(error)}") from error


@torch.no_grad()
def window_nats(model: torch.nn.Module, batch: Batch, unigram_V: torch.Tensor) -> torch.Tensor:
    """Exact -log p of each window's target given its context, float64 [W] on the CPU; 0 where there is no target."""
    tokens_T, is_target_T = batch.tokens_T, batch.roles_T == SUFFIX
    sums = []
    for tokens_L, is_target_L in zip(tokens_T.split(batch.window_lengths), is_target_T.split(batch.window_lengths)):
        nats_L = unigram_V[tokens_L.cpu()].double()
        if bool(is_target_L.any()) and len(tokens_L) > 1:
            logits_LV = model(input_ids=tokens_L[None].long()).logits[0, :-1].float()
            following_L = torch.nn.functional.cross_entropy(logits_LV, tokens_L[1:].long(), reduction="none")
            nats_L[1:] = following_L.double().cpu()
        sums.append((nats_L * is_target_L.cpu()).sum())
    return torch.stack(sums)
