"""bf16 with fp32 where it matters: norm statistics, softmax, what a model returns, losses; and blocks compile once."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import varlen

from modeling import attention, losses
from modeling.attention import Segments, varlen_attention
from modeling.heads import TokenTargets
from modeling.layers import Block, Transformer, rope_tables
from modeling.text_dit import TextDiT, TextDiTConfig
from modeling.text_vae import TextVAE, TextVAEConfig

LENGTHS = [9, 1, 14]


def test_norms_sum_in_single_precision() -> None:
    """Around a mean of 100 bf16 has steps of 0.5: statistics that were summed in bf16 would be lost."""
    torch.manual_seed(0)
    x_TD = (100 + 4 * torch.randn(5, 512)).bfloat16()
    found_TD = nn.LayerNorm(512).bfloat16()(x_TD)
    exact_TD = nn.functional.layer_norm(x_TD.double(), (512,))
    assert found_TD.dtype == torch.bfloat16
    assert float((found_TD.detach().double() - exact_TD).abs().max()) < 2**-7 * float(exact_TD.abs().max())


def test_attentions_softmax_sums_in_single_precision() -> None:
    """2,048 equal weights of 1/2048: a sum in bf16 would stop growing at 256."""
    values_T1K = torch.randn(2048, 1, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    zeros_T1K = torch.zeros_like(values_T1K)
    found_T1K = varlen_attention(zeros_T1K, zeros_T1K, values_T1K, Segments.from_lengths([2048]))
    assert found_T1K.dtype == torch.bfloat16
    exact_1K = values_T1K.double().mean(0)
    torch.testing.assert_close(found_T1K[7].double(), exact_1K, rtol=0.01, atol=1e-4)


@pytest.mark.parametrize("head", ["velocity", "categorical"])
def test_a_dit_in_bf16_returns_a_velocity_in_fp32(head: str) -> None:
    config = TextDiTConfig(latent_dim=4, width=32, num_layers=1, head_dim=16, head=head, vocab_size=11)
    dit = TextDiT(config).bfloat16()
    is_target_T, time_T = torch.ones(sum(LENGTHS), dtype=torch.bool), torch.full((sum(LENGTHS),), 0.5)
    targets = TokenTargets(torch.arange(sum(LENGTHS)), torch.zeros(sum(LENGTHS), dtype=torch.int64))
    output = dit(torch.randn(sum(LENGTHS), 4), is_target_T, time_T, Segments.from_lengths(LENGTHS), targets=targets)
    assert output.velocity_TZ.dtype == torch.float32
    assert output.hidden_TD.dtype == torch.bfloat16
    assert output.token_ce_M is None or output.token_ce_M.dtype == torch.float32


def test_a_vae_in_bf16_returns_its_posterior_in_fp32_and_its_losses_too() -> None:
    vae = TextVAE(
        TextVAEConfig(vocab_size=50, latent_dim=4, width=32, num_encoder_layers=1, num_decoder_layers=1, head_dim=16)
    )
    vae.bfloat16()
    vae.latents_mean, vae.latents_std = vae.latents_mean.float(), vae.latents_std.float()  # as the engine keeps them
    segments, tokens_T = Segments.from_lengths(LENGTHS), torch.arange(sum(LENGTHS))
    mean_TZ, log_variance_TZ, hidden_TD = vae.encode(tokens_T, segments)
    decoded_TD = vae.decode(mean_TZ, segments)
    assert (hidden_TD.dtype, decoded_TD.dtype) == (torch.bfloat16, torch.bfloat16)
    loss, _ = losses.linear_cross_entropy(decoded_TD, vae.lm_head.weight, tokens_T, torch.ones(len(tokens_T)))
    single = (
        mean_TZ,
        log_variance_TZ,
        vae.standardize(mean_TZ),
        loss,
        losses.kl_to_standard_normal(mean_TZ, log_variance_TZ),
    )
    assert {x.dtype for x in (*single, losses.squared_error(decoded_TD, hidden_TD))} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize(("num_blocks", "checkpoint_every", "backend"), [(1, 0, "inductor"), (2, 2, "aot_eager")])
def test_blocks_are_compiled_once_and_compute_the_same(num_blocks: int, checkpoint_every: int, backend: str) -> None:
    """Later steps bring other segments, which must not compile anything anew.

    What is recomputed is decided before the last stage of the compiler, which makes C++ and takes ten times as long as the others.
    """
    torch.manual_seed(0)
    torch._dynamo.reset()
    stack = Transformer(num_blocks, 32, 16, 10_000.0).train()
    for p in stack.parameters():
        nn.init.normal_(p, std=0.2)
    stack.checkpoint_every = checkpoint_every
    x_TD = torch.randn(24, 32, requires_grad=True)
    layouts = [[24], [9, 1, 14], [1] * 24, [20, 4]]

    def results() -> list[list[torch.Tensor]]:
        found = []
        for lengths in layouts:
            output_TD = stack(x_TD, Segments.from_lengths(lengths))
            found.append([output_TD, *torch.autograd.grad(output_TD.square().sum(), [x_TD, *stack.parameters()])])
        return found

    expected = results()
    for block in stack.blocks:
        block.compile(dynamic=False, backend=backend)
    compiled: list[int] = []
    counters = torch._dynamo.utils.counters["stats"]
    for lengths, plain in zip(layouts, expected):
        output_TD = stack(x_TD, Segments.from_lengths(lengths))
        found = [output_TD, *torch.autograd.grad(output_TD.square().sum(), [x_TD, *stack.parameters()])]
        for one, other in zip(found, plain):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        compiled.append(counters["unique_graphs"])
    assert compiled[0] > 0
    assert compiled[1:] == [compiled[1]] * 3, f"graphs after each step: {compiled}"


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}], ids=["plain", "qk norm"])
def test_a_compiled_block_breaks_at_attention_alone(options: dict[str, bool]) -> None:
    """Every further break would be kernels of a value each, forward and backward."""
    torch._dynamo.reset()
    block = Block(32, 16, **options)
    rope = rope_tables(torch.arange(24), 16, 10_000.0)
    x_TD = torch.randn(24, 32, requires_grad=True)
    found = torch._dynamo.explain(block)(x_TD, rope, Segments.from_lengths([9, 15]))
    reasons = [str(break_.reason) for break_ in found.break_reasons]
    assert reasons
    assert all("_sdpa" in reason for reason in reasons), reasons


def dense(q_THK: torch.Tensor, k_THK: torch.Tensor, v_THK: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """A kernel that knows of the layout what GPUs' kernels know, the offsets."""
    ids_T = torch.searchsorted(offsets[1:], torch.arange(len(q_THK), dtype=torch.int32), right=True)
    q, k, v = (x.transpose(0, 1) for x in (q_THK, k_THK, v_THK))
    mask_TT = ids_T[:, None] == ids_T[None, :]
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask_TT).transpose(0, 1)


