"""REPA's head against what its loss should be."""

import torch
import torch.nn.functional as F

from modeling.repa import RepaHead


def test_with_a_mean_of_directions_it_gives_the_mean_of_the_exact_cosines():
    """What a lossy cache knows of two features with the same code is their mean, which is shorter than either."""
    torch.manual_seed(0)
    head, hidden_TD = RepaHead(8, 6), torch.randn(50, 8)
    features_2TF = torch.randn(2, 50, 6)
    exact_2T = F.cosine_similarity(head.projection(hidden_TD), features_2TF, dim=-1)
    found_T = head(hidden_TD, F.normalize(features_2TF, dim=-1).mean(0))
    torch.testing.assert_close(found_T, exact_2T.mean(0))
