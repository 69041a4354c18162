"""The training engine: DeepSpeed behind a few calls. The only file that imports deepspeed.

    engine = Engine(stage, EngineSettings(zero_stage=2), AdamWSettings(lr=3e-4), init_distributed())
    for batch in micro_batches:
        metrics = engine.forward_backward(batch, counts, last=batch is micro_batches[-1])
    measured = engine.measure()                       # the same loss and gradient norm on every rank
    engine.step(step, lr, skip=not math.isfinite(measured.loss))

What is promised, and how it is kept:
- The gradient is the plain sum over micro-batches and ranks of d loss. DeepSpeed averages over ranks and accumulation
  steps; the loss is multiplied by the number of ranks before, and the division by accumulation steps is left out.
- Gradient norm, clipping and skipping are our own, so that they mean the same at every ZeRO stage (DeepSpeed's norm is
  None at stage 0 in fp32, and its overflow rules differ between stages). DeepSpeed's clipping is off.
- Gradients are accumulated, reduced and applied in fp32, whatever the model computes in.
- At ZeRO 3 a stage that was built within `in_pieces` is never whole on any rank.
"""

import gc
import importlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor, nn

from data_pipeline.core.errors import UserError
from pretrain.engine.matrices import whole_matrices
from pretrain.engine.optim import build_optimizer, full_shape
from pretrain.engine.optimizer_settings import OptimizerSettings
from pretrain.engine.partition import Partition, partition_of
from pretrain.engine.pieces import Pieces
from pretrain.engine.settings import EngineSettings, deepspeed_config
from pretrain.ranks.distributed import Topology

__all__ = ["Engine", "EngineSettings", "Measured", "in_pieces"]

T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """Loss of the whole step and global gradient norm before clipping, both equal on every rank, bit for bit."""

    loss: float
    grad_norm: float


class _BareLoss:
    """Stands in for a stage's `forward`: returns the loss alone and keeps the whole output.

    ZeRO-3 finds the start of a module's backward pass by the tensors in its output: it cannot look into a dataclass,
    and must not wait for gradients of the metrics.
    """

    def __init__(self, stage: nn.Module) -> None:
        self.forward = stage.forward
        self.output: Any = None

    def __call__(self, batch: Any, counts: dict[str, int]) -> Tensor:
        self.output = self.forward(batch, counts)
        return self.output.loss

    def take(self) -> Any:
        """The output of the last call, forgotten here, so that no graph outlives its micro-batch."""
        output, self.output = self.output, None
        return output


