"""Attention over packed segments equals a dense float64 reference, forward and backward, at a cost without the zeros."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from modeling import attention
from modeling.attention import _BLOCK_TOKENS, Segments, choose_implementation, varlen_attention

LAYOUTS = {
    "one": [96],
    "single tokens": [1] * 40,
    "tiny": [1 + i % 3 for i in range(1000)],
    "ragged": [7, 1, 130, 1, 1, 64, 200, 3, 127, 1, 128, 129],
}


def reference(
    q_THK: torch.Tensor, k_THK: torch.Tensor, v_THK: torch.Tensor, lengths: list[int], causal: bool
) -> torch.Tensor:
    """One dense softmax over [T, T] with everything outside the block diagonal, and if causal above the diagonal, at minus infinity."""
    ids_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q_THK.device)
    scores_HTT = torch.einsum("thk,shk->hts", q_THK, k_THK) / q_THK.shape[-1] ** 0.5
    hidden_TT = ids_T[:, None] != ids_T[None, :]
    if causal:
        hidden_TT |= torch.ones_like(hidden_TT).triu(1)
    scores_HTT = scores_HTT.masked_fill(hidden_TT, -torch.inf)
    return torch.einsum("hts,shk->thk", scores_HTT.softmax(-1), v_THK)


def compare(
    lengths: list[int], implementation: str, dtype: torch.dtype, device: str, head_dim: int, atol: float, causal: bool
) -> None:
    """Output and the three gradients against the reference on the same (rounded) inputs."""
    generator = torch.Generator().manual_seed(len(lengths))
    shape = (sum(lengths), 2, head_dim)
    given = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]
    exact = [x.detach().double().requires_grad_() for x in given]
    output = varlen_attention(*given, Segments.from_lengths(lengths, device, causal), implementation)
    expected = reference(*exact, lengths, causal)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=atol)
    slope = torch.randn(shape, generator=generator).to(device, dtype)
    found = torch.autograd.grad(output, given, slope)
    wanted = torch.autograd.grad(expected, exact, slope.double())
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=4 * atol)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_sdpa_equals_the_dense_reference(lengths: list[int], dtype: torch.dtype, atol: float, causal: bool) -> None:
    compare(lengths, "sdpa", dtype, "cpu", 8, atol, causal)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("implementation", ["torch_varlen", "flash_attn", "sdpa"])
def test_cuda_kernels_equal_the_dense_reference(
    implementation: str, head_dim: int, lengths: list[int], causal: bool
) -> None:
    if implementation not in attention.implementations("cuda", torch.bfloat16):
        pytest.skip(f"{implementation} does not run here")
    compare(lengths, implementation, torch.bfloat16, "cuda", head_dim, 3e-2, causal)


@pytest.mark.parametrize("lengths", [*LAYOUTS.values(), [1024] * 4, [65] * 50, [127, 2] * 20], ids=str)
def test_cost_grows_with_the_segments_not_with_the_square_of_the_row(lengths: list[int]) -> None:
    blocks = Segments.from_lengths(lengths).blocks
    assert sum(tokens for tokens, _ in blocks) == sum(lengths)
    cost = sum(tokens**2 for tokens, _ in blocks)
    assert cost <= _BLOCK_TOKENS * sum(lengths) + sum(n**2 for n in lengths if n > _BLOCK_TOKENS)
    assert all(mask is None or len(mask) == tokens <= _BLOCK_TOKENS for tokens, mask in blocks)
    # Two neighbours together exceed a block's size, so there are few calls as well.
    assert len(blocks) <= 2 * sum(lengths) / _BLOCK_TOKENS + 1


@pytest.mark.parametrize("lengths", [*LAYOUTS.values(), [1024] * 4], ids=str)
def test_pairs_of_tokens_that_are_computed(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the kernel: the squares of long segments, at most a block's width for every token of short ones, never T squared."""
    pairs: list[int] = []
    kernel = F.scaled_dot_product_attention

    def counting(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        pairs.append(q.shape[-2] * k.shape[-2])
        return kernel(q, k, v, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", counting)
    q_THK = torch.randn(sum(lengths), 1, 8)
    varlen_attention(q_THK, q_THK, q_THK, Segments.from_lengths(lengths), "sdpa")
    needed = sum(n * n for n in lengths)
    assert needed <= sum(pairs) <= needed + _BLOCK_TOKENS * sum(n for n in lengths if n < _BLOCK_TOKENS)


def test_segments_say_where_tokens_are() -> None:
    segments = Segments.from_lengths([3, 1, 2])
    assert segments.positions_T.tolist() == [0, 1, 2, 0, 0, 1]
    assert segments.ids_T.tolist() == [0, 0, 0, 1, 2, 2]
    assert (segments.cu_seqlens.tolist(), segments.cu_seqlens.dtype) == ([0, 3, 4, 6], torch.int32)
    assert segments.num_tokens == 6


def test_what_kernels_see_of_a_layout_says_the_same_and_hardly_changes() -> None:
    """The offsets, then empty segments; and a bound that holds, though it is the longest segment's length rarely."""
    shapes = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        cuts = torch.randperm(4095, generator=generator)[:40].sort().values + 1
        lengths = torch.diff(cuts, prepend=torch.tensor([0]), append=torch.tensor([4096])).tolist()
        segments = Segments.from_lengths(lengths)
        offsets, bound = segments.for_kernels
        assert offsets[: len(lengths) + 1].tolist() == segments.cu_seqlens.tolist()
        assert offsets[len(lengths) :].unique().tolist() == [4096]
        assert offsets.dtype == torch.int32
        assert max(lengths) <= bound
        shapes.add((len(offsets), bound))
    assert shapes == {(65, 1024)}
    crowded, bound = Segments.from_lengths([1] * 300 + [3796]).for_kernels
    assert (len(crowded), bound) == (513, 4096)


@pytest.mark.parametrize("lengths", [[], [3, 0], [-1]])
def test_lengths_must_be_positive(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Segments.from_lengths(lengths)


@pytest.mark.skipif(torch.cuda.is_available(), reason="flash_attn may run here")
def test_a_kernel_of_gpus_without_one_is_a_mistake_of_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    attention._flash_attention.cache_clear()
    q_THK = torch.zeros(4, 1, 8)
    with pytest.raises(ValueError, match="flash_attn is not to be had"):
        varlen_attention(q_THK, q_THK, q_THK, Segments.from_lengths([4]), "flash_attn")
    attention._flash_attention.cache_clear()


def test_mistakes() -> None:
    q_THK = torch.zeros(4, 1, 8)
    with pytest.raises(ValueError, match="sum to 3 tokens, but q has 4"):
        varlen_attention(q_THK, q_THK, q_THK, Segments.from_lengths([3]))
    with pytest.raises(ValueError, match="unknown attention implementation 'fast'"):
        varlen_attention(q_THK, q_THK, q_THK, Segments.from_lengths([4]), "fast")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[tuple[int, int], dict[str, object]], list[str]]]:
    """(compute capability, what each package's import gives) -> the implementations in bf16 on such a GPU."""
    caches = (attention.implementations, attention._flash_attention, choose_implementation)

    def found(capability: tuple[int, int], packages: dict[str, object]) -> list[str]:
        for name in ("flash_attn_interface", "flash_attn"):
            package = packages.get(name)
            monkeypatch.setitem(sys.modules, name, package)  # None: its import fails
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        for cache in caches:
            cache.cache_clear()
        return attention.implementations("cuda", torch.bfloat16)

    yield found
    for cache in caches:
        cache.cache_clear()


def test_only_kernels_that_run_are_chosen(gpu: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = SimpleNamespace(flash_attn_varlen_func=print)
    assert choose_implementation("cpu", torch.bfloat16) == choose_implementation("cuda", torch.float32) == "sdpa"
    assert gpu((7, 5), {"flash_attn": package}) == ["sdpa"]
    assert gpu((8, 0), {"flash_attn": package}) == ["flash_attn", "torch_varlen", "sdpa"]
    assert gpu((9, 0), {}) == ["torch_varlen", "sdpa"]
    assert gpu((8, 0), {"flash_attn_interface": package}) == ["torch_varlen", "sdpa"]  # FlashAttention 3 is Hopper's
    assert gpu((9, 0), {"flash_attn_interface": package})[0] == choose_implementation("cuda", torch.float16)
    # Built for another torch: there, and not to be imported.
    gpu((9, 0), {})
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn")
    attention._flash_attention.cache_clear()
    attention.implementations.cache_clear()
    assert attention.implementations("cuda", torch.bfloat16) == ["torch_varlen", "sdpa"]
    q_THK = torch.zeros(4, 1, 8)
    with pytest.raises(ValueError, match=r"flash_attn is not to be had.*undefined symbol"):
        varlen_attention(q_THK, q_THK, q_THK, Segments.from_lengths([4]), "flash_attn")
