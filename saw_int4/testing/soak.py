"""Mixed traffic against a running server for as long as one likes, with looks at its memory in between.

Traffic comes in rounds. After each, when every client has its answer, the cache is flushed: then no token of the pool
may be in use, the first prompt must score as it did at first, bit for bit, and the processes' memory is noted.
"""

from __future__ import annotations

import re
import statistics
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from saw_int4.serve import request
from saw_int4.testing.traffic import Seen, Traffic, generate_body

SETTLED = 1 / 3  # of the rounds are warm-up: allocators and tables of the engine grow to their sizes
FEWEST_ROUNDS = 9  # from which a slope of memory is judged
FLAT = 0.02  # growth of memory per hour that counts as none, as a share of it
TROUBLE = re.compile(r"Traceback|\bERROR\b|[Ll]eak")


@dataclass
class Memory:
    """Bytes that nobody else could use, of each process by its title."""

    at_s: float
    by_process: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.by_process.values())


@dataclass
class Report:
    """What a soak saw. ``errors`` is empty when all was well."""

    seconds: float = 0
    rounds: int = 0
    retractions: int = 0
    pool_tokens: int = 0
    seen: Seen = field(default_factory=Seen)
    memory: list[Memory] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def growth_per_hour(self) -> float | None:
        """Slope of memory after warm-up, as a share of it; None where there were too few rounds to tell."""
        if len(self.memory) < FEWEST_ROUNDS:
            return None
        settled = self.memory[int(len(self.memory) * SETTLED) :]
        slope, _ = statistics.linear_regression([m.at_s for m in settled], [m.total for m in settled])
        return slope * 3600 / settled[0].total

    def problems(self) -> list[str]:
        """Everything that was wrong, in words."""
        found = self.errors + self.seen.errors
        growth = self.growth_per_hour()
        if growth is not None and growth > FLAT:
            found.append(f"memory grows by {growth:.1%} an hour, expected {FLAT:.0%} at most")
        for name in ("requests", "left", "aborted", "cached_tokens", "tokens"):
            if not getattr(self.seen, name):
                found.append(f"no {name}: this traffic shows nothing")
        if not self.retractions:
            found.append("no retractions: the pool was never too small")
        return found

    def lines(self) -> Iterator[str]:
        """The figures, for people."""
        seen, growth = self.seen, self.growth_per_hour()
        yield f"time         {self.seconds / 60:.1f} min, {self.rounds} rounds, pool of {self.pool_tokens} tokens"
        yield f"requests     {seen.requests} answered, {seen.left} left midway, {seen.aborted} aborted"
        hits = f"{seen.cached_tokens} of them from the cache"
        yield f"tokens       {seen.tokens} generated, {seen.prompt_tokens} of prompts, {hits}"
        if seen.verifications:
            drafts = seen.drafts_accepted
            yield f"drafts       {drafts} accepted in {seen.verifications} verifications"
        yield f"retractions  {self.retractions}"
        first, middle, last = (self.memory[i] for i in (0, len(self.memory) // 2, -1))
        for name in sorted(last.by_process):
            looks = [f"{m.by_process.get(name, 0) / 2**20:.0f}" for m in (first, middle, last)]
            yield f"memory       {name}: {', '.join(looks)} MiB at the first, middle and last look"
        slope = "not judged, too few rounds" if growth is None else f"{growth:+.2%} an hour after the first third"
        yield f"growth       {slope}"


def memory_of_session(session: int) -> dict[str, int]:
    """Bytes of anonymous and shared memory of every process of a session, by command; files' pages do not count."""
    found: dict[str, int] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            stat = (folder / "stat").read_text()
            if int(stat.rsplit(")", 1)[1].split()[3]) != session:
                continue
            status = (folder / "status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        name = stat[stat.index("(") + 1 : stat.rindex(")")]
        kilobytes = sum(int(n) for n in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.MULTILINE))
        found[name] = found.get(name, 0) + kilobytes * 1024
    return found


def every_number_of_rows(url: str, session: int, text_ids: list[int]) -> tuple[int, int]:
    """A prompt of every length up to a chunk's. Returns the processes' memory in bytes, before and after.

    On a CPU oneDNN keeps what it compiled for each number of rows that a weight was multiplied with: SmolLM2 with
    chunks of 128 takes some 300 MiB for it, with a cache in any format, and then no more.
    """
    before = sum(memory_of_session(session).values())
    for rows in range(1, request(f"{url}/server_info")["chunked_prefill_size"] + 1):
        request(f"{url}/generate", generate_body(text_ids[100 * rows :][:rows], 1))
    return before, sum(memory_of_session(session).values())


def soak(
    url: str,
    session: int,
    log: Path,
    text_ids: list[int],
    *,
    seconds: float,
    round_s: float = 120,
    clients: int = 6,
    say: Callable[[str], None] = print,
) -> Report:
    """Run traffic for so long against a server that runs in a session of its own.

    Args:
        log: the server's output; only what is new in it is looked at.
        text_ids: tokens that prompts are cut from, some twenty thousand.
    """
    info = request(f"{url}/server_info")
    context, report = info["context_length"], Report(pool_tokens=info["max_total_num_tokens"])
    traffic = [Traffic(url, text_ids, context, seed) for seed in range(clients)]
    probe = generate_body(text_ids[:300], 1, return_logprob=True, logprob_start_len=0)
    before = len(log.read_text(errors="replace"))
    _used_tokens(url)
    expected = _scores(url, probe)
    start = time.monotonic()
    while (now := time.monotonic() - start) < seconds:
        end = start + min(now + round_s, seconds)
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(lambda one, end=end: _client(one, end, report), traffic))
        report.rounds += 1
        _look(url, report, probe, expected)
        report.memory.append(Memory(time.monotonic() - start, memory_of_session(session)))
        say(
            f"round {report.rounds}: {report.seen.requests} requests, {report.memory[-1].total / 2**20:.0f} MiB, "
            f"{len(report.errors + report.seen.errors)} errors"
        )
        if report.errors:
            break
    report.seconds = time.monotonic() - start
    text = log.read_text(errors="replace")[before:]
    report.retractions = text.count("Retract requests")
    report.errors += [f"the server's log says: {line}" for line in text.splitlines() if TROUBLE.search(line)][:10]
    return report


def _client(traffic: Traffic, end: float, report: Report) -> None:
    while time.monotonic() < end and not report.errors:
        try:
            traffic.send(report.seen)
        except Exception as error:  # noqa: BLE001  (whatever a request dies of is a finding)
            report.errors.append(f"request {traffic.seed}-{traffic.sent}: {type(error).__name__}: {error}")


def _look(url: str, report: Report, probe: dict, expected: list[float]) -> None:
    """The server at rest: nothing in use, and the first prompt scores as it did."""
    try:
        used = _used_tokens(url)
        if used:
            report.errors.append(f"{used} tokens of the pool are in use with nobody there")
        if _scores(url, probe) != expected:
            report.errors.append("the first prompt scores otherwise than at first")
    except Exception as error:  # noqa: BLE001  (a dead server is a finding)
        report.errors.append(f"the server at rest: {type(error).__name__}: {error}")


def _used_tokens(url: str) -> int:
    """Tokens of the pool in use after a flush, which waits until requests whose clients left have ended."""
    flush = urllib.request.Request(f"{url}/flush_cache?timeout=30", b"", method="POST")
    with urllib.request.urlopen(flush, timeout=60):
        pass
    [load] = request(f"{url}/v1/loads")["loads"]
    return load["num_used_tokens"]


def _scores(url: str, probe: dict) -> list[float]:
    meta = request(f"{url}/generate", probe)["meta_info"]
    return [entry[0] for entry in meta["input_token_logprobs"][1:]]
