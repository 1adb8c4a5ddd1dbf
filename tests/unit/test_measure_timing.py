"""The timing protocol with a clock that does what the test says."""

import pytest

from measure.timing import Budget, Sampler


class FakeClock:
    """Seconds that pass only when something runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Work:
    """Calls that take scripted times; the last one repeats."""

    def __init__(self, clock: FakeClock, *seconds: float) -> None:
        self.clock, self.seconds, self.calls = clock, list(seconds), 0

    def __call__(self) -> None:
        self.clock.now += self.seconds[min(self.calls, len(self.seconds) - 1)]
        self.calls += 1


class FakeLoad:
    """Foreign load that is scripted per block."""

    def __init__(self, *cores: float) -> None:
        self.cores = list(cores)

    def start(self) -> None:
        pass

    def foreign_cores(self) -> float:
        return self.cores.pop(0) if len(self.cores) > 1 else self.cores[0]


@pytest.fixture
def clock():
    return FakeClock()


def sampler(clock, **changes):
    return Sampler(name="fake", clock=clock, wall=clock, **changes)


def test_warm_up_ends_when_three_calls_agree(clock):
    work = Work(clock, 0.9, 0.2, 0.1, 0.1, 0.1)
    found = sampler(clock).time(work, budget=Budget(warmup_seconds=100, max_warmups=50))
    # 0.9 0.2 0.1 0.1 0.1: the last three agree after five calls.
    assert found.warmups == 5
    assert found.first_call_s == pytest.approx(0.9)
    assert found.samples == pytest.approx([0.1] * 7)


def test_one_long_call_is_warm_up_enough(clock):
    found = sampler(clock).time(Work(clock, 2.0), budget=Budget(warmup_seconds=1.0, seconds=3.0))
    assert found.warmups == 1
    # 3 s of budget: two samples of 2 s spend it, and three are the least that count.
    assert found.statistics.n == 3


def test_sampling_stops_once_the_median_is_known(clock):
    found = sampler(clock).time(Work(clock, 0.01), budget=Budget(min_samples=7, seconds=100))
    assert found.statistics.n == 7


def test_noisy_samples_go_on_until_the_budget_is_spent(clock):
    work = Work(clock, *([0.01, 0.03] * 500))
    found = sampler(clock).time(work, budget=Budget(seconds=1.0, max_samples=1000))
    assert 48 <= found.statistics.n <= 52  # 1 s at 0.02 s on average


def test_what_puts_things_back_is_not_timed(clock):
    before = Work(clock, 5.0)
    found = sampler(clock).time(Work(clock, 0.01), before=before, budget=Budget(seconds=100))
    assert max(found.samples) == pytest.approx(0.01)
    assert before.calls == found.warmups + found.statistics.n


def test_disturbed_blocks_are_repeated_and_the_best_kept(clock):
    slept = []
    gate = sampler(
        clock, load=FakeLoad(0.9, 0.5, 0.0), block_s=0.05, sleep=slept.append, max_retries=5
    )
    found = gate.time(Work(clock, 0.01), budget=Budget(min_samples=5, max_samples=5))
    assert (found.gated, found.forced) == (2, 0)
    assert slept == [gate.pause_s] * 2


def test_a_machine_that_is_never_quiet_is_measured_anyway(clock):
    gate = sampler(clock, load=FakeLoad(0.9), block_s=0.05, sleep=lambda s: None, max_retries=2)
    found = gate.time(Work(clock, 0.01), budget=Budget(min_samples=5, max_samples=5))
    assert (found.gated, found.forced) == (2, 1)


def test_one_thread_uses_its_own_cpu_time_and_several_the_wall():
    assert Sampler.for_cpu(1).name == "thread_time"
    assert Sampler.for_cpu(1).load is None
    assert Sampler.for_cpu(2).name == "wall_gated"
    assert Sampler.for_cpu(2).load is not None
