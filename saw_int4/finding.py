"""One line of ``saw-int4 doctor``."""

from __future__ import annotations

from dataclasses import dataclass

OK, NOTE, WARNING, BROKEN = "ok", "note", "warning", "broken"


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and, unless it is ok, what to do about it."""

    level: str
    subject: str
    text: str
    hint: str = ""

    def __str__(self) -> str:
        line = f"{self.level:8} {self.subject:11} {self.text}"
        return f"{line}\n{'':20} hint: {self.hint}" if self.hint else line
