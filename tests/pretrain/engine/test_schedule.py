"""The learning rate as a function of the step."""

from itertools import pairwise

import pytest

from data_pipeline.core.errors import UserError
from pretrain.engine.schedule import Schedule, learning_rate


def rates(schedule: Schedule, total_steps: int) -> list[float]:
    return [learning_rate(step, 2.0, schedule, total_steps) for step in range(total_steps + 3)]


def test_cosine_warms_up_decays_to_its_floor_and_stays_there():
    lr = rates(Schedule(kind="cosine", warmup_steps=4, min_ratio=0.1), 24)
    assert lr[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert lr[4] == pytest.approx(2.0)
    assert lr[14] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5)), "half way down"
    assert lr[24:] == pytest.approx([0.2] * 3)
    assert all(a >= b for a, b in pairwise(lr[4:]))


def test_constant_and_wsd():
    assert rates(Schedule(kind="constant", warmup_steps=2), 5) == pytest.approx([1.0] + [2.0] * 7)
    lr = rates(Schedule(kind="wsd", decay_steps=4), 10)
    assert lr[:7] == pytest.approx([2.0] * 7)
    assert lr[6:] == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0, 0.0, 0.0])
    assert rates(Schedule(kind="wsd"), 100)[89:92] == pytest.approx([2.0, 2.0, 1.8]), "the last tenth by default"


@pytest.mark.parametrize("kind", ["cosine", "constant", "wsd"])
def test_no_schedule_divides_by_zero(kind):
    assert rates(Schedule(kind=kind), 1)[0] == pytest.approx(2.0)
    assert rates(Schedule(kind=kind, warmup_steps=5), 3)[2] == pytest.approx(1.2)


@pytest.mark.parametrize("make", [lambda: Schedule(kind="linear"), lambda: Schedule(min_ratio=2)])
def test_values_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="validation error"):
        make()


@pytest.mark.parametrize(
    ("schedule", "steps", "remedy"),
    [
        (Schedule(warmup_steps=5000), 1000, "--set schedule.warmup_steps=500"),
        (
            Schedule(kind="wsd", warmup_steps=10, decay_steps=30),
            20,
            "--set schedule.warmup_steps=2 --set schedule.decay_steps=7",
        ),
        (Schedule(warmup_steps=3), 1, "--set schedule.warmup_steps=0"),
    ],
)
def test_a_warm_up_longer_than_the_run_is_refused_with_what_to_set(schedule: Schedule, steps: int, remedy: str) -> None:
    with pytest.raises(UserError, match=f"{remedy}$"):
        schedule.check_fits(steps)
    shorter = dict(part.removeprefix("schedule.").split("=") for part in remedy.split() if "=" in part)
    schedule.model_copy(update={name: int(value) for name, value in shorter.items()}).check_fits(steps)
