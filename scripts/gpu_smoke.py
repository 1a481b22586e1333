"""A few small calls of every operator on a GPU, compared with the CPU, for the sanitizer: seconds, not minutes."""

import torch

from saw_int4 import ops
from saw_int4.format import row_bytes


def caches(slots: int, heads: int, head_dim: int, groups: int) -> list[torch.Tensor]:
    return [torch.zeros(slots, heads, row_bytes(head_dim, groups), dtype=torch.uint8) for _ in range(2)]


def check(head_dim: int, heads: int, group: int, lens: list[int], q_len: int, row_groups: int = 1) -> None:
    """One append, one gather and one decode, whose split pieces are merged across blocks."""
    slots = sum(lens) + 5
    k, v = (torch.randn(slots, heads, head_dim, dtype=torch.bfloat16) for _ in range(2))
    where = torch.randperm(slots)
    cpu = caches(slots, heads, head_dim, row_groups)
    gpu = [t.cuda() for t in cpu]
    ops.append_kv(k, v, *cpu, where, rotation_order=16, rotate_v=True)
    ops.append_kv(k.cuda(), v.cuda(), *gpu, where.cuda(), rotation_order=16, rotate_v=True)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(cpu, gpu)), "append_kv: bytes differ from the CPU's"

    index = torch.randint(0, slots, (19,), dtype=torch.int32)
    wide = [torch.empty(19, heads, head_dim, dtype=torch.bfloat16) for _ in range(2)]
    wide_gpu = [t.cuda() for t in wide]
    ops.gather_kv(*cpu, index, *wide)
    ops.gather_kv(*gpu, index.cuda(), *wide_gpu)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(wide, wide_gpu)), "gather_kv: values differ from the CPU's"

    table = torch.zeros(len(lens), max(lens), dtype=torch.int32)
    for row, (end, n) in enumerate(zip(torch.tensor(lens).cumsum(0).tolist(), lens)):
        table[row, :n] = where[end - n : end]
    q = torch.randn(len(lens) * q_len, heads * group, head_dim, dtype=torch.bfloat16)
    inputs = (q, *cpu, table, torch.arange(len(lens)), torch.tensor(lens))
    options = dict(sm_scale=head_dim**-0.5, max_q_len=q_len, rotation_order=16, rotate_v=True)
    expected = ops.decode_attention(*inputs, **options).float()
    found = ops.decode_attention(*(t.cuda() for t in inputs), **options).float().cpu()
    error = (found - expected).norm() / expected.norm()
    assert error < 1e-2, f"decode_attention: relative error {error:.1e} against the CPU, expected below 1e-2"


torch.manual_seed(0)
check(128, 8, 4, [700, 90], 1)  # merged by a second launch
check(128, 8, 4, [700, 90, 300, 41, 5], 1)  # by the last block of a run, as every call of many requests
check(128, 8, 4, [500, 90, 300, 41] * 2, 8)
check(64, 2, 4, [300, 33], 4)
check(128, 1, 8, [1100], 4)
check(128, 4, 4, [700, 90], 8)
check(64, 8, 1, [3300], 1)  # append gives each row a lane
check(80, 4, 1, [130, 257], 2)
check(64, 2, 4, [300, 33], 4, row_groups=2)
check(128, 8, 4, [700, 90], 1, row_groups=2)
torch.cuda.synchronize()
print("gpu_smoke: ok")
