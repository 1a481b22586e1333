"""Many clients, a pool far too small for them, and clients that leave: every answer must still be the request's own.

What shares a batch changes how matrix products round, and 4-bit rounding amplifies that: greedy answers part at near
ties, and tell nothing from there on. So each answer is given back, token for token, to the same server when it is idle
and empty, which scores it in one prefill. The measure is how far the tokens' log probabilities moved between the two.
Answers generated alone say what INT4's own rounding moves, BF16 under the same load what the load does to matrix
products; planted faults say what would be seen.
"""

from __future__ import annotations

import random
import re
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import POOL_TOKENS
from server import Server, output_logprobs

from saw_int4.testing import traffic
from saw_int4.testing.soak import FEWEST_ROUNDS, Memory, Report, soak

CLIENTS, REQUESTS, DISTINCT = 16, 200, 16
SHORT, LONG = 8, 64


@dataclass
class Load:
    """Prompts with shared prefixes of random length, how many tokens to generate, and who leaves midway."""

    prompts: list[list[int]]
    lengths: list[int]
    leaves: list[bool]

    def stays(self, count: int) -> list[int]:
        """Of the first ``count`` requests, those that wait for their answer."""
        return [i for i in range(count) if not self.leaves[i]]


@pytest.fixture(scope="module")
def load(text_ids) -> Load:
    random.seed(7)
    bases = [text_ids[i * 3000 :][:120] for i in range(4)]
    distinct = []
    for i in range(DISTINCT):
        start = 15_000 + 40 * i
        distinct.append(
            random.choice(bases)[: random.randint(16, 120)] + text_ids[start : start + random.randint(6, 30)]
        )
    return Load(
        prompts=[random.choice(distinct) for _ in range(REQUESTS)],
        # Short requests are admitted while long ones still grow: the pool overflows, and some are retracted.
        lengths=[random.choice((SHORT, SHORT, LONG)) for _ in range(REQUESTS)],
        leaves=[random.random() < 0.1 for _ in range(REQUESTS)],
    )


Answers = dict[int, list[tuple[float, int]]]  # request -> (log probability, token) of each generated token


def answers_under_load(server: Server, load: Load, count: int) -> Answers:
    """The first ``count`` requests, by 16 clients at once."""

    def one(i: int):
        if load.leaves[i]:
            return traffic.interrupt(server.url, traffic.generate_body(load.prompts[i], load.lengths[i]))
        return output_logprobs(server.generate(load.prompts[i], load.lengths[i], return_logprob=True))

    server.flush()
    with ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(one, range(count)))
    return {i: found[i] for i in load.stays(count)}


def answers_alone(server: Server, load: Load, count: int) -> Answers:
    """Long answers, each from an empty and idle server."""
    answers = {}
    for i in [i for i in load.stays(REQUESTS) if load.lengths[i] == LONG][:count]:
        server.flush()
        answers[i] = output_logprobs(server.generate(load.prompts[i], LONG, return_logprob=True))
    return answers


@dataclass
class Moved:
    """Mean |change| of a token's log probability when its answer is scored alone: of all tokens, of the worst answer.

    Answers of 8 tokens count in the mean only.
    """

    mean: float
    worst: float

    def explained_by(self, alone: Moved, load: float) -> bool:
        """Whether INT4's rounding, seen alone, and what the load does to BF16 (a factor) explain this."""
        return self.mean <= 1.5 * load * alone.mean and self.worst <= 2.5 * load * alone.worst


def moved(server: Server, load: Load, answers: Answers) -> Moved:
    changes, worst = [], 0.0
    for i, answer in answers.items():
        assert len(answer) == load.lengths[i]
        server.flush()
        ids = load.prompts[i] + [token for _, token in answer]
        scored = server.generate(ids, 1, return_logprob=True, logprob_start_len=len(load.prompts[i]) - 1)
        logs = [entry[0] for entry in scored["meta_info"]["input_token_logprobs"][-len(answer) :]]
        change = [abs(a - b) for (a, _), b in zip(answer, logs, strict=True)]
        changes += change
        worst = max(worst, statistics.fmean(change) if len(change) == LONG else 0.0)
    return Moved(statistics.fmean(changes), worst)


@pytest.fixture(scope="module")
def alone(int4_server, load) -> Moved:
    """INT4 without any load."""
    return moved(int4_server, load, answers_alone(int4_server, load, 6))


@pytest.fixture(scope="module")
def load_factor(bf16_server, load) -> float:
    """How many times more BF16's log probabilities move under the load than alone; at least 1."""
    quiet = moved(bf16_server, load, answers_alone(bf16_server, load, 6))
    busy = moved(bf16_server, load, answers_under_load(bf16_server, load, 48))
    print(f"bf16: alone {quiet}, under load {busy}")
    return max(1.0, busy.mean / quiet.mean)


def test_answers_under_pressure(int4_server, load, alone, load_factor):
    before = len(int4_server.text())
    answers = answers_under_load(int4_server, load, REQUESTS)
    log = int4_server.text()[before:]
    found = moved(int4_server, load, answers)
    print(f"int4: alone {alone}, under load {found}, {log.count('Retract requests')} retractions")
    assert found.explained_by(alone, load_factor), (found, alone, load_factor)
    assert "Retract requests" in log
    assert re.search(r"Traceback|\bERROR\b|[Ll]eak", log) is None
    int4_server.flush()
    assert int4_server.state()["test_free_tokens"] == POOL_TOKENS


@pytest.mark.parametrize("fault", ["wrong_slot", "lost_scale"])
def test_a_planted_fault_is_seen(int4_server, load, alone, load_factor, logs, fault):
    """Of each write, the first and last token trade slots, or every fourth key loses its parameters."""
    Path(logs / "fault").write_text(fault)
    try:
        answers = answers_under_load(int4_server, load, 24)
    finally:
        Path(logs / "fault").unlink()
        int4_server.flush()
    found = moved(int4_server, load, answers)
    print(f"{fault}: {found}")
    assert not found.explained_by(alone, load_factor), (found, alone, load_factor)


def test_soak(int4_server, text_ids, logs):
    """Two rounds of scripts/soak.py's traffic; a fault that is planted before the second one is seen after it."""
    fault = logs / "fault"
    try:
        report = soak(
            int4_server.url,
            int4_server.process.pid,
            int4_server.log,
            text_ids,
            seconds=300,  # the first error ends it, however slow the machine
            round_s=8,
            say=lambda _: fault.write_text("lost_scale"),
        )
    finally:
        fault.unlink(missing_ok=True)
        int4_server.flush()
    print("\n".join(report.lines()))
    assert report.rounds == 2
    assert report.seen.requests > 5
    assert report.memory[0].total > 2**28
    assert report.errors == ["the first prompt scores otherwise than at first"]


def test_growing_memory():
    """Of a server of a GiB: 1 % an hour is flat, 5 % is not, and nothing is said of a few looks."""

    def problems(per_hour: float, rounds: int) -> list[str]:
        looks = [Memory(120.0 * i, {"scheduler": int(2**30 * (1 + per_hour * i / 30))}) for i in range(rounds)]
        return [text for text in Report(memory=looks).problems() if "memory" in text]

    assert problems(0.01, 30) == []
    assert problems(0.05, FEWEST_ROUNDS - 1) == []
    assert "memory grows by 4.9% an hour" in problems(0.05, 30)[0]
