"""The emulator itself: planted bugs are caught, and collectives and fragments are those of the PTX ISA manual."""

import math
from fractions import Fraction

import numpy as np
import pytest

from emulator import build

LANES = range(32)


@pytest.fixture(scope="module")
def emulator():
    return build.load_library("_emulator_selftest", (build.HERE / "selftest.cpp",))


@pytest.fixture(
    params=[("ascending", 1, 0), ("descending", 1, 0), ("shuffled", 1, 1), ("ascending", 3, 2), ("shuffled", 2, 3)],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def schedule(emulator, request):
    order, resident_blocks, seed = request.param
    emulator.configure(order=order, resident_blocks=resident_blocks, seed=seed)
    yield
    emulator.configure()


# Case -> what the error must say. A bug that shows in several ways, depending on who runs first, lists them.
PLANTED = {
    "missing_barrier": r"uninitialised shared memory|race in shared memory",
    "missing_warp_sync": r"uninitialised shared memory|race in shared memory",
    "shuffle_as_barrier": r"race in shared memory: byte \d+ is read, and was written by thread \d+",
    "overwrite_while_read": r"race in shared memory",
    "two_writers": r"race in shared memory: byte \d+ is written, and was written by thread",
    "uninitialised_shared": r"thread 40 \(warp 1, lane 8\).*uninitialised shared memory: byte 160 was never written",
    "half_initialised_shared": r"uninitialised shared memory: byte (2|130) was never written",
    "read_before_wait": r"shared read before its wait: byte (0|128) is the target of a cp.async of thread (0|32) ",
    "wait_one_group_short": r"shared read before its wait",
    "wait_without_barrier": r"uninitialised shared memory|race in shared memory",
    "refill_while_read": r"race in shared memory",
    "copy_never_waited_for": r"exits with a cp.async that was never waited for",
    "copy_source_changes": r"the source of a cp.async .* changed before its wait",
    "mma_by_half_a_warp": r"at (warp_sync|mma_m16n8k16_f16), with lanes (0-15|16-31) waiting at (warp|mma)",
    "global_read_out_of_bounds": r"thread 63 .*global read of 4 bytes out of bounds: .*768 bytes into in of 768 bytes",
    "global_write_out_of_bounds": r"thread 0 .*global write of 4 bytes out of bounds: .*4 bytes before out",
    "shared_out_of_bounds": r"shared write of 4 bytes out of bounds: offset 512 of 512 bytes",
    "misaligned_global": r"thread 9 .*misaligned global read of 16 bytes",
    "misaligned_shared": r"misaligned shared write of 8 bytes at offset (4|260),",
    "half_warp_barrier": r"exits with lanes 0-15 of its warp waiting here at block_sync",
    "one_warp_skips_barrier": r"warp \d exits with other warps of its block waiting here|block_sync after lanes 0-31",
    "warps_at_different_barriers": r"divergent barrier: warp \d is here, with other warps waiting at",
    "exit_before_barrier": r"thread 5 .*exits with lanes 0-4 of its warp waiting|after lane 5 .*exited",
    "exit_before_shuffle": r"thread 63 .*exits with lanes 0-30 of its warp waiting here at shfl_idx",
    "divergent_shuffle": r"divergence: lane \d+ is at shfl_xor, with lane \d+ waiting at shfl_xor",
    "write_to_read_only": r"global write of in, which the kernel may not write",
    "read_of_output": r"global read of out, which the kernel may not read",
    "read_only_path_of_written": r"read-only path of memory that this launch writes",
    "missing_barrier_global": r"race in global memory: .* with no barrier in between|has not written",
    "relaxed_count": r"race in global memory: .*; no atomic_add_acq_rel_u32 of the same word there, then here",
    "missing_barrier_before_count": r"race in global memory: .*; no atomic_add_acq_rel_u32 of the same word there",
    "write_after_count": r"race in global memory: .*thread 0 .*; no atomic_add_acq_rel_u32 of the same word there",
    "read_before_launch_ended": r"read of byte \d+ of workspace, which the launch before writes, without wait_for",
    "read_only_path_after_launch_ended": r"byte \d+ of workspace, .* before writes, through the read-only path",
    "write_before_launch_ended": r"global write of out without wait_for_launch_before",
    "atomic_before_launch_ended": r"global atomic of workspace without wait_for_launch_before",
    "exit_before_launch_ended": r"thread 7 .*exits without wait_for_launch_before",
    "stale_workspace": r"thread 7 .*read of byte \d+ of workspace, which this launch has not written",
    "traps": r"block 1, thread 33 \(warp 1, lane 1\).*trap",
}
THREADS, BLOCKS = 64, 3


def expected_output(name):
    values = np.arange(BLOCKS * THREADS).reshape(BLOCKS, THREADS) + 1000
    if name in ("missing_barrier", "wait_without_barrier", "refill_while_read", "missing_barrier_global"):
        values = np.roll(values, -32, axis=1)
    if name in ("missing_warp_sync", "shuffle_as_barrier"):
        values = values[:, np.arange(THREADS) ^ 1]
    return values.reshape(-1).tolist()


def test_every_case_is_listed(emulator):
    assert sorted(PLANTED) == emulator.case_names()


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_planted_bug_is_caught(emulator, schedule, name):
    with pytest.raises(emulator.EmulatorError, match=PLANTED[name]) as caught:
        emulator.run(name, True)
    assert str(caught.value).startswith(f"{name}, block ")
    if name != "exit_before_launch_ended":  # of what a thread has not done there is no line
        assert "tests/emulator/selftest.cpp:" in str(caught.value)


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_right_kernel_runs(emulator, schedule, name):
    assert emulator.run(name, False) == expected_output(name)


def test_a_failed_launch_leaves_the_emulator_usable(emulator):
    with pytest.raises(emulator.EmulatorError):
        emulator.run("read_before_wait", True)
    assert emulator.run("read_before_wait", False) == expected_output("read_before_wait")


def test_unknown_order_is_refused(emulator):
    with pytest.raises(emulator.EmulatorError, match="block order is sideways, expected ascending"):
        emulator.configure(order="sideways")


# Fragments, as "Matrix Fragments for mma.m16n8k16 with floating point type" of the PTX ISA manual states them:
# groupID = %laneid >> 2, threadID_in_group = %laneid % 4, element i of the fragment.
def a_position(lane, i):
    row = lane >> 2 if i in (0, 1, 4, 5) else (lane >> 2) + 8
    column = (lane % 4) * 2 + (i & 1) if i < 4 else (lane % 4) * 2 + (i & 1) + 8
    return row, column


def b_position(lane, i):
    row = (lane % 4) * 2 + (i & 1) if i < 2 else (lane % 4) * 2 + (i & 1) + 8
    return row, lane >> 2


def c_position(lane, i):
    return (lane >> 2 if i < 2 else (lane >> 2) + 8), (lane % 4) * 2 + (i & 1)


def bits16(values, bf16):
    """Exactly representable float32 values as 16-bit patterns."""
    if bf16:
        return values.astype(np.float32).view(np.uint32) >> 16
    return values.astype(np.float16).view(np.uint16).astype(np.uint32)


def run_mma(emulator, a, b, c, bf16, lane_map=lambda lane: lane):
    """Hand out fragments, run one warp, collect D."""
    a_bits, b_bits = bits16(a, bf16), bits16(b, bf16)
    c_bits = c.astype(np.float32).view(np.uint32)
    words = []
    for lane in LANES:
        source = lane_map(lane)
        halves = [a_bits[a_position(source, i)] for i in range(8)] + [b_bits[b_position(lane, i)] for i in range(4)]
        words += [int(lo) | int(hi) << 16 for lo, hi in zip(halves[::2], halves[1::2])]
        words += [int(c_bits[c_position(lane, i)]) for i in range(4)]
    result = np.array(emulator.mma(words, bf16), np.uint32).view(np.float32).reshape(32, 4)
    d = np.full((16, 8), np.nan, np.float32)
    for lane in LANES:
        for i in range(4):
            d[c_position(lane, i)] = result[lane, i]
    return d


@pytest.mark.parametrize("bf16", [False, True], ids=["f16", "bf16"])
def test_mma_is_the_matrix_product(emulator, bf16):
    rng = np.random.default_rng(0)
    for _ in range(20):
        a = rng.integers(-100, 100, (16, 16)).astype(np.float32) / 16
        b = rng.integers(0, 16, (16, 8)).astype(np.float32)
        c = rng.integers(-1000, 1000, (16, 8)).astype(np.float32)
        np.testing.assert_array_equal(run_mma(emulator, a, b, c, bf16), a @ b + c)


@pytest.mark.parametrize("bf16", [False, True], ids=["f16", "bf16"])
def test_mma_sees_each_element_alone(emulator, bf16):
    """A one at one place of A meets exactly one row of B: nothing is swapped in pairs that cancel."""
    b = np.arange(1, 129, dtype=np.float32).reshape(16, 8)
    for row in range(16):
        for column in range(16):
            a = np.zeros((16, 16), np.float32)
            a[row, column] = 1
            expected = np.zeros((16, 8), np.float32)
            expected[row] = b[column]
            np.testing.assert_array_equal(run_mma(emulator, a, b, np.zeros((16, 8)), bf16), expected)


@pytest.mark.parametrize("swapped", [(0, 1), (3, 4), (0, 16), (30, 31)])
def test_wrong_fragment_lane_changes_the_product(emulator, swapped):
    rng = np.random.default_rng(1)
    a, b = rng.integers(1, 50, (16, 16)).astype(np.float32), rng.integers(1, 16, (16, 8)).astype(np.float32)
    other = dict([swapped, swapped[::-1]])
    d = run_mma(emulator, a, b, np.zeros((16, 8)), False, lambda lane: other.get(lane, lane))
    assert not np.array_equal(d, a @ b)


def truncate(value, unit):
    return math.trunc(Fraction(value) / unit) * unit


def truncated_product(c, a, b):
    """The accumulator of fragments.h, in exact arithmetic."""
    for k in range(0, 16, 8):
        terms = [Fraction(float(c))] + [Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a[k : k + 8], b[k:])]
        exponent = max(math.frexp(abs(term))[1] for term in terms)
        total = sum(truncate(term, Fraction(2) ** (exponent - 24)) for term in terms)
        if total:
            total = truncate(total, Fraction(2) ** (math.frexp(abs(total))[1] - 24))
        c = np.float32(float(total))
        assert Fraction(float(c)) == total
    return c


