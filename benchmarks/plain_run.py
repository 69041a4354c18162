"""Stage 1 in one process without DeepSpeed: the very stage, loader and optimizer, in a plain loop."""

from typing import Any

import torch

from data_pipeline.core.keys import key
from data_pipeline.format.manifest import Manifest
from pretrain.config.load import load_config
from pretrain.config.schema import RunConfig
from pretrain.engine.optim import build_optimizer
from pretrain.engine.schedule import learning_rate
from pretrain.ranks.distributed import Topology
from pretrain.session import open_loader
from pretrain.stages.vae import VAEStage
from pretrain.stages.vae_config import VAERun


def vae_config(name: str, overrides: dict[str, Any]) -> VAERun:
    """A shipped configuration of stage 1 with some keys changed."""
    config: RunConfig = load_config(
        name, [f"{key}={'null' if value is None else value}" for key, value in overrides.items()]
    )
    assert isinstance(config, VAERun)
    return config


class PlainRun:
    """A stage with its batches and its optimizer. Close it, or use it as a context."""

    def __init__(self, config: VAERun, device: torch.device, dtype: torch.dtype = torch.float32):
        self.config, self.device, self.num_steps = config, device, 0
        torch.manual_seed(key(config.train.seed, "initial weights") % 2**63)
        self.stage = VAEStage(config, Manifest.load(config.data.path), device).to(device, dtype)
        self.stage.train()
        self.loader = open_loader(config, Topology(device=device), start_step=0)
        self.settings = config.optimizer
        self.optimizer = build_optimizer(self.stage, self.settings)

    def step(self) -> None:
        """One update of the weights and the EMA."""
        batches = [batch.to(self.device) for batch in self.loader.next_step()]
        counts = [self.stage.token_counts(batch) for batch in batches]
        self.stage.step = self.num_steps
        for batch in batches:
            self.stage(batch, {name: sum(count[name] for count in counts) for name in counts[0]}).loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.stage.parameters() if p.grad is not None])
        lr = learning_rate(self.num_steps, self.settings.lr, self.config.schedule, self.config.train.steps)
        clip_factor = min(1.0, self.settings.grad_clip / (float(norm) + 1e-6))
        self.optimizer.prepare(self.num_steps + 1, lr, self.settings.ema_decay_at(self.num_steps), clip_factor)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_steps += 1
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __enter__(self) -> "PlainRun":
        return self

    def __exit__(self, *_: object) -> None:
        self.loader.close()
