"""Cases, comparison and timing, shared by tests and benchmarks."""
