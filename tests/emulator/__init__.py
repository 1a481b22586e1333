"""The CUDA emulator: runs the kernels of csrc on the CPU, checking every access. See README.md here."""
