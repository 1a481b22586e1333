"""Timing that survives a busy machine: candidates take turns, and the reported figures are median and spread."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Timing:
    """Seconds per call: the best, the median, and the spread of the middle half."""

    best: float
    median: float
    spread: float


class _CpuClock:
    """Wall time, or, for one thread, the processor time that it was really given.

    Every call finds other data in the caches, as it does between two layers of a model: else whoever follows a small
    candidate would be timed warm, and whoever follows a large one cold.
    """

    def __init__(self, processor_time: bool) -> None:
        self._now = time.process_time if processor_time else time.perf_counter
        self._flush = torch.empty(2**26, dtype=torch.uint8)

    def measure(self, call: Callable[[], object]) -> float:
        self._flush.zero_()
        start = self._now()
        call()
        return self._now() - start


class _CudaClock:
    """Time between two events on the device. The L2 cache is overwritten before every call."""

    def __init__(self, device: torch.device) -> None:
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(4 * l2_bytes, dtype=torch.uint8, device=device)

    def measure(self, call: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph, so that launches cost what they cost in a server."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def time_calls(
    calls: dict[str, Callable[[], object]], device: torch.device, seconds: float = 1.0, processor_time: bool = False
) -> dict[str, Timing]:
    """Time several candidates in turns, so that a disturbance meets all of them.

    Args:
        calls: name -> function without arguments.
        seconds: to spend in all, roughly; every candidate is called at least 5 times, and at most 200.
        processor_time: on a CPU with one thread, count only the time that the process ran.
    """
    clock = _CudaClock(device) if device.type == "cuda" else _CpuClock(processor_time)
    for call in calls.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    stop = time.perf_counter() + seconds
    for _ in range(200):
        for name, call in calls.items():
            samples[name].append(clock.measure(call))
        if time.perf_counter() > stop and len(samples[name]) >= 5:
            break
    timings = {}
    for name, values in samples.items():
        low, median, high = statistics.quantiles(values, n=4)
        timings[name] = Timing(best=min(values), median=median, spread=high - low)
    return timings


def environment() -> dict[str, str]:
    """What a figure depends on: processor or GPU, threads, versions."""
    found = {"torch": torch.__version__, "python": platform.python_version()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
        return found
    models = [
        line.split(":", 1)[1].strip() for line in _cpuinfo_lines() if line.startswith(("model name", "Processor"))
    ]
    found["cpu"] = models[0] if models else platform.processor() or platform.machine()
    found["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} CPUs"
    return found


def _cpuinfo_lines() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []
