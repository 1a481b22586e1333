"""Servers of saw_int4.serve, without SGLang: what becomes of their processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SERVER = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

server = HTTPServer(("127.0.0.1", 0), Answer)
Path(sys.argv[1]).write_text(f"{os.getpid()} {server.server_port}")
server.serve_forever()
"""


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """A process that runs; one that ended and was not waited for does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_server_ends_with_the_process_that_was_told_to(tmp_path):
    told = tmp_path / "server"
    script = f"""
import sys, time
from pathlib import Path
from saw_int4 import serve

class Url:  # of a server that chooses its port
    def __format__(self, spec):
        words = Path({str(told)!r}).read_text().split() if Path({str(told)!r}).exists() else (0, 1)
        return f"http://127.0.0.1:{{words[1]}}"

with serve.running([sys.executable, "-c", {SERVER!r}, {str(told)!r}], Url(), Path({str(tmp_path / "log")!r})):
    print("ready", flush=True)
    time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert run.stdout.readline() == "ready\n"
        pid = int(told.read_text().split()[0])
        assert is_alive(pid)
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=40) == 128 + signal.SIGTERM
        wait_for(lambda: not is_alive(pid))
    finally:
        run.kill()