class Engine:
    """A stage under DeepSpeed.

    Args:
        stage: module whose `forward(batch, counts)` returns an object with `.loss` (a scalar: this micro-batch's sum
            over tokens / the step's global counts) and `.metrics`. Ranks that built it with other weights get rank 0's.
            All its parameters are trained (keep frozen models out of it), and in a micro-batch all ranks must use the
            same ones: multiply by a mask rather than branch on the data, or ZeRO 1 to 3 mix up their collectives.
        settings, optimizer: see there.
        topology: from `init_distributed`.

    Attributes: `partition`, what this rank holds; `updates`, how many steps changed the weights (skipped ones did not),
    which an optimizer's bias correction depends on.

    Raises: UserError for overrides that DeepSpeed would ignore, or that contradict the settings.
    """

    def __init__(
        self, stage: nn.Module, settings: EngineSettings, optimizer: OptimizerSettings, topology: Topology
    ) -> None:
        _check_trainable(stage)
        self.stage, self.settings, self.optimizer_settings, self.topology = stage, settings, optimizer, topology
        base = build_optimizer(stage, optimizer)
        names = {p: name for name, p in stage.named_parameters()}
        groups = {names[p]: number for number, group in enumerate(base.param_groups) for p in group["params"]}
        self._bare_loss = stage.forward = _BareLoss(stage)
        deepspeed = _load_deepspeed()
        gc.freeze()  # what was imported is no garbage; DeepSpeed, as it is built, and Python, at any step, would look through it for 0.1 s
        if settings.zero_stage == 3:
            _spare_stage_3_its_norm()
        self._torch_linear = torch.nn.functional.linear
        numel = sum(math.prod(full_shape(p)) for p in names)
        config = deepspeed_config(settings, numel, torch.cuda.is_available())
        with redirect_stdout(io.StringIO()):  # its bf16 optimizer prints a dozen lines of memory figures
            if settings.zero_stage == 3:
                _cut_up(stage, config, topology.device)
            self._deepspeed, wrapped, _, _ = deepspeed.initialize(
                model=stage, optimizer=base, config=config, dist_init_required=False
            )
        folder = Path(settings.offload_folder)
        files = folder if settings.offload_optimizer == "nvme" else None
        self.partition: Partition = partition_of(
            names, groups, wrapped, base, topology.rank, topology.world_size, files
        )
        if settings.offload_parameters == "nvme":
            self.partition.keep_parameters_in_files(folder)
        if base.matrices:
            counts = {names[p]: count for p, count in base.matrices.items()}  # type: ignore[index]
            shapes = {name: parameter.shape for name, parameter in self.partition.parameters.items()}
            base.whole = whole_matrices(
                counts, shapes, self.partition.held, self.partition.flats,
                topology.rank, topology.world_size, topology.device,
                torch.bfloat16 if settings.precision == "bf16" else torch.float32,
            )  # fmt: skip
        self.updates = 0
        self._base, self._groups = base, groups
        self._losses: list[Tensor] = []
        self._measured: Measured | None = None

    def forward_backward(self, batch: Any, counts: dict[str, int], last: bool) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch; returns the stage's metrics, detached, not yet summed over ranks.

        Every rank calls it `accumulation_steps` times a step, the last time with `last=True`.
        """
        self._deepspeed.set_gradient_accumulation_boundary(last)
        loss = self._deepspeed(batch, counts)
        output = self._bare_loss.take()
        self._losses.append(loss.detach().double())
        self._deepspeed.backward(loss * self.topology.world_size, scale_wrt_gas=False)
        return {name: value.detach() if isinstance(value, Tensor) else value for name, value in output.metrics.items()}

    def measure(self) -> Measured:
        """Loss and gradient norm of the step, in one all-reduce, after its last micro-batch.

        Every rank gets the same two numbers, so whatever is decided from them (non-finite, too large) is agreed.
        """
        if self._measured is None:
            if not self._losses:
                raise RuntimeError("measure() or step() before forward_backward(): there is no gradient")
            squared_norm = self.partition.squared_gradient_norm().to(self.topology.device)
            both = torch.stack([torch.stack(self._losses).sum(), squared_norm])
            if self.topology.world_size > 1:
                dist.all_reduce(both)
            loss, squared = both.tolist()
            self._measured = Measured(loss, math.sqrt(squared) if squared >= 0 else math.nan)
        return self._measured

    def step(self, step: int, lr: float, skip: bool = False) -> Measured:
        """Update number `step` (counted from 0) at learning rate `lr`: clip, the optimizer, EMA.

        With `skip`, or if the gradient norm is not finite, nothing changes: weights, the optimizer's states, EMA and
        `updates` keep their bits, and the gradients are dropped. `skip` must be the same on every rank.
        """
        measured = self.measure()
        clip = self.optimizer_settings.grad_clip
        skip = skip or not math.isfinite(measured.grad_norm)
        clip_factor = min(1.0, clip / (measured.grad_norm + 1e-6)) if clip > 0 else 1.0
        self._base.prepare(self.updates + 1, lr, self.optimizer_settings.ema_decay_at(step), clip_factor, skip)
        self._deepspeed.step()
        self.updates += not skip
        self.partition.forget_gradients()
        self._losses, self._measured = [], None
        return measured

    @torch.no_grad()
    def evaluate(self, batch: Any, counts: dict[str, int]) -> Any:
        """The stage's output for one held-out batch, in eval mode and without gradients.

        Under ZeRO-3 weights are gathered on the way, so every rank must call it equally often.
        """
        was_training = self.stage.training
        self.stage.eval()
        try:
            self._deepspeed(batch, counts)
        finally:
            self.stage.train(was_training)
        return self._bare_loss.take()

    def call(self, function: Callable[[], T]) -> T:
        """`function()` in place of the stage's forward pass, as in `evaluate`: what calls the stage's modules by itself.

        Every rank must call it, and pass through the same modules.
        """
        forward = self._bare_loss.forward
        self._bare_loss.forward = lambda batch, counts: SimpleNamespace(loss=None, result=function())
        try:
            return self.evaluate(None, {}).result
        finally:
            self._bare_loss.forward = forward

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Within, the model computes with the EMA; afterwards with the trained weights again, bit for bit. Collective.

        Masters and EMA change places, so there is no second copy; nothing may be saved or trained within.
        """
        self.partition.swap_weights_and_ema()
        try:
            yield
        finally:
            self.partition.swap_weights_and_ema()

    def buffers(self) -> dict[str, Tensor]:
        """The stage's persistent buffers, such as latent statistics; checkpoints keep them beside the parameters."""
        return {
            f"{prefix}.{name}" if prefix else name: buffer
            for prefix, module in self.stage.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        }

    def aliases(self) -> dict[str, str]:
        """Further names of tied parameters -> the name under which they are trained and saved."""
        first = {id(p): name for name, p in self.stage.named_parameters()}
        every = self.stage.named_parameters(remove_duplicate=False)
        return {name: first[id(p)] for name, p in every if first[id(p)] != name}

    def parameter_table(self) -> str:
        """Parameter groups with their dtypes, sizes, and bytes of this rank; printed at start."""
        parameters = self.partition.parameters
        settings, model_bytes = self.settings, 2 if self.settings.precision == "bf16" else 4
        where = {"none": "on the device", "cpu": "on the host", "nvme": f"in files in {settings.offload_folder}"}
        rows = []
        for number, group in enumerate(self._base.param_groups):
            names = {name for name, of in self._groups.items() if of == number}
            total = sum(parameters[name].numel for name in names)
            held = sum(h.numel for h in self.partition.held if h.name in names)
            in_model = (held if settings.zero_stage == 3 else total) * model_bytes
            in_states = 4 * len(self._base.states_of(group)) * held
            sizes = (f"{len(names):,}", f"{total:,}", f"{in_model / 1e6:,.1f}", f"{in_states / 1e6:,.1f}")
            rows.append((group["label"], *sizes[:2], "bf16" if model_bytes == 2 else "fp32", "fp32", *sizes[2:]))
        headers = ("group", "tensors", "parameters", "model", "states", "model MB/rank", "states MB/rank")
        alignment = ("left", *["right"] * 6)
        lines = [
            f"ZeRO-{settings.zero_stage} on {self.topology.world_size} rank(s), computes in {settings.precision}; fp32 masters,"
            f" optimizer states and EMA {where[settings.offload_optimizer]}, gradients accumulated and reduced in fp32",
            tabulate(rows, headers, tablefmt="plain", disable_numparse=True, colalign=alignment),
        ]
        if (whole := self._base.whole) is not None:
            lines.append(
                f"whole matrices: this rank computes {len(whole.owned(whole.rank))} of {len(whole.exchanges)} and sends"
                f" {whole.sent(whole.rank):,} elements a step"
            )
        return "\n".join(lines)

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers; the stage is a plain module again (under ZeRO-3 without weights)."""
        self._deepspeed.destroy()
        # ZeRO-3 puts a linear of its own in torch's place, for the whole process; under autocast it rounds differently.
        torch.nn.functional.linear = self._torch_linear
        self.stage.forward = self._bare_loss.forward


def _load_deepspeed() -> Any:
    """The package, imported late: that takes seconds, which `--help` or a mistake in a configuration can spare."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # it warns when it guesses
    import deepspeed

    # Its shared-memory collective compiles for a minute and leaks 66 MiB of /dev/shm per rank. Same bits without. To ask for
    # this table would be to try out all operations, with a compiler and a linker.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    _import_muon_uncompiled()
    # Its bf16 optimizer at stage 1 would make every rank's host wait for the device, and for the others, to look at a norm that
    # measure() has. A step that is not finite takes the way of every skipped one (optim.py).
    bf16_optimizer = importlib.import_module("deepspeed.runtime.bf16_optimizer")
    bf16_optimizer.get_global_norm_of_tensors = lambda **_: 0.0  # type: ignore[attr-defined]
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*reduce_scatter_tensor.*", category=FutureWarning)
    return deepspeed


