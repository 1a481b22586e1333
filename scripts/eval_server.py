#!/usr/bin/env python3
"""What a served model makes of each KV cache, on windows of the documentation that comes with Python.

    scripts/eval_server.py --model PATH [--windows 8] [--context 2048] [--caches bf16,none,k,kv,calibrated]
    scripts/eval_server.py --model PATH --windows 0 --greedy 256 --prompts 24

Each cache gets its own server and a line: perplexity, where prompts are prefilled in chunks and every
key and value is read back from the cache, so that attention sees what decoding would see; and after how many tokens of
a long greedy answer the text parts from the first cache's.
"""

import argparse
import math
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPT = 256  # tokens
sys.path.insert(0, str(ROOT))

from saw_int4 import serve  # noqa: E402
from saw_int4.evaluation import measure, text  # noqa: E402
from saw_int4.torchvision_compat import define_missing_operators  # noqa: E402


def windows_of(model: str, count: int, context: int) -> list[list[int]]:
    """``count`` windows of ``context`` tokens, as the ladder takes them (``scripts/eval_accuracy.py``)."""
    define_missing_operators()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.topics(), return_tensors="pt").input_ids[0]
    return [window.tolist() for window in text.windows(ids, context, count, tokenizer.bos_token_id)]


def mean_loss(url: str, windows: list[list[int]]) -> float:
    """Mean negative log-likelihood over the windows, in nats per token."""
    losses = []
    for number, ids in enumerate(windows, 1):
        sampling = {"temperature": 0, "max_new_tokens": 1}
        body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
        answer = serve.request(f"{url}/generate", body, timeout=1200)
        losses.append(-statistics.fmean(e[0] for e in answer["meta_info"]["input_token_logprobs"][1:]))
        print(f"\r  window {number}/{len(windows)}", end="", file=sys.stderr, flush=True)
    print("\r", end="", file=sys.stderr)
    return statistics.fmean(losses)


def continue_greedily(url: str, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """What the server answers to each prompt, all asked at once: exactly ``tokens`` tokens."""

    def ask(ids: list[int]) -> list[int]:
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        return serve.request(f"{url}/generate", {"input_ids": ids, "sampling_params": sampling}, 1200)["output_ids"]

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(ask, prompts))


def agreement(answers: list[list[int]], reference: list[list[int]]) -> str:
    """How long answers stay the reference's, with the 95 % interval of the mean."""
    lengths = [measure.common_prefix(*pair) for pair in zip(answers, reference)]
    mean, margin = measure.interval(lengths)
    whole = sum(length == len(answer) for length, answer in zip(lengths, reference))
    return (
        f"part after {mean:.1f} +- {margin:.1f} tokens of {len(reference[0])}, "
        f"{whole} of {len(lengths)} answers are the same to the end"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--windows", type=int, default=8, help="for perplexity; 0: not measured (default: 8)")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--greedy", type=int, default=0, help="tokens of a greedy answer (default: 0, not measured)")
    parser.add_argument("--prompts", type=int, default=24, help="for --greedy, 256 tokens each (default: 24)")
    parser.add_argument(
        "--caches",
        default=",".join(serve.CACHES),
        help="bf16; int4 with a rotation alone: none, k, kv; calibrated: int4 as it is by default",
    )
    parser.add_argument("--port", type=int, default=30100)
    args = parser.parse_args()
    caches = args.caches.split(",")
    if unknown := set(caches) - set(serve.CACHES):
        parser.error(f"--caches {','.join(sorted(unknown))}: expected {', '.join(serve.CACHES)}")
    windows = windows_of(args.model, args.windows, args.context) if args.windows else []
    prompts = windows_of(args.model, args.prompts, PROMPT) if args.greedy else []
    pool = max(args.context + 1024, args.prompts * (PROMPT + args.greedy) if args.greedy else 0)
    flags = ["--context-length", str(max(args.context, PROMPT + args.greedy) + 8), "--max-total-tokens", str(pool)]
    flags += ["--sleep-on-idle", "--skip-server-warmup"]
    first_loss, first_answers = None, None
    for cache in caches:
        with serve.served(args.model, cache, args.port, ROOT / ".cache" / "eval_server.log", *flags) as url:
            line = f"{Path(args.model).name} kv={cache:10}"
            if windows:
                loss = mean_loss(url, windows)
                first_loss = first_loss or loss
                line += f" context {args.context}, {args.windows} windows: perplexity {math.exp(loss):.3f}, "
                line += f"{math.exp(loss - first_loss):.3f}x the first;"
            if prompts:
                answers = continue_greedily(url, prompts, args.greedy)
                first_answers = first_answers or answers
                line += f" greedy answers {agreement(answers, first_answers)}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
