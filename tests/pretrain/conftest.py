"""Fixtures shared by the tests of pretrain."""

from pathlib import Path
from typing import NamedTuple

import pytest


class Trained(NamedTuple):
    """Folders of the prepared data and of the runs of both stages."""

    data: Path
    vae: Path
    dit: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Both stages, two steps each. Read only: copy what you change."""
    from tests.pretrain import tiny_pipeline

    return Trained(*tiny_pipeline.train_both(tmp_path_factory.mktemp("pipeline")))


@pytest.fixture(scope="session")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hugging Face folder of `trained`. Read only."""
    from pretrain.export.convert import convert

    return convert(trained.dit, tmp_path_factory.mktemp("export") / "textldm-tiny")