def test_mma_accumulates_no_better_than_hardware(emulator):
    rng = np.random.default_rng(3)
    for scale in (1.0, 3e-3, 1e4):
        a = (rng.standard_normal((16, 16)) * np.exp(rng.standard_normal((16, 16)) * 3)).astype(np.float16)
        b = (rng.standard_normal((16, 8)) * np.exp(rng.standard_normal((16, 8)) * 3)).astype(np.float16)
        c = (rng.standard_normal((16, 8)) * scale).astype(np.float32)
        d = run_mma(emulator, a.astype(np.float32), b.astype(np.float32), c, False)
        for row in range(16):
            for column in range(8):
                assert d[row, column] == truncated_product(c[row, column], a[row], b[:, column]), (row, column)


def measured_tiles():
    """(fragments, whether they are bf16, what an H100 made of them) of h100_mma.txt."""
    lines = [line for line in (build.HERE / "h100_mma.txt").read_text().splitlines() if not line.startswith("#")]
    rows = [[int(word, 16) for word in line.split()] for line in lines]
    return [(rows[i], bf16, rows[i + 1 + bf16]) for i in range(0, len(rows), 3) for bf16 in (False, True)]


def unpack(words, bf16):
    """Fragments of one tile as float64 matrices A, B, C."""
    lanes = np.array(words, np.uint32).reshape(32, 10)
    pairs = np.stack([lanes[:, :6] & 0xFFFF, lanes[:, :6] >> 16], -1).reshape(32, 12)
    halves = (pairs << 16).view(np.float32) if bf16 else pairs.astype(np.uint16).view(np.float16)
    floats = np.ascontiguousarray(lanes[:, 6:]).view(np.float32)
    a, b, c = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for lane in LANES:
        for i in range(8):
            a[a_position(lane, i)] = halves[lane, i]
        for i in range(4):
            b[b_position(lane, i)] = halves[lane, 8 + i]
            c[c_position(lane, i)] = floats[lane, i]
    return a, b, c


