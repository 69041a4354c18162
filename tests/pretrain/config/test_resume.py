"""What a resumed run may change: said by the keys themselves."""

from typing import Annotated, Any

import pytest
from pydantic import Field

from data_pipeline.core.errors import UserError
from data_pipeline.core.settings import OnResume, Section
from pretrain.config.load import load_config
from pretrain.config.resume import on_resume, refuse_changes, resume_differences
from pretrain.config.schema import RunConfig
from pretrain.stages.dit_config import DiTRun
from pretrain.stages.vae_config import VAERun

FREE, NEVER = OnResume.FREE, OnResume.NEVER


def test_a_change_is_free_or_asked_for() -> None:
    old = load_config("dit_b")
    new = load_config("dit_b", ["train.zero_stage=3", "optimizer.lr=0.5", "data.workers=5", "train.steps=3000000"])
    found = {d.key: d.on_resume for d in resume_differences(old, new)}
    assert found == {"train.zero_stage": FREE, "optimizer.lr": None, "data.workers": FREE, "train.steps": FREE}
    with pytest.raises(UserError, match=r"optimizer.lr was 0.0001, is 0.5. If that is meant, add --allow-change"):
        refuse_changes(resume_differences(old, new), [], "runs/x")
    refuse_changes(resume_differences(old, new), ["optimizer.lr"], "runs/x")
    refuse_changes(resume_differences(old, new), ["optimizer"], "runs/x")
    assert resume_differences(old.model_dump(mode="json"), old) == []


def test_sections_as_wholes_are_free_also_where_nobody_knows_their_keys() -> None:
    changes = [
        "about.purpose=x",
        "telemetry.wandb=false",
        "diagnose.rows=3",
        "deepspeed.zero_optimization.overlap_comm=true",
    ]
    differences = resume_differences(load_config("dit_b"), load_config("dit_b", changes))
    assert [d.on_resume for d in differences] == [FREE] * 4
    refuse_changes(differences, [], "runs/x")


@pytest.mark.parametrize(("kind", "expected"), [("cosine", None), ("constant", FREE), ("wsd", FREE)])
def test_a_cosine_may_not_be_prolonged_unasked(kind: str, expected: OnResume | None) -> None:
    old, new = (
        load_config("vae_base", [f"schedule.kind={kind}", f"train.steps={steps}"]) for steps in (200_000, 300_000)
    )
    assert [d.on_resume for d in resume_differences(old, new)] == [expected]


@pytest.mark.parametrize("change", ["train.seed=1", "data.rows_per_step=768", "data.streams=96"])
def test_what_orders_the_data_never_changes(change: str) -> None:
    old, new = load_config("dit_b"), load_config("dit_b", [change])
    key = change.partition("=")[0]
    with pytest.raises(UserError, match=f"{key} was .*, is "):
        refuse_changes(resume_differences(old, new), [key], "runs/x")
    with pytest.raises(UserError, match='stage was "vae", is "dit"'):
        refuse_changes(resume_differences(load_config("vae_base"), old), ["stage"], "runs/x")


def test_keys_that_one_version_lacks_are_asked_for() -> None:
    new = load_config("dit_b")
    old = new.model_dump(mode="json")
    old["train"] |= {"gone": 1}
    del old["optimizer"]["eps"]
    assert {d.key: d.on_resume for d in resume_differences(old, new)} == {"optimizer.eps": None, "train.gone": None}


def test_what_decides_the_weights_is_not_free() -> None:
    """Of keys that move weights none is marked free by mistake, and of the rest none is forgotten."""
    for kind in (VAERun, DiTRun):
        marks = on_resume(kind)
        assert {key for key, mark in marks.items() if mark is NEVER} == {
            "stage", "data.streams", "data.rows_per_step", "train.seed",
        }  # fmt: skip
        asked = {key for key, mark in marks.items() if mark is None}
        weights = (
            "optimizer",
            "schedule",
            "data.split",
            "model",
            "flow",
            "kl",
            "repa",
            "train.spike",
            "train.steps",
            "train.init_from",
            "train.precision",
        )
        elsewhere = {"data", "train"}
        assert {key for key in asked - elsewhere if not key.startswith(weights)} == set()
        free = {key for key, mark in marks.items() if mark is FREE}
        assert {key for key in free if key.startswith(weights)} == {"model.vae", "repa.features"} & marks.keys()


def test_a_stage_of_another_package_marks_its_own_keys() -> None:
    class Noise(Section):
        level: float = 1.0
        shown: Annotated[bool, FREE] = False

    class NoiseRun(RunConfig):
        noise: Noise = Noise()
        extra: Annotated[dict[str, Any], FREE] = Field(default_factory=dict)

    marks = on_resume(NoiseRun)
    assert [marks[key] for key in ("noise.level", "noise.shown", "extra", "stage")] == [None, FREE, FREE, NEVER]
