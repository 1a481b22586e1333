"""Serves a model with an int4 KV cache and shows, over HTTP, that it works. What scripts/serve.sh runs.

Everything is learnt from the running server, as any client would: nothing here knows SGLang or the kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from saw_int4 import env

QUESTION = "What is the capital of France? Answer in one short sentence."
EXPECTED = "Paris"
START_TIMEOUT_S = 600
ROOT = Path(__file__).resolve().parent.parent
CACHES = ("bf16", "none", "k", "kv", "calibrated")  # in 16 bits, int4 by its rotation alone, int4 as by default
CPU_TOKENS = 65536  # without a GPU, SGLang's own sizing would claim most of the machine's memory


class ServeError(RuntimeError):
    """The server did not start, or did not do what was promised."""


def request(url: str, body: dict | None = None, timeout: float = 120.0) -> dict:
    """GET, or POST a JSON body; returns the JSON answer."""
    data = None if body is None else json.dumps(body).encode()
    call = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=timeout) as answer:
        return json.loads(answer.read() or b"{}")


def wait_until_healthy(url: str, server: subprocess.Popen, log: Path) -> None:
    """Return once the server lists its model.

    Raises:
        ServeError: the server died or did not answer in time.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise ServeError(f"the server stopped with exit code {server.returncode} while starting; see {log}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError, json.JSONDecodeError):
            request(f"{url}/v1/models", timeout=5)
            return
        time.sleep(1)
    raise ServeError(f"the server did not answer within {START_TIMEOUT_S} s; see {log}")


def chat_body(model: str) -> dict:
    return {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 32,
    }


def show(url: str) -> dict:
    """Ask the server one question and what its cache is; print both. Returns what was found.

    Returns:
        dict with ``answer``, ``tokens``, ``bf16_tokens``, ``format`` (the server's own description).
    """
    model = request(f"{url}/v1/models")["data"][0]["id"]
    body = chat_body(model)
    answer = request(f"{url}/v1/chat/completions", body)["choices"][0]["message"]["content"].strip()
    info = request(f"{url}/server_info")
    cache = info["internal_states"][0].get("kv_cache_format")
    if cache is None:
        raise ServeError(f"{url}/server_info names no kv_cache_format: this server does not run an int4 KV cache")
    tokens = info["max_total_num_tokens"]
    bf16_tokens = cache["allocated_bytes"] // cache["bfloat16_bytes_per_token"]
    print(f"address   {url}")
    print(f"try       curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'")
    print(f"question  {QUESTION}")
    print(f"answer    {answer}")
    print(f"format    {cache['format']}")
    ratio = tokens / bf16_tokens
    print(f"capacity  {tokens} tokens; bfloat16 would hold {bf16_tokens} in the same bytes ({ratio:.2f}x)")
    sys.stdout.flush()
    return {"answer": answer, "tokens": tokens, "bf16_tokens": bf16_tokens, "format": cache["format"]}


def check(found: dict) -> None:
    """Raise ServeError unless the answer, the format and the capacity are as promised."""
    wrong = []
    if EXPECTED not in found["answer"]:
        wrong.append(f"answer is {found['answer']!r}, expected it to name {EXPECTED}")
    if not found["format"].startswith("int4 ") or " rotated" not in found["format"]:
        wrong.append(f"format is {found['format']!r}, expected int4 with a rotation")
    ratio = found["tokens"] / found["bf16_tokens"]
    if not 3.15 < ratio < 3.95:  # two groups at head_dim 64, one group at 256
        wrong.append(f"capacity is {ratio:.2f}x that of bfloat16, expected 3.15 to 3.95")
    if wrong:
        raise ServeError("; ".join(wrong))


def stop(server: subprocess.Popen) -> None:
    """End the server and every process it started."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=15)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)


def command(model: str, host: str, port: int, *flags: str) -> list[str]:
    """Our launcher, with these flags of SGLang."""
    launcher = [sys.executable, "-m", "saw_int4.launch_server"]
    return [*launcher, "--model-path", model, "--host", host, "--port", str(port), *flags]


@contextlib.contextmanager
def running(argv: list[str], url: str, log: Path, **variables: str) -> Iterator[subprocess.Popen]:
    """A server, from its first answer on, with more environment variables. It ends with every process it started.

    In the main thread: SIGTERM becomes SystemExit, so that it ends with this process too.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        server = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        wait_until_healthy(url, server, log)
        yield server
    finally:
        stop(server)
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def served(model: str, cache: str, port: int, log: Path, *flags: str) -> Iterator[str]:
    """A server with one of CACHES and these flags of SGLang; its address."""
    url = f"http://127.0.0.1:{port}"
    dtype = ["--kv-cache-dtype", "auto" if cache == "bf16" else "int4"]
    variables = {env.ROTATION: cache, env.CALIBRATION: "none"} if cache in env.ROTATIONS else {}
    with running(command(model, "127.0.0.1", port, *flags, *dtype), url, log, **variables):
        yield url


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/serve.sh", description="Serve a model with an int4 KV cache. Further flags go to SGLang."
    )
    parser.add_argument("--smoke", action="store_true", help="show that it works, then stop; exit code 0 if it did")
    parser.add_argument("--model", required=True, help="checkpoint folder (serve.sh: SmolLM2-135M-Instruct)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--log", type=Path, required=True, help="file for the server's own output")
    options, rest = parser.parse_known_args()

    sized = any(flag.startswith(("--max-total-tokens", "--mem-fraction-static")) for flag in rest)
    if not sized and shutil.which("nvidia-smi") is None:
        rest += ["--max-total-tokens", str(CPU_TOKENS)]
    argv = command(options.model, options.host, options.port, "--kv-cache-dtype", "int4", *rest)
    url = f"http://{options.host}:{options.port}"
    print(f"starting  {' '.join(argv)}\nlog       {options.log}", flush=True)
    try:
        with running(argv, url, options.log) as server:
            found = show(url)
            if options.smoke:
                check(found)
                print("smoke     ok")
            else:
                print("serving   press Ctrl-C to stop", flush=True)
                server.wait()
                raise ServeError(f"the server stopped with exit code {server.returncode}; see {options.log}")
    except ServeError as error:
        print("".join(options.log.read_text(errors="replace").splitlines(keepends=True)[-25:]), file=sys.stderr)
        print(f"failed    {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
