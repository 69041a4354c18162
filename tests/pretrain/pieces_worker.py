"""One rank that builds stages at ZeRO 3 and writes what it held meanwhile, for tests/pretrain/engine/test_pieces.py.

Its only argument is the file of its job: {"configs": {name: configuration}, "expected": {name: tensors that a configuration starts from}}.
"""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from data_pipeline.format.manifest import Manifest
from modeling.heads import TokenHead
from modeling.layers import initialize, whole
from modeling.repa import RepaHead
from modeling.shapes import TextDiTConfig, TextVAEConfig, TokenTransformerConfig
from modeling.text_dit import TextDiT
from modeling.text_vae import TextVAE
from modeling.token_transformer import TokenTransformer
from pretrain.config.load import parse_config
from pretrain.engine.engine import Engine, EngineSettings, in_pieces
from pretrain.engine.optim import full_shape
from pretrain.engine.optimizer_settings import optimizer_settings
from pretrain.engine.pieces import weights_on
from pretrain.plan.activations import StorageTracker
from pretrain.ranks.distributed import Topology, init_distributed
from pretrain.stages.build import build_stage, measure, take_first_weights
from tests.pretrain import engine_toy as toy
from tests.pretrain.engine_states import gather_full

CPU = torch.device("cpu")
LAYERS, WIDTH = 40, 32
TRAININGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "never whole": {"overrides": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}},
    "muon": {"optimizer": toy.MUON},
    "offloaded": {"offload_parameters": "cpu", "offload_optimizer": "cpu"},
}


class Tied(nn.Module):
    """A weight that is two modules'."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(37, 11)
        self.head = nn.Linear(11, 37, bias=False)
        self.head.weight = self.embedding.weight
        self.last = nn.Linear(11, 3)
        initialize(self)


class Late(nn.Module):
    """Writes into its weight when the next module's has been made."""

    def __init__(self, write: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 3)
        write(self.first.weight)


def models() -> dict[str, list[nn.Module]]:
    """All that is trained anywhere, with all that initialisation knows."""
    shape = {"width": 32, "head_dim": 16}
    categorical = {"head": "categorical", "neighbour_heads": True, "role_embedding": True, "vocab_size": 37}
    return {
        "vae": [
            TextVAE(TextVAEConfig(vocab_size=37, latent_dim=5, num_encoder_layers=1, num_decoder_layers=1, **shape)),
            RepaHead(32, 7),
        ],
        "categorical": [TextDiT(TextDiTConfig(latent_dim=5, num_layers=2, **categorical, **shape))],
        "adaln_zero": [
            TextDiT(TextDiTConfig(latent_dim=5, num_layers=2, qk_norm=True, time_conditioning="adaln_zero", **shape)),
            TokenHead(32, 37),
        ],
        "tokens": [
            TokenTransformer(
                TokenTransformerConfig(vocab_size=37, num_layers=2, neighbour_heads=True, **shape), 1, with_roles=True
            )
        ],
        "tied": [Tied()],
    }


