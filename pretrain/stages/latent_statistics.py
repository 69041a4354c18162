"""What a DiT must know of its VAE's latents before it is built: mean and deviation, the floors of its loss, how often tokens occur.

Measured once on the run's first rows and its own splits, and kept in the run folder: they belong to the VAE *and* to the way in which
targets are cut.

Shape letters: T packed tokens, V vocabulary, M target tokens of several batches, N held-out ones, Z latent dim, G times of a grid.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from data_pipeline.core.errors import UserError
from data_pipeline.core.storage import atomic_write
from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.batch import FILLER, SUFFIX, Batch
from data_pipeline.reading.counts import token_counts
from modeling.floors import Floors, measure_floors
from modeling.heads import CategoricalHead
from modeling.text_vae import TextVAE
from modeling.token_statistics import log_frequencies, token_statistics
from pretrain.checkpoint.find import saved_steps
from pretrain.ranks.distributed import ALONE, Together
from pretrain.runs.inputs import find_inputs
from pretrain.stages.earlier import earlier_weights
from pretrain.stages.frozen_vae import encoded, load_vae, posterior_mean
from pretrain.stages.inputs import VAE_KEY
from pretrain.stages.rows import training_batches

if TYPE_CHECKING:
    from pretrain.stages.dit_config import DiTRun

LATENTS_NAME = "latents.safetensors"
TOKENS_PREFIX = "tokens."
MIN_STD = 1e-4
COUNTED_TOKENS = 1 << 28
"""Of the training text, for the frequencies: a minute or two where there are more, and all of them where there are not."""
PLACES, PLACE_EVERY = 2, 8
"""How often every token of the vocabulary is put into training text to see its latent there, and of how many tokens one is replaced."""


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and deviation per channel fp32 [Z], the floors, the logarithm of each token's frequency in the training text fp32 [V], and for
    a categorical head what else it knows of tokens, by name.
    """

    mean_Z: Tensor
    std_Z: Tensor
    floors: Floors
    log_frequencies_V: Tensor
    tokens: dict[str, Tensor] = field(default_factory=dict)

    def apply(self, vae: TextVAE) -> None:
        """Set the VAE's `latents_mean` and `latents_std`."""
        vae.latents_mean.copy_(self.mean_Z)
        vae.latents_std.copy_(self.std_Z)

    def apply_tokens(self, head: CategoricalHead) -> None:
        """Set what a DiT's categorical head knows of tokens."""
        for name, buffer in head.named_buffers():
            buffer.copy_(self.log_frequencies_V if name == "log_frequencies" else self.tokens[name])

    def save(self, path: Path, key: str) -> None:
        """Write them as a whole; `key` says what they depend on (`statistics_key`)."""
        tensors = {"latents_mean": self.mean_Z, "latents_std": self.std_Z, "log_frequencies": self.log_frequencies_V}
        tensors |= {"eigenvalues": self.floors.eigenvalues_Z}
        tensors |= {"within_token_variance": torch.tensor(self.floors.within_token_variance, dtype=torch.float64)}
        tensors |= {f"{TOKENS_PREFIX}{name}": tensor for name, tensor in self.tokens.items()}
        with atomic_write(path) as file:
            file.write(
                safetensors_bytes(
                    {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"key": key}
                )
            )

    @classmethod
    def load(cls, path: Path, key: str | None = None) -> Self:
        """Read a file of `save`. Raises: UserError when it cannot be read or has another key than `key`."""
        try:
            with safe_open(path, framework="pt") as file:
                found = (file.metadata() or {}).get("key")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} cannot be read ({error}); delete it, it is measured again at the next start"
            ) from None
        if key is not None and found != key:
            raise UserError(
                f"{path} was measured for another VAE (has it been trained on?) or other data than model.vae, data and"
                " flow.statistics_rows name now, and the run's checkpoints belong to it: set them back, or start over with --fresh"
            )
        tokens = {
            name.removeprefix(TOKENS_PREFIX): tensor
            for name, tensor in tensors.items()
            if name.startswith(TOKENS_PREFIX)
        }
        floors = Floors(tensors["eigenvalues"], float(tensors["within_token_variance"]))
        return cls(tensors["latents_mean"], tensors["latents_std"], floors, tensors["log_frequencies"], tokens)


def measure(config: "DiTRun", manifest: Manifest, device: torch.device, together: Together = ALONE) -> None:
    """Write the run's statistics into its folder, if they are not there already. Collective.

    Raises: UserError on rank 0 when the run has checkpoints and its latents were measured for another VAE or other data: a DiT cannot go
    on in another latent space than it began in.
    """
    path, key = config.run_folder / LATENTS_NAME, statistics_key(config, manifest)
    is_known = together.rank == 0 and _is_measured(path, key, config)
    if together.total(torch.tensor(float(is_known))) > 0:
        return
    vae = load_vae(config.model.vae, manifest, config.model.latent_dim).to(device)
    found = statistics_of(vae, config, manifest, device, together)
    if together.rank == 0:
        found.save(path, key)


def _is_measured(path: Path, key: str, config: "DiTRun") -> bool:
    """Whether the file is there; one that a start left which never saved is removed. Raises: UserError, as `measure`."""
    if not path.is_file():
        return False
    try:
        LatentStatistics.load(path, key)
    except UserError:
        if saved_steps(config.run_folder):
            raise
        path.unlink()
        return False
    return True


