"""The device by its name; on a CPU, what is too small to count is zero, on every thread."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from data_pipeline.core.devices import device_of, flush_denormals, multiplies_bf16
from data_pipeline.core.errors import UserError


@pytest.fixture(autouse=True)
def as_torch_begins():  # type: ignore[no-untyped-def]
    torch.set_flush_denormal(False)
    yield
    torch.set_flush_denormal(False)


def smallest() -> tuple[float, float]:
    """A product below the normal numbers, and the gradient of one."""
    small = torch.tensor([1e-20], requires_grad=True)
    (product,) = small * torch.tensor([1e-20])
    (small * torch.tensor([1e-20])).backward(torch.tensor([1e-20]))
    assert small.grad is not None
    return product.item(), small.grad.item()


def test_denormals_are_zero_on_a_cpu_device_in_backward_passes_and_on_threads_to_come() -> None:
    assert min(smallest()) > 0
    assert device_of("cpu") == torch.device("cpu")
    assert smallest() == (0, 0)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(smallest).result() == (0, 0)


def test_normal_numbers_stay() -> None:
    flush_denormals()
    assert torch.tensor([1.2e-38]).mul(1).item() > 0


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_a_device_that_cannot_be_had_is_said(name: str) -> None:
    with pytest.raises(UserError, match=f"--device is {name}"):
        device_of(name)


@pytest.mark.parametrize(
    ("capabilities", "multiplies"),
    [
        ({"amx_bf16": True, "avx512_bf16": False}, True),
        ({"amx_bf16": False, "avx512_bf16": True}, True),
        ({"amx_bf16": False, "avx512_bf16": False, "avx512_f": True}, False),
        ({}, False),  # as on ARM
    ],
)
def test_which_cpus_multiply_bf16(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], multiplies: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert multiplies_bf16(torch.device("cpu")) is multiplies


def test_a_gpu_that_only_emulates_bf16_does_not_multiply_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not multiplies_bf16(torch.device("cuda", 0))
