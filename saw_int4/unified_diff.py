"""Unified diffs of files of SGLang, applied exactly where they say: a line that is elsewhere is an error."""

from __future__ import annotations

import re
from dataclasses import dataclass

REPOSITORY_PREFIX = "python/sglang/"  # where SGLang's own repository keeps the package; paths in the diffs start so


class PatchError(RuntimeError):
    """The tree or the series is not what it has to be. Nothing was changed."""


@dataclass(frozen=True)
class Hunk:
    """One hunk of a unified diff: the 0-based line it starts at in the old and the new file, and its lines."""

    old_start: int
    new_start: int
    old: list[bytes]
    new: list[bytes]


def parse(name: str, text: bytes) -> tuple[str, list[Hunk]]:
    """Path relative to the package, and the hunks, of a unified diff of one file."""
    lines = text.splitlines(keepends=True)
    head = next((i for i, line in enumerate(lines) if line.startswith(b"--- ")), len(lines))
    if not b"".join(lines[head + 1 : head + 2]).startswith(b"+++ b/"):
        raise PatchError(f"{name}: expected a unified diff of one file.")
    path = lines[head + 1][6:].decode().strip()
    if not path.startswith(REPOSITORY_PREFIX) or ".." in path.split("/"):
        raise PatchError(f"{name}: changes {path}, expected a file under {REPOSITORY_PREFIX}.")
    hunks, at = [], head + 2
    while at < len(lines):
        hunk, at = _parse_hunk(name, lines, at)
        hunks.append(hunk)
    return path.removeprefix(REPOSITORY_PREFIX), hunks


def _parse_hunk(name: str, lines: list[bytes], at: int) -> tuple[Hunk, int]:
    """The hunk whose head is line ``at``, and the line after it."""
    match = re.match(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@", lines[at])
    if match is None:
        raise PatchError(f"{name}, line {at + 1}: expected the head of a hunk, got {lines[at]!r}.")
    starts, sizes = [int(match[i]) for i in (1, 3)], [1 if match[i] is None else int(match[i]) for i in (2, 4)]
    old, new, at = [], [], at + 1
    while len(old) < sizes[0] or len(new) < sizes[1]:
        kind, line = (lines[at][:1], lines[at][1:]) if at < len(lines) else (b"", b"")
        if kind not in (b" ", b"-", b"+"):
            raise PatchError(f"{name}, line {at + 1}: expected {sizes[0]} old and {sizes[1]} new lines in the hunk.")
        old += [line] if kind != b"+" else []
        new += [line] if kind != b"-" else []
        at += 1
        if at < len(lines) and lines[at].startswith(b"\\"):  # "No newline at end of file"
            for side in (old if kind != b"+" else [], new if kind != b"-" else []):
                side[-1:] = [line.removesuffix(b"\n")] if side else []
            at += 1
    if [len(old), len(new)] != sizes:
        raise PatchError(f"{name}: a hunk has {len(old)} old and {len(new)} new lines, its head says {sizes}.")
    # Lines count from 1; an empty side names the line before it.
    old_start, new_start = (start - 1 if size else start for start, size in zip(starts, sizes))
    return Hunk(old_start, new_start, old, new), at


def patched(path: str, content: bytes, hunks: list[Hunk], reverse: bool = False) -> bytes:
    """The content after the hunks, or before them. Every line must be where the diff has it.

    Raises:
        PatchError: one is not.
    """
    lines, result, at = content.splitlines(keepends=True), [], 0
    for hunk in hunks:
        start, here, there = (hunk.new_start, hunk.new, hunk.old) if reverse else (hunk.old_start, hunk.old, hunk.new)
        if lines[start : start + len(here)] != here:
            raise PatchError(f"{path}: lines {start + 1} to {start + len(here)} are not those of the patch.")
        result += lines[at:start] + there
        at = start + len(here)
    return b"".join(result + lines[at:])
