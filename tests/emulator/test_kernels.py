"""What only the emulator can ask of the kernels: any order of blocks, several in flight, and what they touch."""

from dataclasses import replace

import pytest
import torch

from emulator import load
from saw_int4 import reference
from saw_int4.testing.cases import DecodeCase, adversarial_rows, key_vectors, make_decode
from saw_int4.testing.compare import assert_equal, compare_decode, decode_oracle

# More tiles than blocks for some requests, so that runs are shared and merged by whichever block is last.
CASE = DecodeCase(head_dim=64, num_q_heads=6, num_kv_heads=2, seq_lens=(300, 1, 130), q_lens=(1, 1, 1), rotate_v=True)
SCHEDULES = [
    dict(order="descending"),
    *(dict(order="shuffled", seed=seed) for seed in range(3)),
    *(dict(order="shuffled", resident_blocks=n, seed=n) for n in (2, 4, 64)),
]
FEW_SCHEDULES = [*SCHEDULES[:2], SCHEDULES[-2]]


def decode(engine, inputs, **schedule):
    """(out, lse) under a block schedule."""
    lse = torch.full(inputs.q.shape[:2], float("nan"))
    engine.configure(**schedule)
    try:
        out = engine.decode_attention(*inputs.positional(), page_size=inputs.page_size, lse=lse, **inputs.options)
    finally:
        engine.configure()
    return out, lse


def check_schedules(schedules, engines, inputs, kernel, **gpu):
    """`kernel` is the last to run, and gives the same bits, near the oracle's, by every engine under every schedule."""
    solution = decode_oracle(inputs)
    first = None
    for engine in engines:
        for schedule in schedules:
            out, lse = decode(engine, inputs, **gpu, **schedule)
            assert engine.last_kernel() == kernel
            compare_decode(out, lse, inputs, solution)
            first = first or (out, lse)
            assert_equal(out, first[0], f"out with {schedule}")
            assert_equal(lse, first[1], f"lse with {schedule}")


# 40 without dependent launches: a KV head per block, two columns of blocks
@pytest.mark.parametrize("gpu", [dict(sm_count=n) for n in (1, 3, 16)] + [dict(sm_count=40, dependent_launches=False)])
def test_decode_gives_the_same_bits_in_any_block_order(emulated, gpu):
    check_schedules([{}, *SCHEDULES], [emulated], make_decode(CASE), "saw_int4_decode_kernel", **gpu)


# Few rows, and many blocks that could share a run: merged by a second launch. Two heads per block, and several pieces a
# warp; two columns; a request without query rows; passes that one of the requests does not have; what only the end of a
# row needs; a wide pass.
MERGED = {
    "two_heads": DecodeCase(num_q_heads=8, num_kv_heads=2, seq_lens=(2300,), q_lens=(1,)),
    "columns": DecodeCase(num_q_heads=12, num_kv_heads=2, seq_lens=(450,), q_lens=(1,)),
    "ragged": DecodeCase(num_q_heads=4, num_kv_heads=1, seq_lens=(300, 90, 130), q_lens=(2, 0, 1)),
    "passes": DecodeCase(head_dim=80, num_q_heads=2, num_kv_heads=1, seq_lens=(300, 300), q_lens=(5, 1), window=250),
    "end_of_row": DecodeCase(num_q_heads=6, num_kv_heads=2, seq_lens=(450,), q_lens=(1,), rotate_v=True, sink=True),
    "wide": DecodeCase(head_dim=128, num_q_heads=8, num_kv_heads=1, seq_lens=(500,), q_lens=(4,)),
    "two_groups": DecodeCase(head_dim=256, num_q_heads=8, num_kv_heads=1, seq_lens=(350,), q_lens=(1,), groups=2),
}


@pytest.mark.parametrize("name", MERGED)
def test_decode_merges_in_a_second_launch(emulated, name):
    inputs = make_decode(MERGED[name])
    check_schedules(FEW_SCHEDULES, [emulated], inputs, "saw_int4_decode_merge_kernel", sm_count=80)


