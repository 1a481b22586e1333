"""Questions for lm-eval from Python's own documentation: which of four functions does a sentence describe?"""

import importlib
import inspect
import random

MODULES = (
    "bisect calendar collections contextlib csv datetime decimal difflib email.utils fractions functools glob gzip "
    "heapq html inspect ipaddress itertools json locale logging math operator os os.path pathlib pickle platform "
    "pprint random re secrets shlex shutil socket statistics string struct subprocess tarfile tempfile textwrap "
    "threading time traceback unicodedata urllib.parse urllib.request uuid warnings zipfile"
)
CHOICES = 4


def dataset(**kwargs) -> dict:
    """Split -> ``datasets.Dataset`` of the questions, as lm-eval wants it."""
    from datasets import Dataset

    return {"test": Dataset.from_list(questions())}


def questions() -> list[dict]:
    """One for each function that a sentence describes; the same in every run of one Python version."""
    described = {}
    for module in MODULES.split():
        for name, member in vars(importlib.import_module(module)).items():
            words = (inspect.getdoc(member) or "").split("\n\n")[0].split() if inspect.isroutine(member) else []
            told = name.lower() in " ".join(words).lower()
            if 8 <= len(words) <= 40 and len(name) > 3 and not name.startswith("_") and not told:
                described[name] = " ".join(words)
    draw = random.Random(0)
    names = sorted(described)
    found = []
    for name in names:
        choices = draw.sample([other for other in names if other != name], CHOICES - 1)
        choices.insert(draw.randrange(CHOICES), name)
        found.append({"description": described[name], "choices": choices, "answer": choices.index(name)})
    return found
