"""Every entry's places lead somewhere; with the right kinds of things they are used by the tests of the commands."""

import pytest

from pretrain.config.registry import OWN, part, stage_kind
from pretrain.config.schema import RunConfig
from pretrain.stages.base import Stage


@pytest.mark.parametrize("name", OWN)
def test_the_parts_of_our_stages_are_there(name: str) -> None:
    kind = stage_kind(name)
    assert issubclass(kind.config, RunConfig)
    assert issubclass(part(kind.stage), Stage)
    places = [kind.inputs, kind.measure, kind.samples, kind.diagnosis, kind.export]
    assert all(part(place) is not None for place in places if place)