@contextmanager
def in_pieces(settings: EngineSettings) -> Iterator[None]:
    """Within, a stage is built as the engine will hold it: at ZeRO 3 no rank has more of what it makes under `weights_on` (pieces.py)
    than its own pieces, in fp32, and one module's parameters. Collective at ZeRO 3, nothing elsewhere.
    """
    if settings.zero_stage < 3:
        yield
        return
    deepspeed = _load_deepspeed()
    with redirect_stdout(io.StringIO()):
        init = _zero_init(deepspeed_config(settings, 1))
    pieces = Pieces(init._convert_to_zero_parameters, partial(deepspeed.zero.GatheredParameters, modifier_rank=0))
    with pieces.taking():
        yield


def _cut_up(stage: nn.Module, config: dict[str, Any], device: torch.device) -> None:
    """Cut the parameters that are whole yet, as `deepspeed.initialize` would; all pieces in the dtype that is computed in.

    With what is in pieces DeepSpeed does neither that nor see to the buffers' device.
    """
    _zero_init(config, stage)
    stage.to(device)
    if "bf16" in config:
        for p in stage.parameters():
            for part in (p, p.ds_tensor):  # type: ignore[attr-defined]
                part.data = part.data.bfloat16()


def _zero_init(config: dict[str, Any], module: nn.Module | None = None) -> Any:
    """DeepSpeed's `zero.Init`, by which it cuts parameters: those of a module at once."""
    deepspeed = _load_deepspeed()
    accelerator = deepspeed.accelerator.get_accelerator()
    deepspeed.init_distributed(accelerator.communication_backend_name(), dist_init_required=False, verbose=False)
    groups = importlib.import_module("deepspeed.utils.groups")
    return deepspeed.zero.Init(
        module=module,
        config_dict_or_path=config,
        zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),
    )


