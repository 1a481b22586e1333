"""Console script ``saw-int4``."""

from __future__ import annotations

import argparse
import sys

from saw_int4 import env
from saw_int4.calibration import command as calibration_command


def main(argv: list[str] | None = None) -> None:
    """Run one sub-command."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["serve"]:  # its flags are SGLang's, and parsed there
        from saw_int4 import launch_server

        launch_server.main(argv[1:])
        return
    parser = argparse.ArgumentParser(prog="saw-int4", description="A 4-bit KV cache for SGLang.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve", help="start SGLang's server (saw-int4 serve --help lists its flags)")
    fmt = commands.add_parser("format", help="say what the cache of a model will hold")
    fmt.add_argument("--head-dim", type=int, required=True)
    doctor = commands.add_parser(
        "doctor", help="check that torch, the extension and SGLang fit; further flags: SGLang's"
    )
    doctor.add_argument(
        "--model", metavar="PATH", help="a checkpoint: say whether int4 would be refused for it, and why"
    )
    calibrate = commands.add_parser("calibrate", help="fit the key transform of a checkpoint")
    calibration_command.add_arguments(calibrate)
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "doctor":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command == "doctor":
        from saw_int4 import doctor

        sys.exit(doctor.main(args.model, rest))
    try:
        if args.command == "format":
            print(env.resolve()[0].kv_format(args.head_dim).describe())
        elif args.command == "calibrate":
            calibration_command.run(args)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
