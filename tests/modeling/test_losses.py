"""The chunked LM-head loss is the plain one in value and gradients; KL and squared error are their definitions."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling.losses import (
    ClassScores,
    categorical_loss,
    class_mean,
    kl_to_standard_normal,
    linear_cross_entropy,
    squared_error,
)

T, D, V = 37, 16, 301


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states and weight that need gradients, targets, and token weights with zeros among them."""
    torch.manual_seed(0)
    hidden_TD, weight_VD = torch.randn(T, D), torch.randn(V, D)
    weights_T = torch.rand(T) * (torch.arange(T) % 5 != 0)
    targets_T = torch.randint(V, (T,))
    targets_T[::3] = (hidden_TD @ weight_VD.T).argmax(-1)[::3]  # some are right
    return hidden_TD.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_(), targets_T, weights_T


@pytest.mark.parametrize("chunk", [1, 10, 37, 1024])
def test_equals_the_plain_loss_in_value_and_gradients(chunk: int) -> None:
    hidden_TD, weight_VD, targets_T, weights_T = inputs(torch.float32)
    loss, correct_T = linear_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T, chunk)
    grads = torch.autograd.grad(2.5 * loss, (hidden_TD, weight_VD))

    exact_TD, exact_VD = (x.detach().double().requires_grad_() for x in (hidden_TD, weight_VD))
    logits_TV = exact_TD @ exact_VD.T
    expected = (F.cross_entropy(logits_TV, targets_T, reduction="none") * weights_T.double()).sum()
    wanted = torch.autograd.grad(2.5 * expected, (exact_TD, exact_VD))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for found, exact in zip(grads, wanted):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    right_T = logits_TV.argmax(-1) == targets_T
    assert torch.equal(correct_T, right_T)
    assert 0 < right_T.sum() < T


def test_half_precision_stays_near_and_sums_in_single() -> None:
    hidden_TD, weight_VD, targets_T, weights_T = inputs(torch.bfloat16)
    loss, _ = linear_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T, 8)
    grads = torch.autograd.grad(loss, (hidden_TD, weight_VD))
    plain = (F.cross_entropy((hidden_TD @ weight_VD.T).float(), targets_T, reduction="none") * weights_T).sum()
    wanted = torch.autograd.grad(plain, (hidden_TD, weight_VD))
    assert loss.dtype == torch.float32
    assert [g.dtype for g in grads] == [torch.bfloat16] * 2
    torch.testing.assert_close(loss, plain, rtol=1e-2, atol=0)
    for found, other in zip(grads, wanted):
        assert (found - other).float().norm() < 0.02 * other.float().norm()


def test_single_weights_under_half_precision_hidden_states() -> None:
    hidden_TD, weight_VD, targets_T, weights_T = inputs(torch.bfloat16)
    weight_VD = weight_VD.detach().float().requires_grad_()
    loss, _ = linear_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T, 8)
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden_TD, weight_VD))
    assert (grad_hidden.dtype, grad_weight.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_gradients_only_where_they_are_wanted(frozen: str) -> None:
    hidden_TD, weight_VD, targets_T, weights_T = inputs(torch.float32)
    full = torch.autograd.grad(
        linear_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T)[0], [hidden_TD, weight_VD]
    )
    hidden_TD.requires_grad_(frozen not in ("hidden", "both"))
    weight_VD.requires_grad_(frozen not in ("weight", "both"))
    loss, _ = linear_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T)
    assert loss.requires_grad == (frozen != "both")
    if loss.requires_grad:
        loss.backward()
    for x, grad in zip((hidden_TD, weight_VD), full):
        assert (x.grad is None) if not x.requires_grad else torch.equal(x.grad, grad)