def _spare_stage_3_its_norm() -> None:
    """So it is with stage 3 (its `step`, 0.19.8): a norm by sub-groups, all-reduced each by itself, for whose value every host waits."""
    stage_3 = importlib.import_module("deepspeed.runtime.zero.stage3")
    stage_3.DeepSpeedZeroOptimizer_Stage3._get_norm_groups = lambda _: []  # type: ignore[attr-defined]
    stage_3.combine_grad_norm_groups = lambda _: 0.0  # type: ignore[attr-defined]


def _import_muon_uncompiled() -> None:
    """DeepSpeed's own Muon, which its optimizers look for and nobody here trains with, without torch's compiler.

    It decorates three functions with it, whose backend takes more than a second to import in every rank.
    """
    from deepspeed.runtime import compiler

    compile_functions, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile_functions


def _is_news(record: logging.LogRecord) -> bool:
    """Keep out two warnings about what is done on purpose: a subclass of AdamW, and a batch that is a dataclass."""
    return not any(known in record.getMessage() for known in ("untested optimizer", "unknown inputs or outputs type"))


def _check_trainable(stage: nn.Module) -> None:
    frozen = [name for name, p in stage.named_parameters() if not p.requires_grad]
    if frozen:
        raise UserError(
            f"the stage registers {len(frozen)} frozen parameter(s), the first is {frozen[0]}: hold frozen models where "
            "nn.Module does not register them, so that DeepSpeed neither shards nor saves them"
        )
