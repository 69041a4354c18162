"""Three real hosts: one dies for good, the supervisor goes on with two; it comes back, and there are three again."""

import contextlib
import re
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from pretrain.jobs.hosts import launch_variables
from pretrain.telemetry.sinks import read_metrics
from tests.pretrain import forked_ranks, tiny_run
from tests.pretrain.made_hosts import held, kill, made_hosts, wait_for, what_is_missing

MISSING = what_is_missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]

STEPS, DIES_AFTER, BACK_AFTER = 80, 8, 15
LAUNCH_S = 600


def test_the_job_goes_on_with_two_hosts_and_takes_the_third_in_again(tmp_path: Path) -> None:
    data = tiny_run.write_data(tmp_path / "data")
    settings = {"steps": STEPS, "checkpoint_every": 5, "eval_every": 0, "zero_stage": 2}
    configs = {}
    for name in ("run", "undisturbed"):
        values = tiny_run.config_values(data, tmp_path / name, **settings)
        values["optimizer"]["lr"] = 1e-3  # what ranks add up in another order is not to grow
        configs[name] = tiny_run.write_config(tmp_path / f"{name}.json", values)
    run, log = tmp_path / "run", tmp_path / "supervise.log"
    with ExitStack() as stack:
        network = stack.enter_context(made_hosts(tmp_path / "network", count=3))
        network.environment.update(OMP_NUM_THREADS="1", XDG_CACHE_HOME=str(network.folder))
        network.environment.update(launch_variables(network.environment))
        arguments = ["--hostfile", str(network.hostfile), "--rejoin-s", "1", "--", "--config", str(configs["run"])]
        process = network.start(network.hosts[0], [sys.executable, "-m", "pretrain", "supervise", *arguments], log)
        stack.callback(process.kill)

        def last_step() -> int:
            assert process.poll() is None, log.read_text()[-6000:]
            lines = []
            with contextlib.suppress(FileNotFoundError):
                lines = read_metrics(run)
            return max((line["step"] for line in lines), default=0)

        wait_for(lambda: last_step() >= DIES_AFTER, LAUNCH_S, f"no training on three hosts: {log}")
        kill(network.hosts[2].init)
        died, trained = time.monotonic(), last_step()
        wait_for(lambda: "the job ended" in log.read_text(), LAUNCH_S, f"the job was not down: {log}")
        print(f"a host of three dead: the job is down after {time.monotonic() - died:.1f} s")
        wait_for(lambda: last_step() > trained, LAUNCH_S, f"no training on two hosts: {log}")
        print(f"training again after {time.monotonic() - died:.1f} s")
        wait_for(lambda: last_step() >= BACK_AFTER, LAUNCH_S, f"no training on two hosts: {log}")
        with held(network.hosts[:2]):
            network.boot(network.hosts[2], stack)
            wait_for(lambda: "answers again" in log.read_text(), LAUNCH_S, f"the third was not seen: {log}")
        assert process.wait(LAUNCH_S) == 0, log.read_text()[-6000:]

    said = log.read_text()
    three, two = "host1 (1), host2 (1), host3 (1)", "host1 (1), host2 (1)"
    assert re.findall(r"starting from step \d+ on (.*)", said) == [three, two, three], said[-6000:]
    assert "host3 does not answer" in said
    assert "host3 answers again" in said
    codes = forked_ranks.finish(forked_ranks.start(configs["undisturbed"], ranks=3), LAUNCH_S)
    assert codes == [0, 0, 0], configs["undisturbed"].with_suffix(".log").read_text()[-6000:]
    losses, expected = ([line["loss"] for line in read_metrics(tmp_path / name)] for name in configs)
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected, rel=1e-5)
    print(f"largest relative difference {max(abs(a / b - 1) for a, b in zip(losses, expected)):.1e}")
