"""The CUDA emulator: runs the kernels of csrc on the CPU, checking every access. See README.md here."""

from emulator.engine import EmulatedEngine, load

__all__ = ["EmulatedEngine", "load"]
