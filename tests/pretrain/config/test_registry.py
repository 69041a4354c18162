"""Every entry's places lead somewhere; with the right kinds of things they are used by the tests of the commands."""

import pytest

from data_pipeline.core.errors import UserError
from pretrain.config import registry
from pretrain.config.load import load_config
from pretrain.config.registry import OWN, StageKind, stage_kind
from pretrain.config.schema import RunConfig
from pretrain.stages.base import Stage


@pytest.mark.parametrize("name", OWN)
def test_the_parts_of_our_stages_are_there(name: str) -> None:
    kind = stage_kind(name)
    assert issubclass(kind.config, RunConfig)
    assert issubclass(kind.load("stage"), Stage)
    fields = ("inputs", "measure", "samples", "diagnosis", "export", "outline", "from_export")
    assert all((kind.load(field) is None) == (getattr(kind, field) is None) for field in fields)


@pytest.mark.parametrize("place", ["no_such_module:x", "pretrain.train:no_such_thing", "no place"])
def test_a_place_that_leads_nowhere_is_named_with_its_field(place: str) -> None:
    kind = StageKind(config=RunConfig, stage="pretrain.stages.vae:VAEStage", export=place)
    with pytest.raises(
        UserError, match=f"^export of the StageKind with RunConfig names {place}, which cannot be loaded: "
    ):
        kind.load("export")


def test_a_broken_package_of_another_stage_hides_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = registry.stage_kind

    def stage_kind_or_broken(name: str) -> StageKind:
        if name == "broken":
            raise UserError("mend the package")
        return kind(name)

    monkeypatch.setattr(registry, "stage_names", lambda: [*OWN, "broken"])
    monkeypatch.setattr(registry, "stage_kind", stage_kind_or_broken)
    assert list(registry.known_kinds()) == list(OWN)
    with pytest.raises(UserError, match="unknown key reppa"):
        load_config("vae_base", ["reppa.weight=3"])
