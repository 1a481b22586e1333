#!/usr/bin/env python3
"""Throughput and latency of a served model with each KV cache, by SGLang's own benchmark: one server after the other.

    scripts/bench_serving.py --model PATH [--caches bf16,kv] [--loads 256/1024x128 16384/1024x32] [SGLang's flags ...]

A load is input/output tokens x requests, all sent at once: random tokens, greedy, exact lengths. Each cache gets its
own server with the same flags (--mem-fraction-static and so on), which answers one request of each load beforehand.
"""

import argparse
import contextlib
import importlib
import io
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from saw_int4 import serve  # noqa: E402
from saw_int4.torchvision_compat import define_missing_operators  # noqa: E402


def load(text: str) -> tuple[int, int, int]:
    """``256/1024x128``: tokens in, tokens out, requests at once."""
    found = re.fullmatch(r"(\d+)/(\d+)x(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text}: expected INPUT/OUTPUTxREQUESTS, such as 256/1024x128")
    return tuple(int(number) for number in found.groups())


def measure(url: str, model: str, size: tuple[int, int, int], seed: int, results: Path) -> dict:
    """Run one load, its first requests out of the way; SGLang's own record of it, which is appended to ``results``."""
    tokens_in, tokens_out, requests = size
    body = {"input_ids": [3 + n for n in range(tokens_in)], "sampling_params": {"temperature": 0, "max_new_tokens": 4}}
    serve.request(f"{url}/generate", body, timeout=600)
    command = ["bench_serving", "--backend", "sglang", "--base-url", url, "--model", model]
    command += ["--dataset-name", "random-ids", "--tokenize-prompt", "--random-range-ratio", "1.0"]
    command += ["--random-input-len", str(tokens_in), "--random-output-len", str(tokens_out)]
    command += ["--num-prompts", str(requests), "--max-concurrency", str(requests), "--seed", str(seed)]
    command += ["--flush-cache", "--warmup-requests", "0", "--disable-tqdm", "--output-file", str(results)]
    said, argv = io.StringIO(), sys.argv
    sys.argv = command
    try:
        with contextlib.redirect_stdout(said):
            benchmark().cli_main()
    finally:
        sys.argv = argv
    record = json.loads(results.read_text().splitlines()[-1])
    if record["completed"] != requests:
        raise SystemExit(
            f"{record['completed']} of {requests} requests were completed; see {results}\n{said.getvalue()}"
        )
    return record


def benchmark():
    """SGLang's own, in this process: importing it takes as long as a small load."""
    define_missing_operators()  # for torchvision, where torch is a CPU build
    return importlib.import_module("sglang.benchmark.serving")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint; a config.json with --load-format dummy will do")
    parser.add_argument("--caches", default="bf16,kv", help=f"of {', '.join(serve.CACHES)} (default: bf16,kv)")
    default = [(256, 1024, 32), (256, 1024, 128), (16384, 1024, 8), (16384, 1024, 32)]
    parser.add_argument("--loads", type=load, nargs="+", default=default)
    parser.add_argument("--port", type=int, default=30200)
    parser.add_argument("--results", type=Path, default=ROOT / ".cache" / "bench_serving.jsonl")
    args, flags = parser.parse_known_args()
    caches = args.caches.split(",")
    if unknown := set(caches) - set(serve.CACHES):
        parser.error(f"--caches {','.join(sorted(unknown))}: expected {', '.join(serve.CACHES)}")
    first = {}
    for cache in caches:
        with serve.served(args.model, cache, args.port, ROOT / ".cache" / "bench_serving.log", *flags) as url:
            print(f"kv={cache}: {serve.request(f'{url}/server_info')['max_total_num_tokens']} tokens", flush=True)
            for seed, size in enumerate(args.loads):
                r = measure(url, args.model, size, seed, args.results)
                speed = r["output_throughput"]
                ratio = speed / first.setdefault(size, speed)
                print(
                    f"kv={cache:10} {size[0]}/{size[1]}x{size[2]}: {r['duration']:.1f} s, {speed:.0f} tokens/s out, "
                    f"{ratio:.2f}x {caches[0]}; median to the first token {r['median_ttft_ms']:.0f} ms, "
                    f"per token {r['median_tpot_ms']:.2f} ms",
                    flush=True,
                )


if __name__ == "__main__":
    main()