@pytest.fixture(scope="module")
def emulated_other_arch():
    """The same kernels, some of them as they are compiled for other architectures than sm_90."""
    return load(other_arch=True)


# Two groups that a second launch would merge, by passes of 8 rows and of 16.
MERGED_IN_THE_KERNEL = {
    "rows_8": DecodeCase(num_q_heads=4, num_kv_heads=1, seq_lens=(700, 300), q_lens=(2, 1), groups=2),
    "rows_16": DecodeCase(num_q_heads=4, num_kv_heads=1, seq_lens=(1100, 50, 600), q_lens=(4, 3, 1), groups=2),
}


@pytest.mark.parametrize("name", MERGED_IN_THE_KERNEL)
def test_decode_merges_in_the_kernel_where_launches_do_not_overlap(emulated, emulated_other_arch, name):
    """On a GPU before sm_90: the last block of a run merges, where rows wait in registers and in shared memory."""
    inputs = make_decode(MERGED_IN_THE_KERNEL[name])
    gpu = dict(sm_count=80, shared_bytes=99 * 1024)
    decode(emulated, inputs, **gpu)
    assert emulated.last_kernel() == "saw_int4_decode_merge_kernel", "the case tests nothing"
    engines = [emulated, emulated_other_arch]
    check_schedules(FEW_SCHEDULES, engines, inputs, "saw_int4_decode_kernel", dependent_launches=False, **gpu)


def test_decode_leaves_its_counters_at_zero(emulated):
    inputs = make_decode(CASE)
    rows, heads, _ = inputs.q.shape
    workspace = torch.zeros(1 << 20, dtype=torch.uint8)
    for _ in range(2):
        emulated.decode_attention(*inputs.positional(), page_size=1, workspace=workspace, **inputs.options)
        counters = workspace[-4 * rows * heads :].view(torch.int32)
        assert counters.tolist() == [0] * (rows * heads)
        assert workspace.any(), "nothing was shared between blocks: the case tests nothing"
        workspace[: -4 * rows * heads] = 0xFF


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_decode_stops_at_a_slot_outside_the_cache(emulated, bad):
    inputs = make_decode(CASE)
    inputs.slot_table[inputs.table_rows[2], 77] = bad
    with pytest.raises(RuntimeError, match=r"saw_int4_decode_kernel, block \d+, thread .*pipeline.cuh:\d+: trap"):
        decode(emulated, inputs)


def test_a_slot_in_no_row_is_never_read(emulated):
    """make_decode fills unused table entries with 2^31 - 1; the kernel must not even look at the rows they name."""
    inputs = make_decode(replace(CASE, seq_lens=(31, 33, 64), q_lens=(1, 1, 1)))
    assert (inputs.slot_table == 2**31 - 1).any()
    decode(emulated, inputs)


