"""What is measured of latents before a DiT is built: every token of the vocabulary where it stands among others."""

from types import SimpleNamespace

import torch

from data_pipeline.reading.batch import FILLER
from modeling.attention import Segments
from pretrain.stages.latent_statistics import encoded_in_text

VOCAB = 50


class Neighbours:
    """Encodes a token as itself, and its neighbours on both sides."""

    config = SimpleNamespace(vocab_size=VOCAB, latent_dim=3)

    def encode(self, tokens_T: torch.Tensor, segments: Segments) -> tuple[torch.Tensor]:
        padded_T = torch.nn.functional.pad(tokens_T, (1, 1), value=-1)
        return (torch.stack((tokens_T, padded_T[:-2], padded_T[2:]), -1).float(),)


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
