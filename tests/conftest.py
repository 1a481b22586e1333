"""The engines of the operator tests: every CPU instruction set, the emulated CUDA kernels, and a GPU if present."""

import pytest

from saw_int4.testing.engines import operator_engines

ENGINES = operator_engines()


@pytest.fixture(scope="session")
def emulated():
    """The CUDA kernels, compiled for and executed on the CPU."""
    from emulator import load

    return load()


@pytest.fixture(params=[*ENGINES, "emulated"])
def engine(request):
    """One engine after the other."""
    if request.param != "emulated":
        return ENGINES[request.param]
    if request.node.get_closest_marker("large"):
        pytest.skip("too large for the emulator")
    return request.getfixturevalue("emulated")


@pytest.fixture(params=[name for name in ENGINES if name.startswith("cpu")])
def cpu_engine(request):
    """One CPU instruction set after the other, for what only the CPU kernels do."""
    return ENGINES[request.param]
