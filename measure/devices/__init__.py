"""Devices that points run on: the clock, memory, energy and state of each, one file a kind.

base.py    what a device offers
cpu.py     clocks of a CPU, resident memory
cuda.py    events, graphs, allocator peaks, L2 flush
nvml.py    clocks, power, energy and processes of an NVIDIA GPU; nothing is ever set
rapl.py    energy counters of a CPU
energy.py  joules of a repeated step over a window
"""

from measure.devices.names import cuda_index, is_device_name

__all__ = ["cuda_index", "is_device_name"]