def exponents(x):
    return np.where(x != 0, np.frexp(x)[1], -9999)


def h100_sums(a, b, c):
    """All 16 products and C, aligned to the largest exponent, two bits kept below fp32's, cut; the sum cut to fp32."""
    terms = np.concatenate([a[:, :, None] * b[None], c[:, None]], axis=1)
    of_products = exponents(a)[:, :, None] + exponents(b)[None] - 1
    largest = np.maximum(of_products.max(axis=1), exponents(c))
    unit = np.ldexp(1.0, largest - 26)
    total = (np.trunc(terms / unit[:, None]) * unit[:, None]).sum(axis=1)
    unit = np.ldexp(1.0, exponents(total) - 24)
    return np.trunc(total / unit) * unit


@pytest.mark.parametrize("tile", range(8))
def test_mma_agrees_with_an_h100(emulator, tile):
    """The layout is the hardware's, and the emulated sum is within its own coarser cut of the measured one."""
    words, bf16, measured = measured_tiles()[tile]
    hardware = np.array(measured, np.uint32).view(np.float32)
    a, b, c = unpack(words, bf16)
    d = np.zeros((16, 8))
    for lane in LANES:
        for i in range(4):
            d[c_position(lane, i)] = hardware[4 * lane + i]
    np.testing.assert_array_equal(h100_sums(a, b, c), d)
    got = np.array(emulator.mma(words, bf16), np.uint32).view(np.float32)
    largest = np.maximum(np.abs(a[:, :, None] * b[None]).max(axis=1), np.abs(c))
    bound = np.zeros(128)
    for lane in LANES:
        for i in range(4):
            bound[4 * lane + i] = (
                24 * 2.0**-23 * largest[c_position(lane, i)]
            )  # 18 cuts here, 18 a quarter as large there
    assert (np.abs(got.astype(np.float64) - hardware) <= bound).all()


