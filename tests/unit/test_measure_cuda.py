"""The CUDA device against a stand-in for torch.cuda that keeps its own time; then, where there is
a GPU, against the real one.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from fake_nvml import FakeNvml

from costmodel.errors import ConfigError, MissingExtraError
from measure.devices import cuda as cuda_module
from measure.devices.cuda import CudaDevice, EventStopwatch
from measure.devices.energy import Unavailable
from measure.devices.nvml import open_nvml
from measure.devices.open import open_device
from measure.timing import Budget


class FakeCuda:
    """GPU time moves with ``launch``; the host's with ``host``."""

    def __init__(self, available=True):
        self.available = available
        self.gpu_s = self.host_s = 0.0
        self.synchronised = 0
        self.fails_capture = self.current = None
        self.replays = 0
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = fake.gpu_s

            def synchronize(self):
                fake.synchronised += 1

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3  # milliseconds, as torch has it

        class Graph:
            def replay(self):
                fake.replays += 1
                fake.gpu_s += 0.002

        self.Event, self.CUDAGraph = Event, Graph

    def launch(self, gpu_s, host_s):
        self.gpu_s += gpu_s
        self.host_s += host_s

    def is_available(self):
        return self.available

    def device_count(self):
        return 2

    def set_device(self, index):
        self.index = index

    def synchronize(self):
        self.synchronised += 1

    def get_device_properties(self, index):
        return SimpleNamespace(L2_cache_size=100, uuid="aaaa-1", pci_domain_id=0, pci_bus_id=1,
                               pci_device_id=0)  # fmt: skip

    def reset_peak_memory_stats(self):
        pass

    def max_memory_allocated(self):
        return 5_000

    def max_memory_reserved(self):
        return 8_000

    def memory_reserved(self):
        return 8_000

    def memory_allocated(self):
        return 4_000

    def mem_get_info(self):
        return 10_000, 20_000

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    def current_stream(self):
        return self.current or SimpleNamespace(wait_stream=lambda other: None, usual=True)

    def stream(self, _):
        return contextlib.nullcontext()

    def set_stream(self, stream):
        self.current = stream

    @contextlib.contextmanager
    def graph(self, graph, stream):
        self.current = stream
        yield
        if self.fails_capture:  # as torch 2.13: the stream stays current
            raise RuntimeError(self.fails_capture)
        self.current = None


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(cuda_module, "_USED_BEFORE", {})
    monkeypatch.setattr(cuda_module.time, "perf_counter", lambda: 0.0)
    return FakeCuda()


def device(fake, **nvml):
    return CudaDevice("cuda:1", fake, open_nvml("aaaa-1", FakeNvml(**nvml)))


def test_time_is_the_gpus_and_the_hosts_stands_beside_it(fake):
    stopwatch = EventStopwatch(fake, host=lambda: fake.host_s)
    found = stopwatch(lambda: fake.launch(0.004, 0.001))
    assert found == (pytest.approx(0.004), pytest.approx(0.001))
    assert fake.synchronised >= 2  # before: an idle GPU; after: the events are read when done


def test_a_sampler_takes_its_samples_from_events(fake):
    opened = device(fake)
    durations = iter([9.0, *[2.0] * 50])
    found = opened.sampler().time(
        lambda: fake.launch(next(durations), 0.5), budget=Budget(min_samples=5, max_samples=5)
    )
    assert found.timer == "cuda_events"
    assert found.first_call_s == pytest.approx(9.0)
    assert found.statistics.median_s == pytest.approx(2.0)
    assert len(found.host_samples) == 5


def test_small_work_is_flushed_and_large_work_flushes_itself(fake, monkeypatch):
    opened = device(fake)
    monkeypatch.setattr(cuda_module.torch, "empty", lambda n, **_: torch.ones(n))
    flush = opened.flush(working_set_bytes=399)
    flush()
    assert opened._flushed.sum() == 0
    assert opened._flushed.numel() == 200  # twice the L2 cache
    assert opened.flush(working_set_bytes=400) is None


