#!/usr/bin/env python3
"""Speed of the operators, one line per shape: time, TB/s of the operator's own bytes, multiples of what it replaces.

    scripts/bench_kernels.py --op decode                     # on a GPU if there is one, else on the CPU
    scripts/bench_kernels.py --op decode --device cpu --threads 1 --json decode.json

decode is compared with BF16 attention: PyTorch's scaled_dot_product_attention over contiguous K and V, and SGLang's
own backend for the device over the same shuffled pages (torch_native on a CPU) and FlashInfer, where they are
installed. append and gather are compared with copying as many bytes, and append with a BF16 store to the same slots.
Candidates take turns within a line. On a CPU with --threads 1 the time is processor time, which a busy machine does not
disturb. On a GPU every candidate is a CUDA graph of calls over as many different caches as L2 cannot hold.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from saw_int4 import _C, ops  # noqa: E402
from saw_int4.format import default_rotation_order, row_bytes  # noqa: E402
from saw_int4.testing.timing import Timing, captured, environment, time_calls  # noqa: E402
from saw_int4.torchvision_compat import define_missing_operators  # noqa: E402

DECODE_BATCHES = {"cpu": (1, 8), "cuda": (1, 8, 64, 256)}
DECODE_CONTEXTS = {"cpu": (128, 1024, 4096, 16384), "cuda": (1024, 4096, 16384, 65536)}
ROTATED_BYTES = 3 * 10**8  # on a GPU, of the INT4 or BF16 caches that the calls of a line go through
TOKENS = {"cpu": (1, 64, 2048), "cuda": (1, 64, 2048, 16384)}


def copy_bandwidth(device: torch.device, processor_time: bool) -> float:
    """Bytes per second, read and written, of a large copy."""
    nbytes = 2**30 if device.type == "cuda" else 2**27
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # On a GPU a copy kernel may beat the runtime's copy; the better one is the yardstick.
    near, far = source.view(torch.float32), target.view(torch.float32)
    calls = {"copy": lambda: target.copy_(source), "kernel": lambda: torch.add(near, 1.0, out=far)}
    return 2 * nbytes / min(t.best for t in time_calls(calls, device, 1.0, processor_time).values())


def shuffled_pages(batch: int, context: int, page_size: int, device: torch.device) -> torch.Tensor:
    """int32 ``[batch, context]``: every request's slots, page by page in no order."""
    pages = torch.randperm(batch * context // page_size, device=device)[:, None] * page_size
    return (pages + torch.arange(page_size, device=device)).view(batch, context).to(torch.int32)


def torch_native_decode(q, k, v, table, rows, lens, scale):
    """SGLang's CPU decode over 16-bit pages, or None where SGLang is not installed."""
    define_missing_operators()
    try:
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    except ImportError:
        return None
    backend = TorchNativeAttnBackend.__new__(TorchNativeAttnBackend)  # its decode needs none of the engine's state
    out = torch.empty_like(q)
    return lambda: backend._run_sdpa_forward_decode(q, out, k, v, table, rows, lens, scaling=scale, enable_gqa=True)


def triton_decode(q, k, v, table, lens, scale):
    """SGLang's Triton decode over 16-bit pages, split as its backend does, or None where SGLang is not installed."""
    try:
        import triton
        from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
        from sglang.kernels.ops.attention.metadata import get_num_kv_splits_triton
    except ImportError:
        return None
    batch, heads, head_dim = q.shape
    most = 8  # --triton-attention-num-kv-splits
    indptr = torch.arange(batch + 1, device=q.device, dtype=torch.int32) * table.shape[1]
    out, lse = torch.empty_like(q), torch.empty(batch, heads, most, device=q.device)
    acc = torch.empty(batch, heads, most, head_dim, device=q.device)
    splits = torch.empty(batch, dtype=torch.int32, device=q.device)
    sms = torch.cuda.get_device_properties(q.device).multi_processor_count
    get_num_kv_splits_triton[(1,)](
        splits, lens, batch, 1, heads, k.shape[1], most, sms, MAX_NUM_SEQ=max(256, triton.next_power_of_2(batch))
    )
    slots = table.flatten().long()
    return lambda: decode_attention_fwd(q, k, v, out, indptr, slots, acc, lse, splits, most, scale, 1.0, 1.0)


def flashinfer_decode(q, k, v, table, page_size, scale, tensor_cores):
    """FlashInfer's BF16 decode over the same pages, or None where FlashInfer is not installed."""
    if importlib.util.find_spec("flashinfer") is None:
        return None
    import flashinfer  # one that is there and does not load is an error, not a column less

    batch, context = table.shape
    workspace = torch.empty(2**27, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=tensor_cores)
    indptr = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * (context // page_size)
    pages = (table[:, ::page_size] // page_size).flatten()
    last = torch.full((batch,), page_size, dtype=torch.int32, device=q.device)
    shape = (q.shape[1], k.shape[1], q.shape[2], page_size)
    wrapper.plan(indptr, pages, last, *shape, q_data_type=q.dtype, kv_data_type=q.dtype, sm_scale=scale)
    paged = tuple(x.view(-1, page_size, *x.shape[1:]) for x in (k, v))
    return lambda: wrapper.run(q, paged)


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        self.seconds = args.seconds
        self.processor_time = args.device == "cpu" and torch.get_num_threads() == 1
        self.peak = copy_bandwidth(self.device, self.processor_time)
        self.results: list[dict] = []
        self.args = args

    def time(self, rounds: list[dict]) -> dict[str, Timing]:
        """Seconds of one call of each candidate; ``rounds`` holds the same candidates over different data."""
        names = [name for name, call in rounds[0].items() if call is not None]
        calls = {name: self.one_after_the_other([calls[name] for calls in rounds]) for name in names}
        if self.device.type == "cuda":
            calls = {name: captured(call) for name, call in calls.items()}
        timings = time_calls(calls, self.device, self.seconds, self.processor_time)
        return {name: Timing(*(x / len(rounds) for x in vars(t).values())) for name, t in timings.items()}

    @staticmethod
    def one_after_the_other(calls: list):
        def run():
            for call in calls:
                call()

        return run

    def report(self, op: str, shape: dict, nbytes: int, timings: dict[str, Timing]) -> None:
        # The best call is what the code costs; the median is what this machine, with its load, made of it.
        best = {name: t.best for name, t in timings.items()}
        ours = best["int4"]
        words = [f"{k} {v}" for k, v in shape.items()]
        rate = nbytes / ours
        line = f"{op}: {', '.join(words)}: {ours * 1e6:.1f} us (median {timings['int4'].median * 1e6:.1f})"
        line += f", {rate / 1e12:.4f} TB/s, {100 * rate / self.peak:.0f} % of copy"
        line += "".join(f", {t / ours:.2f}x faster than {name}" for name, t in best.items() if name != "int4")
        print(line, flush=True)
        self.results.append(
            {"op": op, "shape": shape, "bytes": nbytes, "seconds": {n: vars(t) for n, t in timings.items()}}
        )

    def decode(self) -> None:
        kind, group, scale = self.device.type, self.args.group, 0.1
        for head_dim in self.args.head_dims:
            for batch in self.args.batches or DECODE_BATCHES[kind]:
                for context in self.args.contexts or DECODE_CONTEXTS[kind]:
                    for rows in self.args.q_rows:
                        self.decode_shape(head_dim, batch, context, rows, self.args.kv_heads, group, scale)

    def decode_shape(
        self, head_dim: int, batch: int, context: int, q_rows: int, heads: int, group: int, scale: float
    ) -> None:
        bf16_bytes = 4 * batch * context * heads * head_dim  # K and V
        limit = self.args.max_gib * 2**30
        if 2.3 * bf16_bytes > limit:  # the 16-bit pages, contiguous copies of them, the INT4 pages
            print(f"decode: head_dim {head_dim}, batch {batch}, context {context}: left out, needs more than "
                  f"--max-gib {self.args.max_gib} GiB", flush=True)  # fmt: skip
            return
        nbytes = (
            2 * batch * context * heads * row_bytes(head_dim, self.args.groups)
            + 4 * batch * q_rows * heads * group * head_dim
        )
        copies = 1
        if self.device.type == "cuda":
            copies = max(1, min(64, -(-ROTATED_BYTES // nbytes)))
        rounds = [self.decode_calls(head_dim, batch, context, q_rows, heads, group, scale) for _ in range(copies)]
        shape = {"head_dim": head_dim, "batch": batch, "context": context, "heads": f"{heads * group}/{heads}"}
        if q_rows > 1:
            shape["rows"] = q_rows
        self.report("decode", shape, nbytes, self.time(rounds))

    def decode_calls(
        self, head_dim: int, batch: int, context: int, q_rows: int, heads: int, group: int, scale: float
    ) -> dict:
        """The candidates over fresh data."""
        slots = batch * context
        table = shuffled_pages(batch, context, self.args.page_size, self.device)
        k, v = (torch.randn(slots, heads, head_dim, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        q = torch.randn(batch * q_rows, heads * group, head_dim, device=self.device, dtype=torch.bfloat16)
        caches = [
            torch.empty(slots, heads, row_bytes(head_dim, self.args.groups), dtype=torch.uint8, device=self.device)
            for _ in range(2)
        ]
        every = torch.arange(slots, device=self.device)
        rows = torch.arange(batch, device=self.device)
        lens = torch.full((batch,), context, device=self.device)
        order = default_rotation_order(head_dim)
        ops.append_kv(k, v, *caches, every, rotation_order=order)
        out = torch.empty_like(q)

        def int4(rotation_order: int, batch_invariant: bool = False, **transform):
            workspace = ops.decode_workspace(self.device, *q.shape, batch_invariant=batch_invariant)
            return lambda: ops.decode_attention(
                q, *caches, table, rows, lens, sm_scale=scale, max_q_len=q_rows, page_size=self.args.page_size,
                rotation_order=rotation_order, batch_invariant=batch_invariant, out=out, workspace=workspace,
                **transform,
            )  # fmt: skip

        vectors = torch.ones(3, heads, head_dim, device=self.device)
        calibrated = dict(zip(("k_mean", "k_scale", "k_sign"), vectors), rotate_v=True)
        calls = {
            "int4": int4(order),
            "int4 unrotated": int4(1),
            "int4 calibrated, V rotated": int4(order, **calibrated),
        }
        if self.device.type == "cuda":
            calls["int4 batch-invariant"] = int4(order, batch_invariant=True)
        if q_rows == 1:
            index = table.long()
            near_k, near_v = (x[index].transpose(1, 2).contiguous() for x in (k, v))
            calls["bf16 sdpa, contiguous K/V"] = lambda: F.scaled_dot_product_attention(
                q[:, :, None], near_k, near_v, scale=scale, enable_gqa=True
            )
            if self.device.type == "cuda":
                calls["bf16 triton"] = triton_decode(q, k, v, table, lens, scale)
                variants = {"bf16 flashinfer": False, "bf16 flashinfer, tensor cores": True}
                for name, tensor_cores in variants.items() if self.args.flashinfer else ():
                    calls[name] = flashinfer_decode(q, k, v, table, self.args.page_size, scale, tensor_cores)
            else:
                calls["bf16 torch_native"] = torch_native_decode(q, k, v, table, rows, lens, scale)
        if self.args.isas:
            for isa in _C.cpu_isas()[1:]:
                calls[f"int4 on {isa}"] = self.on_isa(isa, int4(order))
        return calls

    @staticmethod
    def on_isa(isa: str, call):
        def run():
            before = _C.cpu_isa()
            _C.set_cpu_isa(isa)
            try:
                call()
            finally:
                _C.set_cpu_isa(before)

        return run

    def move(self, op: str) -> None:
        """append and gather: both move 16-bit rows on one side and INT4 rows on the other."""
        heads = self.args.kv_heads
        for head_dim in self.args.head_dims:
            for tokens in self.args.tokens or TOKENS[self.device.type]:
                total = max(4 * tokens, 4096)
                caches = [
                    torch.zeros(
                        total, heads, row_bytes(head_dim, self.args.groups), dtype=torch.uint8, device=self.device
                    )
                    for _ in range(2)
                ]
                pages = torch.randperm(total, device=self.device)[:tokens]
                wide = [
                    torch.randn(tokens, heads, head_dim, device=self.device, dtype=torch.bfloat16) for _ in range(2)
                ]
                nbytes = 2 * tokens * heads * (2 * head_dim + row_bytes(head_dim, self.args.groups))
                shape = {"head_dim": head_dim, "tokens": tokens, "heads": heads}
                calls = self.append_calls(wide, caches, pages) if op == "append" else self.gather_calls(
                    wide, caches, pages)  # fmt: skip
                source = torch.zeros(nbytes // 2, dtype=torch.uint8, device=self.device)
                target = torch.empty_like(source)
                calls["copying its bytes"] = lambda target=target, source=source: target.copy_(source)
                self.report(op, shape, nbytes, self.time([calls]))

    def append_calls(self, wide, caches, slots) -> dict:
        order = default_rotation_order(wide[0].shape[2])
        stored = [torch.empty(len(caches[0]), *x.shape[1:], dtype=x.dtype, device=x.device) for x in wide]

        def bf16_store():
            for cache, rows in zip(stored, wide):
                cache[slots] = rows

        return {
            "int4": lambda: ops.append_kv(*wide, *caches, slots, rotation_order=order),
            "int4 unrotated": lambda: ops.append_kv(*wide, *caches, slots, rotation_order=1),
            "int4, V rotated too": lambda: ops.append_kv(*wide, *caches, slots, rotation_order=order, rotate_v=True),
            "bf16 store": bf16_store,
        }

    def gather_calls(self, wide, caches, slots) -> dict:
        slots = slots.int()
        return {"int4": lambda: ops.gather_kv(*caches, slots, *wide)}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=("decode", "append", "gather"), required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=4, help="query heads per KV head")
    parser.add_argument("--groups", type=int, choices=(1, 2), default=1, help="scales and offsets per row")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--contexts", type=int, nargs="+")
    parser.add_argument("--q-rows", type=int, nargs="+", default=[1], help="query rows per request")
    parser.add_argument("--no-flashinfer", dest="flashinfer", action="store_false", help="it compiles for minutes")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs="+", help="for append and gather")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--isas", action="store_true", help="time the narrower CPU instruction sets too")
    parser.add_argument("--seconds", type=float, default=1.0, help="to spend on one line")
    parser.add_argument("--max-gib", type=float, default=8 if not torch.cuda.is_available() else 60)
    parser.add_argument("--json", type=Path, help="write all figures here")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    bench = Bench(args)
    described = ", ".join(f"{k} {v}" for k, v in environment().items())
    if args.device == "cpu":
        described += f", {_C.cpu_isa()}" + (", processor time" if bench.processor_time else ", wall time")
    print(f"# {described}; copy {bench.peak / 1e12:.4f} TB/s")
    bench.decode() if args.op == "decode" else bench.move(args.op)
    if args.json is not None:
        text = {"environment": environment(), "copy_bytes_per_second": bench.peak, "results": bench.results}
        args.json.write_text(json.dumps(text, indent=1))


if __name__ == "__main__":
    main()
