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
from conftest import ARGS, CALIBRATED, PAGE, POOL_TOKENS
from server import HERE, ROOT, Server, free_port, output_logprobs

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
    """A prefill server with HiCache and file storage, and a decode server."""

    def __init__(self, model: Path, logs: Path) -> None:
        self.store = logs / "store"
        self.store.mkdir()
        self.bootstrap, self.rooms = free_port(), count(1)
        shared = {"SAW_TEST_CACHE_BYTES": str(POOL_TOKENS * 30 * 3 * 36 * 2), "HOME": str(logs), **CALIBRATED}
        shared["PYTHONPATH"] = os.pathsep.join([str(ROOT), *mooncake_path(), os.environ.get("PYTHONPATH", "")])
        args = [*ARGS, "--kv-cache-dtype", "int4", *TRANSFER, "--disaggregation-bootstrap-port", str(self.bootstrap)]
        tiers = "--enable-hierarchical-cache --hicache-ratio 4 --hicache-storage-backend file --enable-cache-report"
        tiers += " --hicache-storage-prefetch-policy wait_complete --disaggregation-mode prefill"
        lend = "--disaggregation-mode decode --num-reserved-decode-tokens 16"
        folder = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(self.store)}
        self.prefill = Server(model, logs / "prefill.log", *args, *tiers.split(), **shared, **folder)
        self.decode = Server(model, logs / "decode.log", *args, *lend.split(), **shared)

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
def pair(model, int4_server, logs):
    """The calibration is the other server's, in the same home."""
    servers = Pair(model, logs)
    try:
        servers.prefill.ready()
        servers.decode.ready()
        yield servers
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


def test_storage_is_named_by_format_and_model(pair, model):
    """A server that is started again, or elsewhere, has the same name for the same rows."""
    description = pair.prefill.state()["kv_cache_format"]["format"]
    calibration = description.split("calibration ")[1].split(",")[0]
    rows = f"int4-{KVFormat(64, 64, rotate_v=True, calibration=calibration).fingerprint}"
    name = transfers.storage_name(rows, "page_first_direct", str(model), "{}")
    files = [file.name for file in pair.store.glob("*.bin")]
    assert len(files) >= FOUND // PAGE
    assert all(file.endswith(f"-{name}_0_1.bin") for file in files)


def test_rows_of_another_format_in_storage_are_not_read(pair, prompt, cold):
    """The same files under the name of another transform: the prompt is computed again."""
    [fingerprint] = {file.name.split("-int4-")[1].split("-")[0] for file in pair.store.glob("*.bin")}
    for file in list(pair.store.glob("*.bin")):
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
