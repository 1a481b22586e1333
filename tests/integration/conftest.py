"""Servers shared by the whole session: each start costs half a minute."""

from __future__ import annotations

import importlib.util
import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

import pytest

from saw_int4.torchvision_compat import define_missing_operators

sys.path.insert(0, str(Path(__file__).parent))

if importlib.util.find_spec("sglang") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    define_missing_operators()
    os.environ.setdefault("SAW_INT4_CPU_PLATFORM", "1")

from server import ROOT, Server  # noqa: E402

POOL_TOKENS = 1024
CONTEXT = 1024
CALIBRATED = {"SAW_INT4_CALIBRATION": "auto"}
CHUNK = 128
PAGE = 16
ARGS = (
    f"--page-size {PAGE} --chunked-prefill-size {CHUNK} --context-length {CONTEXT} --max-running-requests 16 "
    "--schedule-conservativeness 0.05"
).split()
# SGLang admits a request that fits with so many tokens of its answer: longer answers overfill the pool, and requests
# are retracted.
OVERFILL = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "8"}


@pytest.fixture(scope="session")
def model() -> Path:
    """SmolLM2-135M-Instruct: 30 layers, 9 query heads on 3 KV heads, head_dim 64."""
    known = os.environ.get("SAW_INT4_TEST_MODEL", ROOT / ".cache/models/SmolLM2-135M-Instruct")
    if Path(known).exists():
        return Path(known)
    script = [sys.executable, str(ROOT / "scripts/prepare_model.py")]
    return Path(subprocess.run(script, check=True, capture_output=True, text=True).stdout.strip())


@pytest.fixture(scope="session")
def tokenizer(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="session")
def text_ids(tokenizer) -> list[int]:
    """Tokens of real English text, the documentation that comes with Python."""
    topics = pydoc_data.topics.topics
    return tokenizer("\n\n".join(topics[name] for name in sorted(topics))[:200_000]).input_ids


@pytest.fixture(scope="session")
def logs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def int4_server(model, logs):
    """INT4 with default options (calibrated), a small pool, small prefill chunks."""
    token_bytes = 30 * 3 * 36 * 2
    env = {"SAW_TEST_CACHE_BYTES": str(POOL_TOKENS * token_bytes), "SAW_TEST_FAULT": str(logs / "fault"), **CALIBRATED}
    env["HOME"] = str(logs)  # where its artifact is kept
    args = [*ARGS, "--kv-cache-dtype", "int4", "--enable-metrics"]
    server = Server(model, logs / "int4.log", *args, **OVERFILL, **env)
    try:
        yield server.ready()
    finally:
        server.stop()


@pytest.fixture(scope="session")
def bf16_server(model, logs):
    """The same server with SGLang's own 16-bit cache, of the same number of tokens."""
    env = {"SAW_TEST_CACHE_BYTES": str(POOL_TOKENS * 30 * 3 * 64 * 2 * 2)}
    server = Server(model, logs / "bf16.log", *ARGS, **OVERFILL, **env)
    try:
        yield server.ready()
    finally:
        server.stop()
