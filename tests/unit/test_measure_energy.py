"""Energy windows on a clock that the test turns; counters that jump, wrap and fail."""

import pytest

from measure.devices.energy import CounterError, Unavailable, measure_energy
from measure.devices.rapl import open_rapl


class Bench:
    """A device whose step takes ``step_s`` and draws ``watts``; its counter moves every
    ``jump_s``.
    """

    method, scope = "fake", "gpu"

    def __init__(self, step_s=0.01, watts=300.0, jump_s=0.1, sensor_w=None):
        self.now = 100.0
        self.step_s, self.true_watts, self.jump_s = step_s, watts, jump_s
        self.sensor = watts if sensor_w is None else sensor_w
        self.steps = self.synchronised = 0

    def step(self):
        self.now += self.step_s
        self.steps += 1

    def synchronize(self):
        self.synchronised += 1

    def clock(self):
        return self.now

    def joules(self):
        return self.true_watts * (self.now // self.jump_s * self.jump_s)

    def watts(self):
        return self.sensor

    def measured(self, **options):
        return measure_energy(
            self.step, self, synchronize=self.synchronize, step_s=self.step_s, clock=self.clock,
            **options,
        )  # fmt: skip


def test_the_window_gives_joules_per_step():
    bench = Bench(watts=300.0)
    found = bench.measured()
    assert found.status == "ok"
    assert found.steps == bench.steps
    assert found.window_s >= 5.0
    # 300 W for 10 ms, within one jump of the counter (0.1 s of 5)
    assert found.joules_per_step() == pytest.approx(3.0, rel=0.02)
    assert found.power_j == pytest.approx(300.0 * found.window_s)
    assert bench.synchronised >= 2


def test_steps_longer_than_a_poll_run_one_at_a_time():
    found = Bench(step_s=0.5).measured()
    assert found.steps == 10


def test_few_changes_of_the_counter_are_insufficient_and_not_used():
    found = Bench(jump_s=1.0).measured()
    assert found.status == "insufficient"
    assert "20 are needed" in found.reason
    assert found.joules_per_step() is None
    assert found.joules is not None  # shown, not used


def test_a_sensor_that_disagrees_by_more_than_a_tenth_makes_both_doubtful():
    assert Bench(sensor_w=345.0).measured().status == "disagrees"
    assert Bench(sensor_w=315.0).measured().status == "ok"
    assert Bench(sensor_w=345.0).measured().joules_per_step() is None


def test_a_part_of_a_gpu_gets_no_energy_of_its_own():
    bench = Bench()
    bench.scope = "mig_parent"
    found = bench.measured()
    assert found.status == "ok"
    assert found.joules_per_step() is None


def test_a_counter_that_fails_midway_is_a_reading_that_says_so():
    bench = Bench()
    real, calls = bench.joules, []

    def fails():
        calls.append(1)
        if len(calls) > 5:
            raise CounterError("GPU is lost")
        return real()

    bench.joules = fails
    found = bench.measured()
    assert found.status == "unavailable"
    assert "GPU is lost" in found.reason
    assert found.joules is None


def test_without_a_counter_no_step_is_run():
    steps = []
    found = measure_energy(
        lambda: steps.append(1), Unavailable("no RAPL"), synchronize=lambda: None, step_s=0.1
    )
    assert (found.status, found.reason, steps) == ("unavailable", "no RAPL", [])


def zone(root, name, value, limit="1000000"):
    folder = root / name
    folder.mkdir()
    (folder / "energy_uj").write_text(value)
    (folder / "max_energy_range_uj").write_text(limit)
    return folder


def test_rapl_adds_packages_once_and_wraps(tmp_path):
    first = zone(tmp_path, "intel-rapl:0", "900000\n")
    second = zone(tmp_path, "intel-rapl:1", "100")
    zone(tmp_path, "intel-rapl:0:0", "5")  # a part of the first package
    counter = open_rapl(tmp_path)
    (first / "energy_uj").write_text("100000")  # wrapped: 100000 + 100000
    (second / "energy_uj").write_text("50100")
    assert counter.joules() == pytest.approx(0.25)
    (second / "energy_uj").write_text("60100")
    assert counter.joules() == pytest.approx(0.26)


def test_rapl_that_is_absent_or_broken_is_a_reason(tmp_path, monkeypatch):
    assert "no RAPL" in open_rapl(tmp_path).reason
    folder = zone(tmp_path, "intel-rapl:0", "not a number")
    assert "expected a number" in open_rapl(tmp_path).reason

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(folder), "read_text", refused)
    assert "permission" in open_rapl(tmp_path).reason
