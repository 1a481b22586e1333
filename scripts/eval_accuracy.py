#!/usr/bin/env python3
"""The accuracy ladder: perplexity, KL, agreement, generation and retrieval of a model for each kind of cache.

    scripts/eval_accuracy.py --model .cache/models/SmolLM2-135M-Instruct
    scripts/eval_accuracy.py --model PATH --methods bf16,int4,bdr-64,calibrated --windows 8 --sensitivity calibrated

Finished cells are kept under --out: an interrupted run resumes, and further methods add to the table.
"""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from saw_int4.evaluation import ladder, report  # noqa: E402
from saw_int4.evaluation.variants import VARIANTS  # noqa: E402


def main() -> None:
    defaults = {f.name: f.default for f in fields(ladder.Settings)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a Hugging Face checkpoint")
    parser.add_argument("--variant", help=f"change the model first: {', '.join(VARIANTS)}, or several joined with +")
    parser.add_argument(
        "--methods", help="comma-separated names (default: all); NAME@0+3-5+last:1 keeps these layers in BF16"
    )
    parser.add_argument("--text", help="evaluation text (default: Python's language reference)")
    parser.add_argument(
        "--calibration", default="builtin", help=f"{', '.join(ladder.CALIBRATION_TEXTS)}, or the path of a text"
    )
    for name in ("calibration_tokens", "context", "windows"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=defaults[name])
    parser.add_argument("--generate", type=int, default=0, help="greedy tokens per window (default: 0, none)")
    parser.add_argument("--needle", type=int, default=0, help="tokens of a haystack, one per window (default: 0, none)")
    parser.add_argument("--sensitivity", metavar="METHOD", help="also quantize each layer alone, on held-out text")
    parser.add_argument("--plots", action="store_true", help="write SVG plots next to the results")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/accuracy"), help="folder of the results")
    args = parser.parse_args()

    settings = ladder.Settings(**{f.name: getattr(args, f.name) for f in fields(ladder.Settings)})
    try:
        run = ladder.Ladder(settings, args.out, args.device)
        run.run(list(run.methods) if args.methods is None else args.methods.split(","))
        layers = run.sensitivity(args.sensitivity) if args.sensitivity else []
        rows = run.results()
        print(f"\n{json.dumps(ladder.environment(settings))}\n\n{report.table(rows)}")
        if layers:
            print(f"\n{args.sensitivity}, one layer at a time\n{report.sensitivity_table(layers)}")
        summary = run.store.with_suffix(".summary.json")
        summary.write_text(
            json.dumps({"settings": ladder.environment(settings), "rows": rows, "layers": layers}, indent=1) + "\n"
        )
        print(f"\nwritten: {summary}")
        if args.plots:
            for path in report.plots(rows, layers, run.samples(), args.out, run.store.stem):
                print(f"written: {path}")
    except (ValueError, RuntimeError) as error:
        parser.exit(1, f"eval_accuracy: {error}\n")


if __name__ == "__main__":
    main()
