"""INT4 rows between servers and tiers: prefill and decode on two servers, the former with HiCache and file storage.

The servers are SGLang's, with Mooncake between them; where its library cannot be loaded, ``stand_in`` carries bytes.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from checkpoints import qwen3
from conftest import ARGS, CALIBRATED, PAGE, POOL_TOKENS
from server import HERE, ROOT, Server, free_port, output_logprobs
from test_families import gap, load, logprobs

from saw_int4.format import KVFormat
from saw_int4.sglang_plugin import transfers

pytestmark = pytest.mark.by_hand

TRANSFER = ["--disaggregation-transfer-backend", "mooncake_tcp", "--hicache-io-backend", "direct"]


def mooncake_path() -> list[str]:
    """Where the transfer engine is found: nowhere else if Mooncake is installed and its library loads."""
    found = importlib.util.find_spec("mooncake") is not None
    if found and subprocess.run([sys.executable, "-c", "import mooncake.engine"], capture_output=True).returncode == 0:
        return []
    return [str(HERE / "stand_in")]


class Pair:
    """A prefill server and a decode server, each with flags of its own, over pools of ``token_bytes`` a token."""

    def __init__(self, model: Path, logs: Path, prefill: str, decode: str, token_bytes: int, **variables) -> None:
        self.bootstrap, self.rooms = free_port(), count(1)
        shared = {"SAW_TEST_CACHE_BYTES": str(POOL_TOKENS * token_bytes), "HOME": str(logs), **CALIBRATED, **variables}
        shared["PYTHONPATH"] = os.pathsep.join([str(ROOT), *mooncake_path(), os.environ.get("PYTHONPATH", "")])
        args = [*ARGS, "--kv-cache-dtype", "int4", *TRANSFER, "--disaggregation-bootstrap-port", str(self.bootstrap)]
        prefill, decode = f"--disaggregation-mode prefill {prefill}", f"--disaggregation-mode decode {decode}"
        self.prefill = Server(model, logs / "prefill.log", *args, *prefill.split(), **shared)
        self.decode = Server(model, logs / "decode.log", *args, *decode.split(), **shared)

    def ready(self) -> Pair:
        self.prefill.ready()
        self.decode.ready()
        return self

    def stop(self) -> None:
        self.prefill.stop()
        self.decode.stop()

    def generate(self, prompt: list[int], max_new_tokens: int = 8) -> tuple[dict, list]:
        """Where the prefill server found the prompt's tokens, and the decode server's answer."""
        room = {"bootstrap_host": "127.0.0.1", "bootstrap_port": self.bootstrap, "bootstrap_room": next(self.rooms)}
        with ThreadPoolExecutor(1) as other:
            sent = other.submit(self.prefill.generate, prompt, max_new_tokens, return_logprob=True, **room)
            answer = self.decode.generate(prompt, max_new_tokens, return_logprob=True, **room)
        found = sent.result()["meta_info"]["cached_tokens_details"] or {}
        return {tier: found.get(tier, 0) for tier in ("device", "host", "storage")}, output_logprobs(answer)


@pytest.fixture(scope="module")
def store(logs) -> Path:
    folder = logs / "store"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def pair(model, int4_server, logs, store):
    """The calibration is the other server's, in the same home."""
    tiers = "--enable-hierarchical-cache --hicache-ratio 4 --hicache-storage-backend file --enable-cache-report"
    tiers += " --hicache-storage-prefetch-policy wait_complete"
    lend = "--num-reserved-decode-tokens 16"
    folder = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(store)}
    servers = Pair(model, logs, tiers, lend, 30 * 3 * 36 * 2, **folder)
    try:
        yield servers.ready()
    finally:
        servers.stop()


PROMPT = 400  # tokens, 384 of them in whole pages but for the last
FOUND = PROMPT - PAGE


@pytest.fixture(scope="module")
def prompt(text_ids) -> list[int]:
    return text_ids[5_000 : 5_000 + PROMPT]


@pytest.fixture(scope="module")
def cold(pair, prompt) -> list:
    found, answer = pair.generate(prompt)
    assert sum(found.values()) == 0
    return answer


def evict(pair, text_ids) -> None:
    """Fill the prefill server's pool with other prompts."""
    for start in range(10_000, 12_000, 500):
        pair.generate(text_ids[start : start + 500], 1)