def values_of(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, whole. Collective."""
    found = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        with whole(tensor):
            found[name] = tensor.detach().clone()
    return found


def is_cut(module: nn.Module) -> bool:
    """Whether no parameter has values of its own."""
    return not any(p.numel() for p in module.parameters())


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def drawn(topology: Topology) -> dict[str, bool]:
    """Whether models in pieces begin with the values of whole ones, and those of rank 0 where ranks draw others."""
    torch.manual_seed(3)
    expected = {name: [values_of(one) for one in of] for name, of in models().items()}
    following = torch.rand(1)
    torch.manual_seed(3 + topology.rank)
    with in_pieces(EngineSettings(zero_stage=3)), weights_on(CPU):
        pieces = models()
    notes = {"numbers_that_follow": topology.rank > 0 or torch.equal(torch.rand(1), following)}
    for name, of in pieces.items():
        notes[name] = all(is_cut(one) for one in of) and all(map(same, map(values_of, of), expected[name]))
    return notes


def refused() -> dict[str, str]:
    """What is said of writing into a parameter that is cut already."""
    writes = {
        "method": lambda p: p.requires_grad_(False).zero_(),
        "init": nn.init.normal_,
        "function": nn.init.uniform_,
    }
    notes = {}
    for name, write in writes.items():
        try:
            with in_pieces(EngineSettings(zero_stage=3)), weights_on(CPU):
                Late(write)
            notes[name] = "accepted"
        except RuntimeError as error:
            notes[name] = str(error)
    return notes


class Bytes(StorageTracker):
    """Of tensors that have values."""

    def _meet(self, tensor: Tensor) -> None:
        if not tensor.is_meta:
            super()._meet(tensor)


def bytes_of(module: nn.Module) -> int:
    """Of its parameters, in fp32."""
    return sum(4 * math.prod(full_shape(p)) for p in module.parameters())


def measured(build: Any, known: Sequence[Tensor] = ()) -> tuple[Any, int]:
    """What `build` gives, and the most bytes alive meanwhile beside what is known."""
    with Bytes(list(known)) as tracker:
        found = build()
    return found, tracker.peak


def peaks(topology: Topology) -> dict[str, int]:
    """Bytes that a rank holds while a stage of many equal blocks is built in pieces, and whole."""
    shape = TokenTransformerConfig(vocab_size=37, width=WIDTH, num_layers=LAYERS, head_dim=16, neighbour_heads=True)

    def build(zero_stage: int) -> nn.Module:
        with in_pieces(EngineSettings(zero_stage=zero_stage)), weights_on(CPU):
            return TokenTransformer(shape)

    notes = {}
    for name, zero_stage in (("whole", 1), ("pieces", 3)):
        model, notes[name] = measured(lambda zero_stage=zero_stage: build(zero_stage))
    notes["model"], notes["block"] = bytes_of(model), bytes_of(model.transformer.blocks[0])
    notes["share"] = sum(4 * p.ds_tensor.numel() for p in model.parameters())
    return notes


def trained(topology: Topology) -> dict[str, bool]:
    """Whether a stage that was built in pieces trains as one that DeepSpeed cut, bit for bit."""
    notes = {}
    for name, case in TRAININGS.items():
        case = dict(case)
        section = case.pop("optimizer", toy.OPTIMIZER.model_dump())
        settings = EngineSettings(zero_stage=3, **case)
        found = []
        for context in (nullcontext, lambda settings=settings: in_pieces(settings)):
            with context(), weights_on(CPU):
                stage = toy.ToyStage()
            engine = Engine(stage, settings, optimizer_settings(section["kind"])(**section), topology)
            losses = []
            for step in range(3):
                counts = toy.counts_of(toy.step_rows(step))
                for batch in toy.micro_batches(step, topology.rank, topology.world_size, 1):
                    engine.forward_backward(batch, counts, last=True)
                losses.append(engine.step(step, toy.LR).loss)
            found.append((losses, gather_full(engine), str(engine.parameter_table())))
            engine.close()
        (losses, states, table), (own_losses, own_states, own_table) = found
        notes[name] = losses == own_losses and same(states, own_states) and table == own_table
    return notes


def started(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a stage in pieces begins with that is given another run's weights, and what it holds meanwhile."""
    notes = {}
    for name, values in job["configs"].items():
        config = parse_config(values, name)
        manifest = Manifest.load(config.data.path)
        measure(config, manifest, CPU)
        torch.manual_seed(0)
        with in_pieces(EngineSettings(zero_stage=3)):
            stage = build_stage(config, manifest, CPU)
        pieces = [p.ds_tensor for p in stage.parameters()]
        _, peak = measured(lambda: take_first_weights(stage, config, manifest), pieces)  # noqa: B023
        found, expected = values_of(stage), load_file(job["expected"][name])
        notes[name] = {
            "same": all(torch.equal(found[key], tensor) for key, tensor in expected.items() if key in found),
            "kept": sorted(found.keys() - expected.keys()),
            "cut": is_cut(stage),
            "peak": peak,
            "model": bytes_of(stage),
        }
    return notes


def main(argv: list[str]) -> int:
    """Do it all; each rank writes <job>-<rank>.json."""
    path = Path(argv[0])
    job, topology = json.loads(path.read_text()), init_distributed(timeout_s=60)
    notes = {"peaks": peaks(topology), "drawn": drawn(topology), "trained": trained(topology), "started": started(job)}
    notes["refused"] = refused()
    path.with_name(f"found-{topology.rank}.json").write_text(json.dumps(notes))
    return 0
