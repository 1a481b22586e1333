#!/usr/bin/env python3
"""Perplexity of a served model with each KV cache, on fixed windows of the documentation that comes with Python.

    scripts/eval_perplexity.py --model PATH [--windows 8] [--context 2048] [--caches bf16,none,k,kv,calibrated]

Each cache gets its own server. Prompts are prefilled in chunks and every key and value is read back from the cache,
so that attention sees what decoding would see. One line per cache.
"""

import argparse
import math
import os
import pydoc_data.topics
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROTATIONS = ("none", "k", "kv")
sys.path.insert(0, str(ROOT))

from saw_int4 import env, serve  # noqa: E402
from saw_int4.torchvision_compat import define_missing_operators  # noqa: E402


def windows_of(model: str, count: int, context: int) -> list[list[int]]:
    """The first ``count`` windows of ``context`` tokens."""
    define_missing_operators()
    from transformers import AutoTokenizer

    topics = pydoc_data.topics.topics
    ids = AutoTokenizer.from_pretrained(model)("\n\n".join(topics[name] for name in sorted(topics))).input_ids
    return [ids[i * context : (i + 1) * context] for i in range(count)]


def evaluate(url: str, windows: list[list[int]]) -> list[float]:
    """Mean negative log-likelihood of each window, in nats per token."""
    losses = []
    for number, ids in enumerate(windows, 1):
        sampling = {"temperature": 0, "max_new_tokens": 1}
        body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
        answer = serve.request(f"{url}/generate", body, timeout=1200)
        losses.append(-statistics.fmean(e[0] for e in answer["meta_info"]["input_token_logprobs"][1:]))
        print(f"\r  window {number}/{len(windows)}", end="", file=sys.stderr, flush=True)
    print("\r", end="", file=sys.stderr)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument(
        "--caches",
        default="bf16,none,k,kv,calibrated",
        help="bf16; int4 with a rotation alone: none, k, kv; calibrated: int4 as it is by default",
    )
    parser.add_argument("--port", type=int, default=30100)
    args = parser.parse_args()
    caches = args.caches.split(",")
    if unknown := set(caches) - {"bf16", "calibrated", *ROTATIONS}:
        parser.error(f"--caches {','.join(sorted(unknown))}: expected bf16, calibrated, {', '.join(ROTATIONS)}")
    windows = windows_of(args.model, args.windows, args.context)
    url = f"http://127.0.0.1:{args.port}"
    log = ROOT / ".cache" / "eval_perplexity.log"
    baseline = None
    for cache in caches:
        command = [sys.executable, "-m", "saw_int4.launch_server", "--model-path", args.model]
        command += ["--host", "127.0.0.1", "--port", str(args.port), "--sleep-on-idle", "--skip-server-warmup"]
        command += ["--context-length", str(args.context + 8), "--max-total-tokens", str(args.context + 1024)]
        command += ["--kv-cache-dtype", "auto" if cache == "bf16" else "int4"]
        variables = {**os.environ, "PYTHONPATH": str(ROOT)}
        if cache in ROTATIONS:
            variables |= {env.ROTATION: cache, env.CALIBRATION: "none"}
        with log.open("w") as out:
            server = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=variables, start_new_session=True
            )
        try:
            serve.wait_until_healthy(url, server, log)
            started = time.monotonic()
            loss = statistics.fmean(evaluate(url, windows))
        finally:
            serve.stop(server)
        baseline = loss if baseline is None else baseline
        print(
            f"{Path(args.model).name} kv={cache:10} context {args.context}, {args.windows} windows: "
            f"perplexity {math.exp(loss):.3f}, {math.exp(loss - baseline):.3f}x the first, "
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