def test_half_fma_rounds_once(emulator):
    rng = np.random.default_rng(4)
    bits = rng.integers(0, 65536, (3, 20000)).astype(np.uint16)
    # Also products near a tie with an addend of another magnitude, where rounding twice would differ.
    bits[:, :4000] = (bits[:, :4000] & 0x83FF) | rng.integers(10, 20, (3, 4000)).astype(np.uint16) << 10
    values = bits.view(np.float16)
    keep = np.isfinite(values).all(axis=0)
    for a, b, c, pattern in zip(*values[:, keep], bits[:, keep].T):
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        got = np.uint16(emulator.half_fma(*map(int, pattern))).view(np.float16)
        if abs(exact) >= 65520:
            assert np.isinf(got) and (got > 0) == (exact > 0)
            continue
        below, above = np.nextafter(got, np.float16(-np.inf)), np.nextafter(got, np.float16(np.inf))
        error = abs(Fraction(float(got)) - exact)
        for other in (below, above):
            if np.isfinite(other):
                distance = abs(Fraction(float(other)) - exact)
                assert error < distance or (error == distance and got.view(np.uint16) % 2 == 0), (a, b, c, got)


def test_mma_carries_nan_and_infinity(emulator):
    a = np.zeros((16, 16), np.float32)
    a[2, 3], a[5, 6] = np.nan, np.inf
    d = run_mma(emulator, a, np.ones((16, 8), np.float32), np.zeros((16, 8)), True)
    assert np.isnan(d[2]).all() and np.isposinf(d[5]).all() and np.isfinite(np.delete(d, [2, 5], axis=0)).all()


def test_mma_aligns_subnormals_as_the_smallest_normal_number(emulator):
    a, b = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
    a[0, 0], b[0] = 2.0**-24, 1.0  # alone it is exact
    assert (run_mma(emulator, a, b, np.zeros((16, 8)), False)[0] == 2.0**-24).all()
    a[0, 1], b[1] = 2.0**-14, 2.0**-24  # a bit that fp32 has room for, but 2^-24 below the smallest normal product
    assert (run_mma(emulator, a, b, np.zeros((16, 8)), False)[0] == 2.0**-24).all()


