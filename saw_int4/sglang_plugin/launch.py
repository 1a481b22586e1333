"""Starts SGLang's own server in this process."""

from __future__ import annotations

import os

from sglang.srt.plugins import load_plugins


def run(argv: list[str]) -> None:
    """Serve with SGLang's flags ``argv``; returns when the server ends, and leaves no process behind."""
    load_plugins()  # before the flags are parsed: plugins add choices
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    server_args = prepare_server_args(argv)
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