def test_peaks_tell_tensors_segments_and_the_drivers_figure_apart(fake):
    peaks = device(fake).peaks()
    assert (peaks.allocated, peaks.reserved, peaks.in_use) == (5_000, 8_000, 29)
    blind = CudaDevice("cuda:1", fake, Unavailable("no permission"))
    peaks = blind.peaks()
    assert (peaks.allocated, peaks.in_use, peaks.overhead) == (5_000, None, None)
    assert blind.available_bytes() == 14_000


def test_a_graph_is_replayed_or_says_why_not(fake):
    opened = device(fake)
    calls = []
    captured = opened.capture(lambda: calls.append("call"), lambda: calls.append("before"))
    assert captured.reason == ""
    assert calls.count("call") == 4  # three to warm up, one captured
    replays = fake.replays
    captured.replay()
    assert fake.replays == replays + 1
    fake.fails_capture = "operation not permitted when stream is capturing\nmore"
    captured = opened.capture(lambda: None, lambda: None)
    assert captured.replay is None
    assert captured.reason == "operation not permitted when stream is capturing"
    assert fake.current.usual  # the next point does not run on the capture's stream


def test_throttling_and_other_users_are_warnings(fake):
    module = FakeNvml()
    opened = CudaDevice("cuda:1", fake, open_nvml("aaaa-1", module))
    opened.start_watching()
    module.events = 0x4 | 0x40
    module.processes = [*module.processes, *module.processes]
    found, warnings = opened.watched()
    assert found["slowed_by"] == ["hw_thermal_slowdown", "sw_power_cap"]
    assert found["other_gpu_processes"] == 1
    assert found["gpu"]["before"]["event_reasons"] == ["gpu_idle"]
    assert len(warnings) == 2


def test_without_nvml_the_point_runs_and_says_so(fake):
    opened = CudaDevice("cuda:1", fake, Unavailable("NVML: Insufficient Permissions"))
    opened.start_watching()
    found, warnings = opened.watched()
    assert found == {"gpu": None, "gpu_reason": "NVML: Insufficient Permissions"}
    assert warnings == []
    assert isinstance(opened.energy_source(), Unavailable)


def test_without_a_device_nothing_of_cuda_is_called():
    with pytest.raises(MissingExtraError, match="finds no CUDA device"):
        CudaDevice("cuda:0", FakeCuda(available=False))
    with pytest.raises(MissingExtraError, match="2 CUDA devices"):
        CudaDevice("cuda:2", FakeCuda())
    with pytest.raises(ConfigError, match="expected cpu or cuda"):
        open_device("tpu")


@pytest.mark.gpu
def test_events_measure_a_real_product():
    opened = open_device("cuda:0")
    a = torch.ones(4096, 4096, dtype=torch.bfloat16, device=opened.device)
    found = opened.sampler().time(lambda: torch.mm(a, a))
    # 1.4e11 FLOPs: between 2.5 PFLOP/s and 5 TFLOP/s
    assert 5e-5 < found.statistics.median_s < 3e-2


@pytest.mark.gpu
def test_a_real_graph_replays_and_a_wait_cannot_be_captured():
    opened = open_device("cuda:0")
    x = torch.zeros(1, device=opened.device)
    captured = opened.capture(lambda: x.add_(1), lambda: x.zero_())
    assert captured.replay is not None
    x.zero_()
    captured.replay()
    assert x.item() == 1.0
    refused = opened.capture(lambda: x.item(), lambda: None)
    assert refused.replay is None
    assert refused.reason


@pytest.mark.gpu
def test_real_peaks_hold_what_was_allocated():
    opened = open_device("cuda:0")
    opened.start_peaks()
    before = opened.peaks().allocated
    block = torch.empty(2**28, dtype=torch.int8, device=opened.device)
    del block
    assert opened.peaks().allocated - before == pytest.approx(2**28, rel=0.01)