@pytest.fixture(params=["flash_attn", "torch_varlen"])
def like_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Attention takes a GPU's way, to a stand-in for its kernel; the options of each call that was not traced."""
    calls: list[dict[str, Any]] = []

    def kernel(q, k, v, offsets, others, bound, other_bound, **options):  # type: ignore[no-untyped-def]
        if not torch.compiler.is_compiling():
            calls.append(options | {"bound": bound})
        return dense(q, k, v, offsets)

    monkeypatch.setattr(attention, "choose_implementation", lambda *_: request.param)
    monkeypatch.setattr(attention, "_flash_attention", lambda: (kernel, ""))
    monkeypatch.setattr(attention, "_flash_kernel", kernel)
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    torch._dynamo.reset()
    yield calls
    torch._dynamo.reset()


def test_a_block_is_one_graph_for_all_layouts(
    like_a_gpu: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And computes what it does on a CPU, whose attention is held against float64 (test_attention.py)."""
    torch.manual_seed(0)
    plain = Transformer(1, 32, 16, 10_000.0).train()
    for p in plain.parameters():
        nn.init.normal_(p, std=0.2)
    stack = copy.deepcopy(plain)
    graphs: list[int] = []

    def counting(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(1)
        return graph.forward

    stack.blocks[0].compile(dynamic=False, backend=counting, fullgraph=True)
    x_TD = torch.randn(512, 32, requires_grad=True)
    for number in range(50):
        cuts = 1 + torch.randperm(511)[: number % 8].sort().values
        lengths = torch.diff(cuts, prepend=torch.tensor([0]), append=torch.tensor([512])).tolist()
        segments = Segments.from_lengths(lengths)
        assert len(segments.for_kernels[0]) == 9  # on GPUs the stack has it made, before its blocks
        output_TD = stack(x_TD, segments)
        if number % 10 == 3:
            with monkeypatch.context() as as_on_a_cpu:
                as_on_a_cpu.setattr(attention, "choose_implementation", lambda *_: "sdpa")
                expected_TD = plain(x_TD, segments)
            found, expected = (torch.autograd.grad(y.square().sum(), x_TD)[0] for y in (output_TD, expected_TD))
            torch.testing.assert_close(output_TD, expected_TD, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1
    assert not like_a_gpu  # all of them compiled


@pytest.mark.parametrize("wanted", [False, True])
def test_deterministic_training_asks_the_kernel_for_it(like_a_gpu: list[dict[str, Any]], wanted: bool) -> None:
    """torch's own kernels see the setting by themselves."""
    x_THK = torch.randn(8, 1, 4)
    torch.use_deterministic_algorithms(wanted)
    try:
        varlen_attention(x_THK, x_THK, x_THK, Segments.from_lengths([5, 3]), "flash_attn")
    finally:
        torch.use_deterministic_algorithms(False)
    assert [call["deterministic"] for call in like_a_gpu] == [wanted]


def test_torchs_own_kernel_is_part_of_the_graph() -> None:
    """As an operator whose shapes are known without a GPU."""
    torch._dynamo.reset()
    segments = Segments.from_lengths([40, 24], "meta")
    assert len(segments.for_kernels[0]) == 3
    x_THK = torch.empty(64, 2, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    found = torch._dynamo.explain(lambda x: varlen_attention(x, x, x, segments, "torch_varlen") * 2)(x_THK)
    assert (found.graph_count, found.graph_break_count) == (1, 0)


@pytest.mark.slow
def test_the_compiled_loss_of_a_chunk_is_the_plain_one() -> None:
    """GPUs run it compiled; the compiler is the same."""
    torch.manual_seed(0)
    logits_CV, targets_C = 3 * torch.randn(16, 100), torch.randint(100, (16,))
    weights_C = (torch.arange(16) % 3 > 0).float()
    plain = losses.loss_of_chunk(logits_CV.clone(), targets_C, weights_C)
    for one, other in zip(
        torch.compile(losses.loss_of_chunk, dynamic=False)(logits_CV.clone(), targets_C, weights_C), plain
    ):
        torch.testing.assert_close(one, other)
