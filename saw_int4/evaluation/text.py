"""Texts that are on every machine with Python: one to evaluate on, others to calibrate on. None is tuned on."""

from __future__ import annotations

import importlib
import inspect

import torch
from torch import Tensor

_DOCUMENTED = (
    "argparse collections csv datetime decimal difflib email.message fractions functools heapq http.client imaplib "
    "inspect ipaddress itertools locale logging mailbox optparse pathlib pickle random re shutil socket statistics "
    "string subprocess tarfile tempfile textwrap threading traceback typing unittest urllib.request uuid zipfile"
)
_CODE = "argparse dataclasses difflib heapq tarfile textwrap zipfile"


def topics() -> str:
    """The evaluation text: Python's language reference, as ``help()`` shows it."""
    from pydoc_data.topics import topics as by_name

    return "\n\n".join(by_name.values())


def docstrings() -> str:
    """Library documentation."""
    found = []
    for name in _DOCUMENTED.split():
        module = importlib.import_module(name)
        found.append(inspect.getdoc(module) or "")
        for member in vars(module).values():
            if inspect.isclass(member) and member.__module__ == name:
                found += [inspect.getdoc(f) or "" for f in vars(member).values() if inspect.isfunction(f)]
    return "\n\n".join(x for x in found if x)


def code() -> str:
    """Python source."""
    return "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in _CODE.split())


def random_tokens(vocabulary: int, count: int) -> Tensor:
    """int64 ``[count]``, uniform: the worst calibration text there is."""
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(0))


def windows(ids: Tensor, length: int, count: int, bos: int | None = None) -> list[Tensor]:
    """``count`` windows of ``length`` tokens, spread evenly over the whole text.

    A text that opens with ``bos`` gives windows that do: without it, a model trained with one is not itself.

    Raises:
        ValueError: the text is too short for them.
    """
    if bos is not None and int(ids[0]) == bos:
        return [torch.cat([ids[:1], window]) for window in windows(ids[1:], length - 1, count)]
    if len(ids) < length * count:
        raise ValueError(
            f"evaluation text: {len(ids)} tokens, {count} windows of {length} need {length * count}. "
            "Ask for fewer or shorter windows, or give a longer text."
        )
    stride = (len(ids) - length) // max(1, count - 1)
    return [ids[i * stride : i * stride + length] for i in range(count)]