def statistics_of(
    vae: TextVAE, config: "DiTRun", manifest: Manifest, device: torch.device, together: Together = ALONE
) -> LatentStatistics:
    """Measured on the run's first rows, frequencies on more of the training text; sets the VAE's too. Collective.

    The same, bit for bit, however many ranks encode and count.
    """
    rows = training_batches(config, config.flow.statistics_rows)
    latents_MZ, tokens_M = target_latents(vae, rows, device, together)
    standardised_MZ = set_statistics(vae, latents_MZ)
    if config.first_weights is not None:  # its DiT goes on in the latent space that it knows
        with earlier_weights(config, manifest) as (known, _):
            vae.latents_mean.copy_(known["latents_mean"])
            vae.latents_std.copy_(known["latents_std"])
        standardised_MZ = standardised(vae, latents_MZ)
    own = token_counts(
        config.data.path, manifest, max_rows=COUNTED_TOKENS // manifest.row_tokens, rank=together.rank,
        world_size=together.world_size, **config.data.reading(),
    )  # fmt: skip
    found = together.total(own)
    # The VAE's vocabulary may be padded beyond the tokenizer's.
    counts_V = torch.zeros(vae.config.vocab_size, dtype=torch.int64)
    counts_V[: len(found)] = found
    tokens = {}
    if config.model.head == "categorical":
        everywhere_VZ = standardised(vae, encoded_in_text(vae, rows, device, together))
        tokens = token_statistics(standardised_MZ, tokens_M, everywhere_VZ)
    floors = measure_floors(standardised_MZ, tokens_M)
    return LatentStatistics(vae.latents_mean.cpu(), vae.latents_std.cpu(), floors, log_frequencies(counts_V), tokens)


def statistics_key(config: "DiTRun", manifest: Manifest) -> str:
    """What the statistics depend on, as a hash: the VAE's checkpoint, the data, how the rows are drawn, and whose latent space is kept."""
    fingerprints = dict(find_inputs(config).fingerprints)
    parts = [
        fingerprints.pop(VAE_KEY),
        manifest.fingerprint,
        config.data.split.in_training.model_dump(exclude_none=True),
        [config.train.seed, config.data.streams, config.data.rows_per_step, config.flow.statistics_rows],
        config.model.head == "categorical",
        *([config.train.init_from] if config.train.init_from else []),
        *fingerprints.values(),  # of a student's teacher, wherever it lies now
    ]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def target_latents(
    vae: TextVAE, batches: Sequence[Batch], device: torch.device, together: Together = ALONE
) -> tuple[Tensor, Tensor]:
    """Posterior means [M, Z] and tokens [M] of the target segments, on the CPU. Collective: each rank encodes its share of the batches."""
    targets = [batch.roles_T == SUFFIX for batch in batches]
    tokens_M = torch.cat([batch.tokens_T[is_target_T] for batch, is_target_T in zip(batches, targets, strict=True)])
    latents_MZ = torch.zeros(len(tokens_M), vae.config.latent_dim)
    parts = latents_MZ.split([int(is_target_T.sum()) for is_target_T in targets])
    for number in range(together.rank, len(batches), together.world_size):
        parts[number].copy_(posterior_mean(vae, batches[number].to(device)).cpu()[targets[number]])
    return together.total(latents_MZ), tokens_M


@torch.no_grad()
def encoded_in_text(vae: TextVAE, batches: Sequence[Batch], device: torch.device, together: Together = ALONE) -> Tensor:
    """Posterior mean [V, Z] of every token of the vocabulary where it stands in place of others in training text, on the CPU. Collective.

    As a text of one token a word has other latents than among words, by more than the distance between words: measured on the
    quickstart's VAE 0.53 instead of 0.002, with a variance of 1 between tokens.
    """
    vocab_size, generator = vae.config.vocab_size, torch.Generator().manual_seed(0)
    waiting = torch.cat([torch.randperm(vocab_size, generator=generator) for _ in range(PLACES)])
    sums_VZ = torch.zeros(vocab_size, vae.config.latent_dim, dtype=torch.float64)
    for number, batch in enumerate(itertools.cycle(batches)):
        is_text_T = batch.roles_T != FILLER
        places_M = (is_text_T & (torch.rand(len(is_text_T), generator=generator) < 1 / PLACE_EVERY)).nonzero()[:, 0]
        places_M = places_M[: len(waiting)]
        put_M, waiting = waiting.split([len(places_M), len(waiting) - len(places_M)])
        if number % together.world_size == together.rank:
            tokens_T = batch.tokens_T.index_copy(0, places_M, put_M).to(device)
            mean_TZ, _ = encoded(vae, tokens_T, batch.segment_lengths)
            sums_VZ.index_add_(0, put_M, mean_TZ.cpu()[places_M].double())
        if not len(waiting):  # of two numbers in fp32 the sum in float64 is exact, in whatever order
            return (together.total(sums_VZ) / PLACES).float()
    raise AssertionError("unreachable: cycle() ends for no batches alone")


def set_statistics(vae: TextVAE, latents_MZ: Tensor) -> Tensor:
    """Set the VAE's `latents_mean` and `latents_std` from posterior means; returns the standardised latents [M, Z]."""
    vae.latents_mean.copy_(latents_MZ.double().mean(0))
    vae.latents_std.copy_(latents_MZ.double().std(0).clamp_min(MIN_STD))
    return standardised(vae, latents_MZ)


def standardised(vae: TextVAE, latents_MZ: Tensor) -> Tensor:
    """`TextVAE.standardize` for latents on the CPU, wherever the VAE is."""
    return vae.standardize(latents_MZ.to(vae.latents_mean.device)).cpu()
