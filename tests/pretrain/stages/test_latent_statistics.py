"""What is measured of latents before a DiT is built: every token of the vocabulary where it stands among others."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.batch import FILLER
from modeling.attention import Segments
from pretrain.config.load import parse_config
from pretrain.ranks.distributed import ALONE, Together
from pretrain.stages.frozen_vae import load_vae
from pretrain.stages.latent_statistics import LatentStatistics, encoded_in_text, statistics_of
from tests.pretrain import tiny_pipeline
from tests.pretrain.conftest import Trained

VOCAB = 50


class Neighbours:
    """Encodes a token as itself, and its neighbours on both sides."""

    config = SimpleNamespace(vocab_size=VOCAB, latent_dim=3)

    def encode(self, tokens_T: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, torch.Tensor]:
        padded_T = torch.nn.functional.pad(tokens_T, (1, 1), value=-1)
        mean_TZ = torch.stack((tokens_T, padded_T[:-2], padded_T[2:]), -1).float()
        return mean_TZ, mean_TZ


def test_every_token_is_encoded_in_the_place_of_others_of_the_training_text() -> None:
    """Also those that the text never holds: it is of the first ten tokens alone, and its filler of none of them."""
    roles_T = torch.full((120,), FILLER + 1)
    roles_T[100:] = FILLER
    text_T = torch.where(roles_T == FILLER, 1000, torch.arange(120) % 10)
    batch = SimpleNamespace(tokens_T=text_T, roles_T=roles_T, segment_lengths=[40, 60, 20])
    found_VZ = encoded_in_text(Neighbours(), [batch], torch.device("cpu"))  # type: ignore[arg-type, list-item]
    assert torch.equal(found_VZ[:, 0], torch.arange(VOCAB).float())
    # Beside filler stands the last token of the text alone; most neighbours are the text's own.
    assert (found_VZ[:, 1:] < 10).float().mean() > 0.6
    assert text_T.tolist() == torch.where(roles_T == FILLER, 1000, torch.arange(120) % 10).tolist()


def test_however_many_ranks_measure_them_the_bits_are_the_same(trained: Trained, tmp_path: Path) -> None:
    values = tiny_pipeline.dit_values(trained.data, trained.vae, tmp_path, {"head": "categorical"})
    values["flow"]["token_loss_weight"] = 1.0
    config: Any = parse_config(values, "test")
    manifest = Manifest.load(trained.data)

    def measured(together: Together) -> LatentStatistics:
        vae = load_vae(trained.vae, manifest)
        return statistics_of(vae, config, manifest, torch.device("cpu"), together)

    alone = measured(ALONE)
    encoded, sums = [0] * 3, [None] * 3
    barrier = threading.Barrier(3, timeout=60)

    def rank(number: int) -> LatentStatistics:
        def total(tensor: torch.Tensor) -> torch.Tensor:
            sums[number] = tensor  # type: ignore[call-overload]
            encoded[number] += int(tensor.count_nonzero())
            barrier.wait()
            found = sums[2] + (sums[0] + sums[1])  # type: ignore[operator]
            barrier.wait()
            return found

        return measured(Together(number, 3, total))

    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(rank, range(3)))
    assert min(encoded) > 0  # each had its share
    for one in together:
        assert torch.equal(one.mean_Z, alone.mean_Z)
        assert torch.equal(one.std_Z, alone.std_Z)
        assert torch.equal(one.floors.eigenvalues_Z, alone.floors.eigenvalues_Z)
        assert torch.equal(one.log_frequencies_V, alone.log_frequencies_V)
        assert one.tokens.keys() == alone.tokens.keys()
        assert all(torch.equal(tensor, alone.tokens[name]) for name, tensor in one.tokens.items())