class Made(TorchDispatchMode):
    """Notes the name and the size of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.sizes += [(func.overloadpacket.__name__, x.numel()) for x in tree_leaves(result) if torch.is_tensor(x)]
        return result


@pytest.mark.parametrize("chunk", [4, 10])
def test_the_logits_never_exist_in_full(chunk: int) -> None:
    hidden_TD, weight_VD, targets_T, weights_T = inputs(torch.float32)
    with Made() as made:
        linear_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T, chunk)[0].backward()
    assert max(size for _, size in made.sizes) == max(chunk * V, V * D)


def test_no_gradients_are_made_where_none_are_wanted() -> None:
    hidden_TD, weight_VD, targets_T, weights_T = inputs(torch.float32)
    expected, right_T = linear_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T, 10)
    with torch.no_grad(), Made() as made:
        loss, correct_T = linear_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T, 10)
    assert torch.equal(loss, expected)
    assert torch.equal(correct_T, right_T)
    assert [size for name, size in made.sizes if name in ("mm", "addmm_")] == [10 * V, 10 * V, 10 * V, 7 * V]


def test_kl_is_that_of_torch() -> None:
    mean_TZ, log_variance_TZ = torch.randn(2, 9, 3, dtype=torch.float64)
    expected = kl_divergence(Normal(mean_TZ, (0.5 * log_variance_TZ).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(kl_to_standard_normal(mean_TZ, log_variance_TZ), expected)


def test_squared_error_is_the_mean_over_channels() -> None:
    found_T = squared_error(torch.tensor([[1.0, 2.0], [0.0, 0.0]]).bfloat16(), torch.tensor([[0.0, 0.0], [3.0, 0.0]]))
    assert found_T.tolist() == [2.5, 4.5]
    assert found_T.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_correct_tokens_are_counted_exactly(dtype: torch.dtype) -> None:
    """A count, not a rate: 5,000 tokens of which every seventh is right, beyond what bf16 or a chunked sum could hold."""
    targets_T = torch.arange(5000) % 40
    hidden_TD = torch.nn.functional.one_hot((targets_T + (torch.arange(5000) % 7 > 0)) % 40, 40).to(dtype)
    _, correct_T = linear_cross_entropy(hidden_TD, torch.eye(40, dtype=dtype), targets_T, torch.ones(5000), 64)
    assert torch.equal(correct_T, torch.arange(5000) % 7 == 0)


def test_as_many_labels_as_the_tokenizer_has() -> None:
    """V = 151,936, with the first and the last class among the targets."""
    torch.manual_seed(0)
    hidden_TD, weight_VD = torch.randn(6, 4, requires_grad=True), torch.randn(151_936, 4, requires_grad=True)
    targets_T = torch.tensor([0, 151_935, 151_935, 7, 0, 80_000])
    loss, _ = linear_cross_entropy(hidden_TD, weight_VD, targets_T, torch.ones(6), 4)
    found = torch.autograd.grad(loss, (hidden_TD, weight_VD))
    plain = torch.autograd.grad(
        F.cross_entropy(hidden_TD @ weight_VD.T, targets_T, reduction="sum"), (hidden_TD, weight_VD)
    )
    exact = [x.detach().double().requires_grad_() for x in (hidden_TD, weight_VD)]
    expected = F.cross_entropy(exact[0] @ exact[1].T, targets_T, reduction="sum")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    # A sum over 151,936 classes has its own error in fp32: ours is that of the plain loss.
    for one, other, wanted in zip(found, plain, torch.autograd.grad(expected, exact)):
        assert (one - wanted).norm() <= 2 * (other - wanted).norm() + 1e-6 * wanted.norm()


E, Z = 5, 3


def categorical_inputs(dtype: torch.dtype = torch.float32) -> tuple[ClassScores, torch.Tensor, torch.Tensor]:
    """Two products of logits, the known one large, values of the classes, and targets."""
    torch.manual_seed(0)
    hidden_TD, weight_VD = (torch.randn(n, D).to(dtype).requires_grad_() for n in (T, V))
    scores = ClassScores(hidden_TD, weight_VD, 4 * torch.randn(T, E), torch.randn(V, E))
    return scores, torch.randn(V, Z), torch.randint(V, (T,))


def plain_categorical(
    scores: ClassScores, values_VZ: torch.Tensor, targets_T: torch.Tensor, temperature: float = 1.0
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """The same by autograd in float64: the leaves, cross-entropies [T] and means."""
    leaves = [x.detach().double().requires_grad_() for x in scores[:2]]
    logits_TV = (leaves[0] @ leaves[1].T + scores.known_ME.double() @ scores.known_VE.double().T) / temperature
    ce_T = F.cross_entropy(logits_TV, targets_T, reduction="none")
    return leaves, ce_T, logits_TV.softmax(-1) @ values_VZ.double()


@pytest.mark.parametrize("chunk", [1, 10, 37, 1024])
@pytest.mark.parametrize("through_mean", [False, True])
def test_the_categorical_loss_is_the_plain_one_in_values_and_gradients(chunk: int, through_mean: bool) -> None:
    scores, values_VZ, targets_T = categorical_inputs()
    leaves, expected_T, expected_TZ = plain_categorical(scores, values_VZ, targets_T)
    loss, ce_T, mean_TZ = categorical_loss(scores, values_VZ, targets_T, through_mean, chunk)
    torch.testing.assert_close(loss.double(), expected_T.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(ce_T.double(), expected_T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean_TZ.double(), expected_TZ, rtol=1e-5, atol=1e-5)
    assert not ce_T.requires_grad
    assert mean_TZ.requires_grad == through_mean
    aim_TZ = torch.randn(T, Z)
    total, wanted = 2.5 * loss, 2.5 * expected_T.sum()
    if through_mean:
        total = total + (mean_TZ - aim_TZ).square().sum()
        wanted = wanted + (expected_TZ - aim_TZ.double()).square().sum()
    for found, exact in zip(torch.autograd.grad(total, scores[:2]), torch.autograd.grad(wanted, leaves)):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_the_mean_of_classes_is_the_plain_one_at_a_temperature(temperature: float) -> None:
    scores, values_VZ, targets_T = categorical_inputs()
    _, _, expected_TZ = plain_categorical(scores, values_VZ, targets_T, temperature)
    found_TZ = class_mean(scores, values_VZ, temperature, 10)
    torch.testing.assert_close(found_TZ.double(), expected_TZ, rtol=1e-5, atol=1e-5)


def test_categorical_logits_never_exist_in_full_and_what_is_known_has_no_gradient() -> None:
    scores, values_VZ, targets_T = categorical_inputs()
    for through_mean in (False, True):
        with Made() as made:
            loss, _, mean_TZ = categorical_loss(scores, values_VZ, targets_T, through_mean, 10)
            (loss + mean_TZ.sum()).backward()
        assert max(size for _, size in made.sizes) == max(10 * V, V * D)
    assert scores.known_ME.grad is None
    with torch.no_grad(), Made() as made:
        categorical_loss(scores, values_VZ, targets_T, False, 10)
    assert [size for name, size in made.sizes if name == "mm" and size > 1000] == [10 * V, 10 * V, 10 * V, 7 * V]


def test_what_is_known_keeps_single_precision_beside_half_precision_hidden_states() -> None:
    """Known logits of the size that log N(z_t; ...) has near t = 0, of which bf16 would leave nothing."""
    scores, values_VZ, targets_T = categorical_inputs(torch.bfloat16)
    scores = scores._replace(known_ME=100 * scores.known_ME)
    _, expected_T, _ = plain_categorical(scores, values_VZ, targets_T)
    with torch.autocast("cpu", torch.bfloat16):
        loss, ce_T, mean_TZ = categorical_loss(scores, values_VZ, targets_T, False, 10)
    assert {x.dtype for x in (loss, ce_T, mean_TZ)} == {torch.float32}
    torch.testing.assert_close(ce_T.double(), expected_T, rtol=2e-3, atol=0.05)
    assert [g.dtype for g in torch.autograd.grad(loss, scores[:2])] == [torch.bfloat16] * 2


def test_no_target_at_all_is_no_loss() -> None:
    scores, values_VZ, targets_T = categorical_inputs()
    none = ClassScores(scores.hidden_MD[:0], scores.weight_VD, scores.known_ME[:0], scores.known_VE)
    loss, ce_T, mean_TZ = categorical_loss(none, values_VZ, targets_T[:0])
    loss.backward()
    assert (float(loss.detach()), len(ce_T), tuple(mean_TZ.shape)) == (0.0, 0, (0, Z))
    assert scores.weight_VD.grad is not None
    assert not scores.weight_VD.grad.any()
    assert class_mean(none, values_VZ).shape == (0, Z)
