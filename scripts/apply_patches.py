#!/usr/bin/env python3
"""Gives an SGLang tree native INT4, or takes it away again; patches/README.md says when that is worth it.

    scripts/apply_patches.py --check | --apply | --revert  [--sglang PATH]

Exit code 0: the tree is, or can be, patched (--check), or is now as asked. 1: it cannot be, and was not changed.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from saw_int4 import patching  # noqa: E402
from saw_int4.unified_diff import PatchError  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    for name, text in (("check", "say what the tree is"), ("apply", "patch it"), ("revert", "take the patches out")):
        action.add_argument(f"--{name}", action="store_const", dest="action", const=name, help=text)
    parser.add_argument("--sglang", type=Path, metavar="PATH", help="SGLang's folder (default: the installed one)")
    args = parser.parse_args(argv)
    try:
        tree = patching.find_sglang(args.sglang)
        series = patching.pick_series(ROOT / "patches", tree)
        where = f"SGLang {series.version} at {tree.root}"
        if args.action == "check":
            state = patching.known_state(tree, series)
            print(f"{state.value}: {where}, {len(series.hunks)} patches")
            if state is patching.State.INTERRUPTED:
                raise PatchError("a run was killed here. Finish it with --apply, or undo it with --revert.")
        else:
            changed = getattr(patching, args.action)(tree, series)
            done = "patched" if args.action == "apply" else "unpatched"
            print(f"{done}: {where}{'' if changed else ', as it was before'}")
    except PatchError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
