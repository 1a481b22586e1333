"""Requests to a running server over HTTP: some wait for their answer, some leave, some are aborted."""

from __future__ import annotations

import json
import random
import threading
import urllib.request
from dataclasses import dataclass, field

from saw_int4.serve import request

SHARED_PREFIXES = 6
FIRST_LINES = 3  # of a stream, that a client who leaves has seen


def generate_body(input_ids: list[int], max_new_tokens: int, temperature: float = 0, **more) -> dict:
    """``/generate`` with so many tokens, whatever they are."""
    sampling = {"temperature": temperature, "max_new_tokens": max_new_tokens, "ignore_eos": True}
    return {"input_ids": input_ids, "sampling_params": sampling, **more}


def interrupt(url: str, body: dict, abort: bool = False, timeout: float = 600) -> dict | None:
    """Stream an answer; after its first lines leave, or have it aborted and read on.

    Returns:
        The last event's ``meta_info`` of an aborted answer.
    """
    data = json.dumps({**body, "stream": True}).encode()
    call = urllib.request.Request(f"{url}/generate", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=timeout) as answer:
        for _ in range(FIRST_LINES):
            answer.readline()
        if not abort:
            return None
        request(f"{url}/abort_request", {"rid": body["rid"]})
        events = [json.loads(line[6:]) for line in answer if line.startswith(b"data: {")]
    return events[-1]["meta_info"] if events else None


@dataclass
class Seen:
    """What came back: counts, and everything that should not have happened. ``requests`` are those answered in full."""

    requests: int = 0
    left: int = 0
    aborted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    drafts_accepted: int = 0
    verifications: int = 0
    errors: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __iadd__(self, counts: dict[str, int]) -> Seen:
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)
        return self

    def answer(self, meta: dict, asked: int) -> None:
        """Count an answer; note one that is not of the length or the numbers that it must have."""
        self += {
            "requests": 1,
            "prompt_tokens": meta["prompt_tokens"],
            "cached_tokens": meta["cached_tokens"],
            "tokens": meta["completion_tokens"],
            "drafts_accepted": meta.get("spec_num_correct_drafts", 0),
            "verifications": meta.get("spec_verify_ct", 0),
        }
        if meta["completion_tokens"] != asked:
            self.errors.append(f"answer of {meta['completion_tokens']} tokens, asked for {asked}")
        logs = [entry[0] for entry in meta.get("output_token_logprobs", ())]
        if not all(-100 < log <= 1e-3 for log in logs):
            self.errors.append(f"log probabilities {logs}")


class Traffic:
    """A client's endless requests, in random order: short and long, with shared prefixes, greedy and sampled.

    Long prompts are prefilled in chunks, repetitive ones are drafted well by ngrams. One in eight leaves midway, one
    in eight is aborted.
    """

    def __init__(self, url: str, text_ids: list[int], context: int, seed: int) -> None:
        self.url, self.text, self.context, self.seed = url, text_ids, context, seed
        self.random = random.Random(seed)
        self.sent = 0

    def prompt(self) -> list[int]:
        kind = self.random.choice(("short", "prefix", "prefix", "long", "repetitive"))
        if kind == "prefix":
            start = self.random.randrange(SHARED_PREFIXES) * 3000
            return self.text[start : start + self.random.randint(40, self.context // 3)] + self._part(4, 40)
        if kind == "long":
            return self._part(self.context // 2, self.context - 100)
        return self._part(6, 20) * 6 if kind == "repetitive" else self._part(4, 60)

    def _part(self, least: int, most: int) -> list[int]:
        start = self.random.randrange(len(self.text) - most)
        return self.text[start : start + self.random.randint(least, most)]

    def send(self, seen: Seen) -> None:
        """One request, to its end."""
        self.sent += 1
        asked = self.random.choice((4, 8, 8, 16, 48, 80))
        rid = f"soak-{self.seed}-{self.sent}"
        temperature = self.random.choice((0, 0, 0.8))
        body = generate_body(self.prompt(), asked, temperature, return_logprob=self.random.random() < 0.5, rid=rid)
        fate = self.random.random()
        if fate < 1 / 8:
            interrupt(self.url, body)
            seen += {"left": 1}
        elif fate < 1 / 4:
            meta = interrupt(self.url, body, abort=True)
            seen += {"aborted": int(meta is not None and meta["finish_reason"]["type"] == "abort")}  # else it was done
        else:
            seen.answer(request(f"{self.url}/generate", body, timeout=600)["meta_info"], asked)
