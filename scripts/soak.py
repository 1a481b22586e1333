#!/usr/bin/env python3
"""Serves a model with an int4 cache too small for its clients, lets them run for an hour, and says what was wrong.

    scripts/soak.py --model PATH [--minutes 60] [--clients 6] [--report FILE] [FLAGS FOR SGLANG]

Prefix sharing, chunked prefill, short and long, greedy and sampled requests, ngram speculation, clients that leave,
aborted requests, retractions. The exit code is 0 only if there was no error and no leak, and memory stayed flat.
"""

import argparse
import pydoc_data.topics
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from saw_int4 import serve  # noqa: E402
from saw_int4.testing.soak import every_number_of_rows, soak  # noqa: E402
from saw_int4.torchvision_compat import define_missing_operators  # noqa: E402

SERVER = (
    "--kv-cache-dtype int4 --max-total-tokens 2048 --context-length 1024 --chunked-prefill-size 128 "
    "--max-running-requests 8 --schedule-conservativeness 0.05 --skip-server-warmup --sleep-on-idle "
)
# The corpus of ngrams grows until it is full: small, so that it is within minutes.
DRAFTS = "--speculative-algorithm NGRAM --speculative-num-draft-tokens 8 --speculative-ngram-capacity 20000"
# SGLang admits a request that fits with so many tokens of its answer: longer ones overfill the pool.
OVERFILL = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "8"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--log", type=Path, default=ROOT / ".cache/soak.log", help="file for the server's output")
    parser.add_argument("--report", type=Path, help="file for the figures, beside the terminal")
    options, more = parser.parse_known_args()
    flags = [*SERVER.split(), *DRAFTS.split(), *more]

    define_missing_operators()
    from transformers import AutoTokenizer

    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))[:200_000]
    text_ids = AutoTokenizer.from_pretrained(options.model)(text).input_ids
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with serve.running(serve.command(options.model, "127.0.0.1", port, *flags), url, options.log, **OVERFILL) as server:
        first, warm = (size / 2**20 for size in every_number_of_rows(url, server.pid, text_ids))
        report = soak(
            url, server.pid, options.log, text_ids, seconds=60 * options.minutes, clients=options.clients,
            say=lambda line: print(f"{time.strftime('%H:%M:%S')} {line}", flush=True),
        )  # fmt: skip
        cache = serve.request(f"{url}/server_info")["internal_states"][0]["kv_cache_format"]["format"]
    problems = report.problems()
    verdict = "soak         failed" if problems else "soak         ok: no error, no leak, memory flat"
    if not problems and report.growth_per_hour() is None:
        verdict = "soak         ok: no error, no leak; too short to judge memory"
    lines = [f"flags        {' '.join(flags)}", f"format       {cache}", *report.lines()]
    lines.append(f"memory       {first:.0f} MiB before prompts of every length up to a chunk's, {warm:.0f} after them")
    lines += [f"problem      {problem}" for problem in problems] + [verdict]
    print("\n".join(lines))
    if options.report is not None:
        options.report.write_text("\n".join(lines) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
