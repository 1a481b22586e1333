"""A real SGLang server as a subprocess, and the few requests that the tests make."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
INSTRUMENTED = [sys.executable, str(HERE / "instrumented_server.py")]
START_TIMEOUT_S = 400
READY = "The server is fired up and ready to roll!"


def environment(**extra: str) -> dict[str, str]:
    """This environment without anybody's SAW_* settings, on CPU, with ``extra``.

    Without calibration: it takes a quarter of a minute for each checkpoint; tests of it ask for it.
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SAW_INT4_R", "SAW_TEST_", "HADAMARD"))}
    clean["SAW_INT4_CALIBRATION"] = "none"
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    clean.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait starve a shared machine
    return {**clean, "PYTHONPATH": path, "SAW_INT4_CPU_PLATFORM": "1", "TOKENIZERS_PARALLELISM": "false", **extra}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """Starts in the background; ``ready()`` waits; ``stop()`` ends every process it started."""

    def __init__(self, model: Path, log: Path, *args: str, command: list[str] | None = None, **env: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        argv = [*(command or INSTRUMENTED), "--model-path", str(model), "--host", "127.0.0.1", "--port", str(self.port)]
        argv += ["--sleep-on-idle", "--skip-server-warmup", "--watchdog-timeout", "600", *args]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                argv, stdout=out, stderr=subprocess.STDOUT, env=environment(**env), start_new_session=True
            )

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def ready(self) -> Server:
        deadline = time.monotonic() + START_TIMEOUT_S
        while READY not in self.text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"server did not start: {self.text()[-6000:]}")
            time.sleep(0.3)
        while True:  # without warm-up the line may come before the port is open
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                self.call("/model_info", timeout=30)
                return self
            if time.monotonic() > deadline:
                raise RuntimeError(f"server does not answer: {self.text()[-6000:]}")
            time.sleep(0.3)

    def wait_for_exit(self, timeout: float = 300) -> str:
        """The log of a server that is expected to end by itself."""
        try:
            self.process.wait(timeout)
        finally:
            self.stop()
        return self.text()

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=30)

    def call(self, path: str, body: dict | None = None, timeout: float = 300):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            text = answer.read().decode()
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(text)
        return text

    def generate(self, input_ids: list[int], max_new_tokens: int = 1, **more) -> dict:
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        return self.call("/generate", {"input_ids": input_ids, "sampling_params": sampling, **more})

    def prompt_logprobs(self, input_ids: list[int]) -> list[float]:
        """log p(token i | tokens before it), for i = 1 .. n-1."""
        answer = self.generate(input_ids, return_logprob=True, logprob_start_len=0)
        return [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]

    def info(self) -> dict:
        return self.call("/server_info")

    def state(self) -> dict:
        return self.info()["internal_states"][0]

    def flush(self) -> None:
        self.call("/flush_cache?timeout=60", {})  # rows on their way to a host tier are waited for


def output_logprobs(answer: dict) -> list[tuple[float, int]]:
    """(log probability, token) of each generated token."""
    return [(entry[0], entry[1]) for entry in answer["meta_info"]["output_token_logprobs"]]


def tier_and_answer(server: Server, prompt: list[int], page: int, max_new_tokens: int) -> tuple[str, list]:
    """The tier of HiCache that held all of the prompt's whole pages but the last, and what was answered.

    The server has --enable-cache-report.
    """
    answer = server.generate(prompt, max_new_tokens, return_logprob=True)
    found = answer["meta_info"]["cached_tokens_details"] or {}
    pages = (len(prompt) - 1) // page * page
    return "".join(tier for tier in ("device", "host", "storage") if found.get(tier) == pages), output_logprobs(answer)


def tiers_and_answers(server: Server, length: int, page: int, max_new_tokens: int) -> tuple[list[str], list]:
    """``tier_and_answer`` of one prompt: new, again, after three others have filled the pool, and after a flush."""
    prompt = list(range(1000, 1000 + length))
    found = [tier_and_answer(server, prompt, page, max_new_tokens) for _ in range(2)]
    for start in (2000, 3000, 4000):
        server.generate(list(range(start, start + length)))
    found.append(tier_and_answer(server, prompt, page, max_new_tokens))
    server.flush()
    found.append(tier_and_answer(server, prompt, page, max_new_tokens))
    tiers, answers = zip(*found)
    return list(tiers), list(answers)