def test_movmatrix_transposes(emulator):
    matrix = np.arange(64, dtype=np.uint32).reshape(8, 8) * 1000 % 65521

    def fragment(m):  # lane l holds elements 2*(l%4), 2*(l%4)+1 of row l/4
        return [int(m[lane // 4, lane % 4 * 2]) | int(m[lane // 4, lane % 4 * 2 + 1]) << 16 for lane in LANES]

    assert emulator.movmatrix(fragment(matrix)) == fragment(matrix.T)


def test_st_matrices_leaves_rows_side_by_side(emulator):
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8) * 251
    fragments = matrices.view(np.uint32).reshape(4, 32).T  # lane l holds elements 2*(l%4), 2*(l%4)+1 of row l/4 of each
    stored = emulator.st_matrices([int(x) for x in fragments.reshape(-1)])
    np.testing.assert_array_equal(np.array(stored, np.uint32).view(np.uint16), matrices.reshape(-1))


def run_shared_mma(emulator, a, b, c, rows_of_b, bug=0):
    """B in shared memory: 2 x 4 matrices, each eight runs of eight values; one warp; D."""
    a_bits, b_bits = bits16(a, False), bits16(b, False)
    c_bits = c.astype(np.float32).view(np.uint32)
    words = []
    for lane in LANES:
        halves = [a_bits[a_position(lane, i)] for i in range(8)]
        words += [int(lo) | int(hi) << 16 for lo, hi in zip(halves[::2], halves[1::2])]
        for nt in range(4):
            words += [int(c_bits[row, 8 * nt + column]) for row, column in (c_position(lane, i) for i in range(4))]
    for k in range(0, 16, 8):
        for n in range(0, 32, 8):
            matrix = b_bits[k : k + 8, n : n + 8]
            runs = (matrix if rows_of_b else matrix.T).reshape(-1)
            words += [int(lo) | int(hi) << 16 for lo, hi in zip(runs[::2], runs[1::2])]
    result = np.array(emulator.shared_mma(words, rows_of_b, bug), np.uint32).view(np.float32).reshape(32, 4, 4)
    d = np.full((16, 32), np.nan, np.float32)
    for lane in LANES:
        for nt in range(4):
            for i in range(4):
                row, column = c_position(lane, i)
                d[row, 8 * nt + column] = result[lane, nt, i]
    return d


def small_matrices(seed):
    rng = np.random.default_rng(seed)
    shapes = ((-100, (16, 16)), (0, (16, 32)), (-1000, (16, 32)))
    return [rng.integers(low, 100, shape).astype(np.float32) for low, shape in shapes]


FIRST = 7  # of what bug may be: none, but sums that begin with shared_mma_first


@pytest.mark.parametrize("rows_of_b", [False, True])
def test_shared_mma_is_the_matrix_product(emulator, rows_of_b):
    for seed in range(5):
        a, b, c = small_matrices(seed)
        np.testing.assert_array_equal(run_shared_mma(emulator, a, b, c, rows_of_b), a @ b + c)
        np.testing.assert_array_equal(run_shared_mma(emulator, a, b, c, rows_of_b, FIRST), a @ b)
        assert not np.array_equal(run_shared_mma(emulator, a, b.reshape(2, 8, 4, 8).swapaxes(1, 3).reshape(16, 32), c,
                                                 rows_of_b), a @ b + c)  # fmt: skip


@pytest.mark.parametrize(
    "bug, complaint",
    [
        (1, r"shared_mma reads byte \d+, which thread \d+ .* has not published"),
        (2, r"shared_mma_end before a shared_mma was waited for"),
        (3, r"an operand of shared_mma changed before its wait"),
        (5, r"shared_mma of sums without shared_mma_start"),
        (6, r"thread exits with a shared_mma that was never waited for"),
    ],
)
def test_misuse_of_shared_mma_is_caught(emulator, bug, complaint):
    with pytest.raises(emulator.EmulatorError, match=complaint):
        run_shared_mma(emulator, *small_matrices(0), True, bug)


def test_sums_of_shared_mma_are_out_of_sight_until_its_end(emulator):
    d = run_shared_mma(emulator, *small_matrices(0), True, 4)
    assert np.isnan(d[8:, 8:16:2]).all() and np.isnan(d).sum() == 32  # register 2 of n-tile 1, of every lane


def test_four_warps_multiply_by_one_b(emulator):
    assert emulator.four_warps_multiply([0] * 128, False) == [0] * 128
    with pytest.raises(emulator.EmulatorError, match="shared_mma of different B in the lanes of four warps"):
        emulator.four_warps_multiply([0] * 128, True)


def test_barrier_and_vote_of_four_warps(emulator):
    values = list(range(256))
    handed, voted = np.array(emulator.four_warps(values, 0), np.uint32).reshape(256, 2).T
    assert handed.tolist() == np.roll(np.arange(256).reshape(2, 128), -32, axis=1).reshape(-1).tolist()
    assert voted.tolist() == [1] * 128 + [0] * 128
    for planted, complaint in (
        (1, "race in shared memory|uninitialised shared memory"),
        (2, "race in shared memory|uninitialised shared memory"),
        (3, "warp 6.*exited|deadlock"),
        (4, "divergent barrier: warp 1 is here|divergent barrier: warp 2 is here"),
    ):
        with pytest.raises(emulator.EmulatorError, match=complaint):
            emulator.four_warps(values, planted)


def test_shuffles_and_votes(emulator):
    values = list(range(10, 74))
    rows = np.array(emulator.collectives(values), np.uint32).reshape(64, 7)
    for thread, row in enumerate(rows):
        warp, lane = divmod(thread, 32)
        first = 10 + 32 * warp
        assert row.tolist() == [
            first + (lane ^ 5),
            first + (lane - 3 if lane >= 3 else lane),
            first + lane * 7 % 32,
            int(warp == 0),  # 40 is among the values of warp 0
            0,
            warp,
            (10, 11)[warp],  # multiples of 3
        ]


def test_every_fp16_pattern_to_float(emulator):
    patterns = np.arange(65536, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        expected = patterns.view(np.float16).astype(np.float32)
    got = np.array([emulator.half_to_float(int(bits)) for bits in patterns], np.float32)
    np.testing.assert_array_equal(got, expected)
    zeros = expected == 0
    np.testing.assert_array_equal(np.signbit(got[zeros]), np.signbit(expected[zeros]))


def adversarial_floats():
    """Every fp16 value, the midpoints between neighbours, and their neighbours in fp32, both signs; random bits."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = ((halves[1:].astype(np.float64) + halves[:-1]) / 2).astype(np.float32)
    edges = np.concatenate([middles, [65519.996, 65520.0, 65536.0, np.inf, 1e-45, 1e-30]]).astype(np.float32)
    random = np.random.default_rng(2).integers(0, 2**32, 20000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    near = [np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(np.inf))]
    values = np.concatenate([halves[::7], edges[::5], near[0][::5], near[1][::5], edges[-10:], random])
    values = values[~np.isnan(values)]
    return np.concatenate([values, -values])


def test_float_to_fp16_rounds_to_nearest_even(emulator):
    values = adversarial_floats()
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    got = np.array([emulator.float_to_half(float(x)) for x in values], np.uint16)
    np.testing.assert_array_equal(got, expected)


def test_float_to_bf16_rounds_to_nearest_even(emulator):
    import torch

    values = adversarial_floats()
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    got = np.array([emulator.float_to_bf16(float(x)) for x in values], np.uint16)
    np.testing.assert_array_equal(got, expected)


def test_nan_becomes_the_canonical_one(emulator):
    assert emulator.float_to_half(float("nan")) == 0x7FFF
    assert emulator.float_to_bf16(float("nan")) == 0x7FFF


@pytest.mark.parametrize(
    ("selector", "expected"),
    [(0x3210, 0x44332211), (0x7654, 0x88776655), (0x5140, 0x66225511), (0x0123, 0x11223344), (0x8C8C, 0x00FF00FF)],
)
def test_prmt(emulator, selector, expected):
    # Bytes 0..3 come from a, 4..7 from b; bit 3 of a selector nibble replicates the byte's sign. 0x85 is negative.
    b = 0x88776685 if selector == 0x8C8C else 0x88776655
    assert emulator.prmt(0x44332211, b, selector) == expected


def test_dot_of_bytes(emulator):
    assert emulator.dot_u8x4(0xFF020304, 0xFF0A0B0C, 5) == 255 * 255 + 2 * 10 + 3 * 11 + 4 * 12 + 5
    assert emulator.dot_s8x4(0x80020304, 0x800AF50C, 5) == 128 * 128 + 2 * 10 - 3 * 11 + 4 * 12 + 5


def test_largest_of_three(emulator):
    assert emulator.max3_signed(-3, -1, -2) == -1
    assert emulator.max3_unsigned(2**31, 5, 2**31 + 1) == 2**31 + 1


def test_minimum_and_maximum(emulator):
    nan = float("nan")
    assert (emulator.fmin(1.0, 2.0), emulator.fmax(1.0, 2.0)) == (1.0, 2.0)
    assert (emulator.fmin(nan, 2.0), emulator.fmax(1.0, nan)) == (2.0, 1.0)
    assert math.isnan(emulator.fmin_nan(nan, 2.0)) and math.isnan(emulator.fmax_nan(1.0, nan))
    for pair in ((0.0, -0.0), (-0.0, 0.0)):
        for low, high in ((emulator.fmin, emulator.fmax), (emulator.fmin_nan, emulator.fmax_nan)):
            assert (math.copysign(1, low(*pair)), math.copysign(1, high(*pair))) == (-1, 1)
