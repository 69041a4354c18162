"""Losses over the vocabulary and the posterior, as per-token fp32 tensors or sums; normalisation is the caller's.

Shape letters: T packed tokens, D width, Z latent dim, V vocabulary.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Sum of w_i CE_i and which tokens are correct, with logits for one chunk of tokens at a time.

    The gradients of the hidden states and of the weight are made in the forward pass, while a chunk's logits exist, and only
    scaled in the backward pass: the logits are computed once, and [T, V] never exists.
    """

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, targets_T, weights_T, chunk):  # type: ignore[no-untyped-def]
        loss = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        correct_T = torch.zeros_like(targets_T, dtype=torch.bool)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden_TD) if needs_grad else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_grad else None
        compute_weight = weight_VD.to(hidden_TD.dtype)
        of_chunk = _compiled_loss_of_chunk() if hidden_TD.is_cuda else loss_of_chunk
        for start in range(0, hidden_TD.shape[0], chunk):
            part = slice(start, start + chunk)
            hidden = hidden_TD[part]
            chunk_loss, correct_T[part], grad_logits = of_chunk(
                hidden @ compute_weight.t(), targets_T[part], weights_T[part]
            )
            loss += chunk_loss
            if grad_hidden is None or grad_weight is None:
                continue
            torch.mm(grad_logits, compute_weight, out=grad_hidden[part])
            if grad_logits.dtype == torch.float32:
                grad_weight.addmm_(grad_logits.t(), hidden)  # without a second [V, D]
            else:
                grad_weight += grad_logits.t() @ hidden
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(correct_T)
        return loss, correct_T

    @staticmethod
    def backward(ctx, grad_loss, _):  # type: ignore[no-untyped-def]
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_hidden * grad_loss.to(grad_hidden.dtype), scaled_weight, None, None, None


def loss_of_chunk(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, weights_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted cross-entropy (fp32 sum), bool [C]: is the target the likeliest, and the gradient of the logits in their dtype.

    Computes in fp32. Logits that are fp32 already give their memory to the gradient.
    """
    scores_CV = logits_CV.float()
    largest_C, guesses_C = scores_CV.max(-1)
    target_scores_C = scores_CV.gather(1, targets_C[:, None])[:, 0] - largest_C
    scores_CV.sub_(largest_C[:, None]).exp_()
    totals_C = scores_CV.sum(-1)
    loss = (weights_C * (totals_C.log() - target_scores_C)).sum()
    scores_CV.mul_((weights_C / totals_C)[:, None])
    if (
        torch.compiler.is_compiling()
    ):  # a comparison fuses, so that the scores of fp32 are never written; a scatter does not
        is_target_CV = torch.arange(scores_CV.shape[1], device=scores_CV.device) == targets_C[:, None]
        scores_CV = scores_CV - weights_C[:, None] * is_target_CV
    else:
        scores_CV.scatter_add_(1, targets_C[:, None], -weights_C[:, None])
    return loss, guesses_C == targets_C, scores_CV.to(logits_CV.dtype)


@functools.cache
def _compiled_loss_of_chunk() -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """On GPUs: two passes over a chunk's logits instead of eight, which would take longer than the matrix products."""
    return torch.compile(loss_of_chunk, dynamic=False)


def linear_cross_entropy(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    weights_T: torch.Tensor,
    chunk: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of an LM head without the [T, V] logits.

    Args:
        hidden_TD: the decoder's output; weight_VD: the LM head's weight.
        targets_T: int64 token ids; weights_T: fp32 weight of each token (0 leaves it out).
        chunk: tokens whose logits exist at a time, memory is O(chunk * V); 0: 2,048 on GPUs, else 512, which costs no time.

    Returns: the weighted sum of cross-entropies in nats (fp32 scalar), and bool [T]: is the most likely token the target.
    """
    chunk = chunk or (2048 if hidden_TD.is_cuda else 512)
    if not torch.is_grad_enabled():  # inside the function it never is, and the gradients would be made for nothing
        hidden_TD, weight_VD = hidden_TD.detach(), weight_VD.detach()
    return _ChunkedLinearCrossEntropy.apply(hidden_TD, weight_VD, targets_T, weights_T, chunk)


def kl_to_standard_normal(mean_TZ: torch.Tensor, log_variance_TZ: torch.Tensor) -> torch.Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)) in nats, fp32 [T, Z]."""
    return 0.5 * (mean_TZ.square() + log_variance_TZ.exp() - 1 - log_variance_TZ)


def squared_error(prediction_TZ: torch.Tensor, target_TZ: torch.Tensor) -> torch.Tensor:
    """Mean squared error over channels, fp32 [T]."""
    return F.mse_loss(prediction_TZ.float(), target_TZ.float(), reduction="none").mean(-1)