def test_an_answer_is_that_of_one_server(pair, prompt, cold, int4_server):
    alone = int4_server.generate(prompt, len(cold), return_logprob=True)
    assert cold == output_logprobs(alone)


def test_a_hit_on_the_device(pair, prompt, cold):
    assert pair.generate(prompt) == ({"device": FOUND, "host": 0, "storage": 0}, cold)


def test_a_hit_in_the_host_tier(pair, prompt, cold, text_ids):
    evict(pair, text_ids)
    assert pair.generate(prompt) == ({"device": 0, "host": FOUND, "storage": 0}, cold)


def test_a_hit_in_storage(pair, prompt, cold):
    """After a flush nothing but the files is left, as after a restart."""
    pair.prefill.flush()
    assert pair.generate(prompt) == ({"device": 0, "host": 0, "storage": FOUND}, cold)


def test_storage_is_named_by_format_and_model(pair, model, store):
    """A server that is started again, or elsewhere, has the same name for the same rows."""
    description = pair.prefill.state()["kv_cache_format"]["format"]
    calibration = description.split("calibration ")[1].split(",")[0]
    rows = f"int4-{KVFormat(64, 64, rotate_v=True, calibration=calibration).fingerprint}"
    name = transfers.storage_name(rows, "page_first_direct", str(model), "{}")
    files = [file.name for file in store.glob("*.bin")]
    assert len(files) >= FOUND // PAGE
    assert all(file.endswith(f"-{name}_0_1.bin") for file in files)


def test_rows_of_another_format_in_storage_are_not_read(pair, prompt, cold, store):
    """The same files under the name of another transform: the prompt is computed again."""
    [fingerprint] = {file.name.split("-int4-")[1].split("-")[0] for file in store.glob("*.bin")}
    for file in list(store.glob("*.bin")):
        file.rename(file.with_name(file.name.replace(fingerprint, "0123456789abcdef")))
    pair.prefill.flush()
    assert pair.generate(prompt) == ({"device": 0, "host": 0, "storage": 0}, cold)


def error(server, prompt: list[int], answer: list) -> float:
    """Mean difference of an answer's log probabilities to those that a server gives the same text as a prompt."""
    tokens = [token for _, token in answer]
    expected = server.prompt_logprobs(prompt + tokens)[len(prompt) - 1 :]
    return float(np.mean([abs(got - want) for (got, _), want in zip(answer, expected, strict=True)]))


def test_a_retracted_request_goes_on_where_it_was(pair, text_ids, int4_server):
    """The decode server backs rows up to host memory and takes them back; a request alone is not retracted."""
    prompts = [text_ids[start : start + 256] for start in (20_000, 21_000, 22_000)]
    with ThreadPoolExecutor(len(prompts)) as clients:
        crowded = list(clients.map(lambda prompt: pair.generate(prompt, 110)[1], prompts))
    assert "KV cache pool is full. Retract requests." in pair.decode.text()
    alone = error(int4_server, prompts[0], pair.generate(prompts[0], 110)[1])
    assert max(error(int4_server, *pairs) for pairs in zip(prompts, crowded)) < 2 * alone + 0.02


@pytest.mark.parametrize(("prefill", "decode"), [(2, 1), (1, 2)])
def test_servers_of_other_numbers_of_ranks(model, tmp_path, prefill, decode):
    """A rank's rows go to the ranks that serve their heads. Wrong ones would cost as much as another prompt's, 0.5."""
    tiny = qwen3(model, tmp_path / "model")
    flags = [f"--tp-size {size}" for size in (prefill, decode)]
    servers = Pair(tiny, tmp_path, *flags, 3 * 2 * 68 * 2, SGLANG_CPU_OMP_THREADS_BIND="0|1")
    try:
        prompt = [(37 * i * i + 11 * i) % 4000 + 200 for i in range(200)]
        answer = servers.ready().generate(prompt, 24)[1]
    finally:
        servers.stop()
    expected = logprobs(load(tiny), prompt + [token for _, token in answer])[len(prompt) - 1 :]
    distance = gap([log for log, _ in answer], expected)
    print(f"{prefill} ranks to {decode}: {distance:.3f} from the model")
    assert distance < 0.1
