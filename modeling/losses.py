"""Losses over the vocabulary and the posterior, as per-token fp32 tensors or sums; normalisation is the caller's.

Shape letters: T packed tokens, D width, Z latent dim, V vocabulary.
"""

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F

CLASS_CHUNK = 256
"""Tokens of a categorical head whose logits exist at a time."""


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


class _ChunkedCategorical(torch.autograd.Function):
    """Sum of the true classes' cross-entropies and the mean of `values` over classes, with logits for one chunk of tokens at a time.

    logits = hidden @ weight.T + known @ known_weight.T. Without gradients through the mean, those of the cross-entropy are made in the
    forward pass, while a chunk's logits exist, as in `_ChunkedLinearCrossEntropy`; else the backward pass makes the logits once more.
    """

    @staticmethod
    def forward(ctx, hidden_MD, weight_VD, known_ME, known_VE, values_VZ, targets_M, chunk, through_mean):  # type: ignore[no-untyped-def]
        num, (needs_hidden, needs_weight) = len(hidden_MD), ctx.needs_input_grad[:2]
        at_once = (needs_hidden or needs_weight) and not through_mean
        compute_VD = weight_VD.to(hidden_MD.dtype)
        loss_M = hidden_MD.new_zeros(num, dtype=torch.float32)
        mean_MZ = values_VZ.new_empty(num, values_VZ.shape[1])
        grad_hidden = torch.empty_like(hidden_MD) if at_once else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if at_once else None
        room_CV = _room(min(num, chunk), known_VE)
        for start in range(0, num, chunk):
            part = slice(start, start + chunk)
            share_CV = _logits(hidden_MD[part], compute_VD, known_ME[part], known_VE, room_CV)
            true_M = share_CV.gather(1, targets_M[part][:, None])[:, 0]
            loss_M[part] = _softmax_(share_CV) - true_M
            torch.mm(share_CV, values_VZ, out=mean_MZ[part])
            if grad_hidden is not None and grad_weight is not None:
                share_CV.scatter_add_(
                    1, targets_M[part][:, None], share_CV.new_full((1, 1), -1.0).expand(len(share_CV), 1)
                )
                _add_gradients(
                    share_CV.to(hidden_MD.dtype), hidden_MD[part], compute_VD, grad_hidden[part], grad_weight
                )
        ctx.chunk, ctx.through_mean, ctx.weight_dtype = chunk, through_mean, weight_VD.dtype
        if through_mean:
            ctx.save_for_backward(hidden_MD, weight_VD, known_ME, known_VE, values_VZ, targets_M, mean_MZ)
        else:
            ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(*((loss_M,) if through_mean else (loss_M, mean_MZ)))
        return loss_M.sum(), loss_M, mean_MZ

    @staticmethod
    def backward(ctx, grad_loss, _, grad_MZ):  # type: ignore[no-untyped-def]
        if not ctx.through_mean:
            grad_hidden, grad_weight = ctx.saved_tensors
            scaled_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
            return grad_hidden * grad_loss.to(grad_hidden.dtype), scaled_weight, *[None] * 6
        hidden_MD, weight_VD, known_ME, known_VE, values_VZ, targets_M, mean_MZ = ctx.saved_tensors
        compute_VD, own_M = weight_VD.to(hidden_MD.dtype), (grad_MZ * mean_MZ).sum(-1)
        grad_hidden, grad_weight = torch.empty_like(hidden_MD), torch.zeros_like(weight_VD, dtype=torch.float32)
        room_CV = _room(min(len(hidden_MD), ctx.chunk), known_VE)
        for start in range(0, len(hidden_MD), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            share_CV = _logits(hidden_MD[part], compute_VD, known_ME[part], known_VE, room_CV)
            torch.softmax(share_CV, -1, out=share_CV)
            # d mean / d logit_k = p_k (value_k - mean), and of the cross-entropy p_k less 1 at the true class.
            slopes_CV = torch.addmm((grad_loss - own_M[part])[:, None], grad_MZ[part], values_VZ.t())
            share_CV.mul_(slopes_CV)
            del slopes_CV
            share_CV.scatter_add_(1, targets_M[part][:, None], -grad_loss.expand(len(share_CV), 1))
            _add_gradients(share_CV.to(hidden_MD.dtype), hidden_MD[part], compute_VD, grad_hidden[part], grad_weight)
        return grad_hidden, grad_weight.to(ctx.weight_dtype), *[None] * 6


def _room(tokens: int, known_VE: torch.Tensor) -> torch.Tensor:
    """For the logits of a chunk, fp32 [C, V]: new memory for each chunk would cost a CPU half as long as what is written there."""
    return known_VE.new_empty(tokens, len(known_VE))


def _logits(
    hidden_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    known_CE: torch.Tensor,
    known_VE: torch.Tensor,
    room_CV: torch.Tensor,
) -> torch.Tensor:
    """fp32 [C, V] in that room, its known part computed in fp32."""
    logits_CV = room_CV[: len(hidden_CD)]
    if not hidden_CD.shape[1]:
        return torch.mm(known_CE, known_VE.t(), out=logits_CV)
    if hidden_CD.dtype == logits_CV.dtype:
        torch.mm(hidden_CD, weight_VD.t(), out=logits_CV)
    else:
        logits_CV.copy_(hidden_CD @ weight_VD.t())
    return logits_CV.addmm_(known_CE, known_VE.t())


def _softmax_(logits_CV: torch.Tensor) -> torch.Tensor:
    """The logits become their softmax; returns the logarithms [C] of the sums of their exponentials.

    By torch's own softmax: of logits more than 87 below the largest, as sharp ones mostly are, `exp` on CPUs takes 20 times as long.
    """
    largest_C = logits_CV.amax(-1)
    torch.softmax(logits_CV, -1, out=logits_CV)
    return largest_C - logits_CV.amax(-1).log()  # the largest share is exp(0) over the sum


def _add_gradients(
    grad_CV: torch.Tensor,
    hidden_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    grad_hidden_CD: torch.Tensor,
    grad_weight_VD: torch.Tensor,
) -> None:
    """Write the hidden states' gradient of a chunk and add to the weight's."""
    torch.mm(grad_CV, weight_VD, out=grad_hidden_CD)
    if grad_CV.dtype == torch.float32:
        grad_weight_VD.addmm_(grad_CV.t(), hidden_CD)  # without a second [V, D]
    else:
        grad_weight_VD += grad_CV.t() @ hidden_CD


class ClassScores(NamedTuple):
    """Logits of M tokens over V classes as two products, hidden @ weight.T + known @ known_weight.T, that never exist in full.

    Attributes:
        hidden_MD, weight_VD: what is learned; computed in the hidden states' dtype.
        known_ME, known_VE: what is known without the network, fp32, computed in fp32 and without a gradient. In all: a head of
            [hidden, known] on [weight, known_weight], D + E wide.
    """

    hidden_MD: torch.Tensor
    weight_VD: torch.Tensor
    known_ME: torch.Tensor
    known_VE: torch.Tensor

    def divided(self, temperature: float) -> "ClassScores":
        """All logits divided by a number."""
        if temperature == 1:
            return self
        return self._replace(hidden_MD=self.hidden_MD / temperature, known_ME=self.known_ME / temperature)


def categorical_loss(
    scores: ClassScores, values_VZ: torch.Tensor, targets_M: torch.Tensor, through_mean: bool = False, chunk: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy, and the mean of a value a class under the same probabilities.

    Args:
        values_VZ: of the classes, fp32, without a gradient.
        targets_M: int64, the true classes.
        through_mean: whether gradients go through the mean, too; the logits are then made twice.
        chunk: tokens whose logits exist at a time, memory is O(chunk * V); 0: `CLASS_CHUNK`.

    Returns: the sum of cross-entropies in nats, each one [M] without a gradient, and the mean [M, Z].
    """
    with _without_autocast(scores.hidden_MD):
        if not torch.is_grad_enabled():
            scores = ClassScores(*(x.detach() for x in scores))
        return _ChunkedCategorical.apply(*scores, values_VZ, targets_M, chunk or CLASS_CHUNK, through_mean)


def _without_autocast(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """What is written in fp32 stays so. The meta device, on which shapes are computed for planning, knows no autocast."""
    return contextlib.nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


@torch.no_grad()
def class_mean(scores: ClassScores, values_VZ: torch.Tensor, temperature: float = 1.0, chunk: int = 0) -> torch.Tensor:
    """Mean [M, Z] of a value a class under softmax(logits / temperature), without gradients."""
    parts, scores = [], scores.divided(temperature)
    chunk = chunk or CLASS_CHUNK
    with _without_autocast(values_VZ):
        weight_VD = scores.weight_VD.to(scores.hidden_MD.dtype)
        room_CV = _room(min(len(scores.known_ME), chunk), scores.known_VE)
        for hidden_CD, known_CE in zip(scores.hidden_MD.split(chunk), scores.known_ME.split(chunk)):
            logits_CV = _logits(hidden_CD, weight_VD, known_CE, scores.known_VE, room_CV)
            torch.softmax(logits_CV, -1, out=logits_CV)
            parts.append(logits_CV.to(values_VZ.dtype) @ values_VZ)
    return torch.cat(parts)


class _ChunkedKnownMean(torch.autograd.Function):
    """Mean of `values` over classes under softmax(known @ known_weight.T), whose gradient reaches the values alone.

    The backward pass makes the probabilities once more, a chunk of tokens at a time.
    """

    @staticmethod
    def forward(ctx, known_TE, known_VE, values_VX, chunk):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(known_TE, known_VE)
        ctx.chunk, ctx.dtype = chunk, values_VX.dtype
        nothing = known_TE.new_zeros(len(known_TE), 0), known_VE.new_zeros(len(known_VE), 0)
        return class_mean(ClassScores(*nothing, known_TE, known_VE), values_VX, chunk=chunk)

    @staticmethod
    def backward(ctx, grad_TX):  # type: ignore[no-untyped-def]
        known_TE, known_VE = ctx.saved_tensors
        grad_VX = known_VE.new_zeros(len(known_VE), grad_TX.shape[1])
        room_CV = _room(min(len(known_TE), ctx.chunk), known_VE)
        for known_CE, grad_CX in zip(known_TE.split(ctx.chunk), grad_TX.split(ctx.chunk)):
            share_CV = torch.mm(known_CE, known_VE.t(), out=room_CV[: len(known_CE)])
            torch.softmax(share_CV, -1, out=share_CV)
            if ctx.dtype == torch.float32:
                grad_VX.addmm_(share_CV.t(), grad_CX)
            else:
                grad_VX += share_CV.to(ctx.dtype).t() @ grad_CX
        return None, None, grad_VX.to(ctx.dtype), None


def known_mean(known_TE: torch.Tensor, known_VE: torch.Tensor, values_VX: torch.Tensor) -> torch.Tensor:
    """Mean [T, X] of a learned value a class under softmax(known @ known_weight.T), with the values' gradient.

    Memory is O(`CLASS_CHUNK` * V), in the backward pass too. Probabilities are computed in fp32, and averaged in the values' dtype, which
    is the result's; only the values get a gradient, whose chunks add up in fp32.
    """
    with _without_autocast(known_TE):
        return _ChunkedKnownMean.apply(known_TE, known_VE, values_VX, CLASS_CHUNK)


def kl_to_standard_normal(mean_TZ: torch.Tensor, log_variance_TZ: torch.Tensor) -> torch.Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)) in nats, fp32 [T, Z]."""
    return 0.5 * (mean_TZ.square() + log_variance_TZ.exp() - 1 - log_variance_TZ)


def squared_error(prediction_TZ: torch.Tensor, target_TZ: torch.Tensor) -> torch.Tensor:
    """Mean squared error over channels, fp32 [T]."""
    return F.mse_loss(prediction_TZ.float(), target_TZ.float(), reduction="none").mean(-1)
