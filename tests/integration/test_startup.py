"""Ways to start a server, in real processes; and servers whose plugin was sabotaged, which must not come up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import qwen3_moe
from server import HERE, Server, environment, tiers_and_answers

from saw_int4 import env
from saw_int4.calibration.calibrate import path_of
from saw_int4.calibration.fingerprint import model_fingerprint
from saw_int4.format import KVFormat

ARGS = ["--max-total-tokens", "2048", "--context-length", "512", "--max-running-requests", "4"]
IDS = list(range(100, 180))


@pytest.fixture(scope="module")
def tiny(model, tmp_path_factory) -> Path:
    """A random Qwen3 with experts, head_dim 128, as many KV heads as query heads."""
    return qwen3_moe(model, tmp_path_factory.mktemp("qwen3") / "model")


@pytest.fixture(scope="module")
def expected(tiny) -> list[float]:
    """Log probabilities that transformers gives in float32 on 16-bit weights."""
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        logs = reference(torch.tensor([IDS])).logits[0].log_softmax(-1)
    return logs[range(len(IDS) - 1), IDS[1:]].tolist()


# Mean |difference| of log probabilities: quantization costs 0.06 on this model, another prompt's context 0.57.
LIMIT = 0.1


def mean_gap(got: list[float], want: list[float]) -> float:
    return sum(abs(a - b) for a, b in zip(got, want, strict=True)) / len(want)


def test_sglang_serve_with_the_forks_variables(tiny, logs, expected):
    """``sglang serve``, head_dim 128, K and V rotated at order 32."""
    command = [str(Path(sys.executable).parent / "sglang"), "serve"]
    variables = {"HADAMARD": "1", "ROTATE_V": "1", "HADAMARD_ORDER": "32"}
    server = Server(tiny, logs / "serve.log", *ARGS, "--kv-cache-dtype", "int4", command=command, **variables)
    try:
        server.ready()
        cache = server.state()["kv_cache_format"]
        assert cache["fingerprint"] == KVFormat(128, 32, rotate_v=True).fingerprint
        assert cache["bfloat16_bytes_per_token"] / cache["bytes_per_token"] == pytest.approx(3.76, rel=0.01)
        assert "HADAMARD=1, ROTATE_V=1: became SAW_INT4_ROTATION=kv" in server.text()
        assert mean_gap(server.prompt_logprobs(IDS), expected) < LIMIT
    finally:
        server.stop()


def test_four_ranks(tiny, logs, expected):
    """Two stages of two ranks, calibrated, two groups per row; each rank with a host tier and files of its own."""
    store = logs / "store-of-ranks"
    store.mkdir()
    tiers = "--enable-hierarchical-cache --hicache-ratio 4 --hicache-io-backend direct --hicache-storage-backend file"
    tiers += " --hicache-storage-prefetch-policy wait_complete --enable-cache-report"
    tiers += " --page-size 16 --chunked-prefill-size 128"  # a prompt of 400 is cut where its hit will end
    arguments = [*ARGS, *tiers.split(), "--kv-cache-dtype", "int4", "--tp-size", "2", "--pp-size", "2"]
    token_bytes = 2 * 2 * 72  # of a layer on a rank; the stages have one and two of the three
    variables = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1|0|1", "SAW_INT4_CALIBRATION": "auto", "SAW_INT4_GROUPS": "2"}
    variables |= {"HOME": str(logs), "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}  # as other tests use memory too
    variables |= {"SAW_TEST_CACHE_BYTES": str(1024 * 2 * token_bytes)}
    variables |= {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(store)}
    server = Server(tiny, logs / "tp.log", *arguments, **variables)
    try:
        server.ready()
        cache = server.state()["kv_cache_format"]
        found = env.Options(calibration=str(path_of(model_fingerprint(tiny), 128, 2, home=logs)), groups=2)
        assert cache["fingerprint"] == found.kv_format(128).fingerprint
        assert (cache["layers"], cache["bytes_per_token"]) == ([0], token_bytes)
        assert cache["bytes_per_token_on_all_ranks"] == 2 * 3 * token_bytes
        assert mean_gap(server.prompt_logprobs(IDS), expected) < LIMIT

        tiers, (cold, *hits) = tiers_and_answers(server, 400, 16, 8)
        assert tiers[1:] == ["device", "host", "storage"]
        assert hits == [cold] * 3
        ranks = {file.stem.split("_", 1)[1] for file in store.glob("*.bin")}
        assert {name[-7:] for name in ranks} == {f"{tp}_2_2_{pp}" for tp in range(2) for pp in range(2)}
    finally:
        server.stop()


@pytest.mark.both_versions
def test_engine(tiny, expected, tmp_path):
    """``sgl.Engine(kv_cache_dtype="int4")``."""
    script = tmp_path / "engine.py"
    script.write_text(
        "import json, sys\n"
        "from saw_int4.torchvision_compat import define_missing_operators\n"
        "define_missing_operators()\n"
        "import sglang as sgl\n"
        "if __name__ == '__main__':\n"
        "    engine = sgl.Engine(model_path=sys.argv[1], kv_cache_dtype='int4', max_total_tokens=2048,\n"
        "                        context_length=512, max_running_requests=4, log_level='error', page_size=64)\n"
        f"    answer = engine.generate(input_ids={IDS}, sampling_params={{'max_new_tokens': 1, 'temperature': 0}},\n"
        "                             return_logprob=True, logprob_start_len=0)\n"
        "    cache = engine.get_server_info()['internal_states'][0]['kv_cache_format']\n"
        "    logs = [e[0] for e in answer['meta_info']['input_token_logprobs'][1:]]\n"
        "    print('RESULT', json.dumps([cache['fingerprint'], logs]), flush=True)\n"
        "    engine.shutdown()\n"
    )
    run = subprocess.run(
        [sys.executable, str(script), str(tiny)], env=environment(), capture_output=True, text=True, timeout=400
    )
    line = next((line for line in run.stdout.splitlines() if line.startswith("RESULT ")), None)
    assert line is not None, run.stderr[-4000:]
    fingerprint, logs = json.loads(line[7:])
    assert fingerprint == KVFormat(128, 128).fingerprint
    assert mean_gap(logs, expected) < LIMIT


SABOTAGED = [sys.executable, str(HERE / "sabotaged_server.py")]


@pytest.mark.parametrize(
    ("sabotage", "said"),
    [
        ("configure_kv_cache_dtype", "kv_cache_dtype.configure_kv_cache_dtype is missing"),
        ("Scheduler.__init__", "scheduler.Scheduler.__init__ is missing"),
        ("_compute_cell_size", "DefaultPoolConfigurator._compute_cell_size is missing"),
    ],
)
def test_hook_that_fails_in_the_scheduler_process(tiny, logs, sabotage, said):
    """The parent is sound; SGLang swallows the failure in the child; the server must end instead of serving."""
    arguments = [*ARGS, "--kv-cache-dtype", "int4"]
    log = logs / f"sabotage-{sabotage}.log"
    server = Server(tiny, log, *arguments, command=SABOTAGED, SAW_TEST_SABOTAGE=sabotage)
    text = server.wait_for_exit()
    assert said in text or "Unsupported kv_cache_dtype: int4" in text
    assert "fired up" not in text


def test_plugin_switched_off(tiny, logs):
    command = [sys.executable, "-m", "sglang.launch_server"]
    arguments = [*ARGS, "--kv-cache-dtype", "int4"]
    server = Server(tiny, logs / "off.log", *arguments, command=command, SGLANG_PLUGINS="saw_int4_cpu")
    text = server.wait_for_exit()
    assert "--kv-cache-dtype" in text and "invalid choice: 'int4'" in text