def append_inputs(head_dim, heads=3, tokens=9, slots=12):
    x = adversarial_rows(tokens, heads, head_dim, torch.bfloat16)
    caches = [torch.full((slots, heads, head_dim // 2 + 4), 0xEE, dtype=torch.uint8) for _ in range(2)]
    return x, x.flip(0).contiguous(), *caches


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("heads, head_dim, tokens", [(3, 64, 411), (3, 256, 205), (3, 256, 411), (7, 256, 90)])
def test_append_of_many_rows_does_several_in_a_row(emulated, heads, head_dim, tokens, calibrated):
    """More fronts than lanes that close rows, or fewer, and a last one that is not full; heads in one column of blocks,
    and in several, not all of which are full: on an SM of its own.
    """
    k, v = (
        adversarial_rows(tokens, heads, head_dim, torch.bfloat16),
        adversarial_rows(tokens, heads, head_dim, torch.bfloat16, 1),
    )
    slots = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    slots[::7] = -1
    actual, expected = (torch.full((2, tokens, heads, head_dim // 2 + 4), 0xEE, dtype=torch.uint8) for _ in range(2))
    options = dict(rotation_order=head_dim, rotate_v=True)
    if calibrated:
        vectors = key_vectors(heads, head_dim)
        options |= dict(k_mean=vectors["mean"], k_inv_scale=vectors["inv_scale"], k_sign=vectors["sign"])
    emulated.configure(sm_count=1)
    try:
        emulated.append_kv(k, v, *actual, slots, **options)
    finally:
        emulated.configure()
    reference.append_kv(k, v, *expected, slots, **options)
    assert_equal(actual, expected)


def test_more_query_rows_than_a_plan_can_count_are_refused(emulated):
    inputs = make_decode(CASE)
    inputs.q_indptr = torch.arange(len(inputs.seq_lens) + 1, dtype=torch.int32)
    options = inputs.options | {"max_q_len": 2**30, "workspace": torch.zeros(64, dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match="max_q_len is 1073741824, expected at most"):
        emulated.decode_attention(*inputs.positional(), **options)


def test_append_stops_at_a_slot_past_the_cache(emulated):
    k, v, k_cache, v_cache = append_inputs(64)
    with pytest.raises(RuntimeError, match=r"saw_int4_append_kernel, block \d+, thread .*append_kernel.cuh:\d+: trap"):
        emulated.append_kv(k, v, k_cache, v_cache, torch.arange(9) + 4, rotation_order=64)


def test_gather_stops_at_a_slot_outside_the_cache(emulated):
    *_, k_cache, v_cache = append_inputs(64)
    out = torch.empty(2, 2, 3, 64, dtype=torch.bfloat16)
    for bad in (-1, 12):
        with pytest.raises(
            RuntimeError, match=r"saw_int4_gather_kernel, block 0, thread .*gather_kernel.cuh:\d+: trap"
        ):
            emulated.gather_kv(k_cache, v_cache, torch.tensor([0, bad], dtype=torch.int32), out[0], out[1])


@pytest.mark.parametrize("head_dim", [64, 80, 192, 256])
def test_append_reads_only_its_rows_of_a_fused_projection(emulated, head_dim):
    """K and V as slices of one qkv buffer: what lies between their rows is not registered, so not to be touched."""
    heads, tokens = 2, 5
    fused = adversarial_rows(tokens, 4 * heads, head_dim, torch.float16)
    k, v = fused[:, 2 * heads : 3 * heads], fused[:, 3 * heads :]
    vectors = key_vectors(heads, head_dim)
    options = dict(rotation_order=16, k_mean=vectors["mean"], k_inv_scale=vectors["inv_scale"], k_sign=vectors["sign"])
    slots = torch.tensor([3, 0, -1, 6, 2])
    actual, expected = (torch.full((2, 7, heads, head_dim // 2 + 4), 0xEE, dtype=torch.uint8) for _ in range(2))
    emulated.append_kv(k, v, actual[0], actual[1], slots, **options)
    reference.append_kv(k, v, expected[0], expected[1], slots, **options)
    assert_equal(actual, expected)


def test_transform_in_place(emulated):
    x = adversarial_rows(9, 4, 128, torch.bfloat16)
    expected = emulated.transform_rows(x, rotation_order=128)
    assert_equal(emulated.transform_rows(x, rotation_order=128, out=x), expected)


@pytest.mark.parametrize("head_dim", [48, 512])
def test_head_dims_without_a_kernel_are_refused(emulated, head_dim):
    k, v, k_cache, v_cache = append_inputs(head_dim)
    with pytest.raises(RuntimeError, match=f"append_kv: head_dim is {head_dim}, the CUDA kernels are built for 64, 80"):
        emulated.append_kv(k, v, k_cache, v_cache, torch.arange(9), rotation_order=1)
