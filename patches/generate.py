#!/usr/bin/env python3
"""Writes patches/sglang-<version>/ for the SGLang that this Python has installed, which must be unmodified.

    python patches/generate.py            after a change of the plugin's seams, once per supported SGLang

The seams are the plugin's (``register.hooks``): each function there gets the decorator ``int4_seam``. What is no
function call (choices, tables, the module that brings the decorator) is listed here.
"""

import ast
import difflib
import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path

PATCHES = Path(__file__).resolve().parent
sys.path.insert(0, str(PATCHES.parent))

from saw_int4 import patching, unified_diff  # noqa: E402
from saw_int4.sglang_plugin import register  # noqa: E402
from saw_int4.torchvision_compat import define_missing_operators  # noqa: E402

MODULE = "srt/int4_kv_cache.py"
MODULE_TEXT = '''"""INT4 KV cache: the functions of SGLang that the saw_int4 package has a part in.

Without saw_int4 installed nothing changes, and --kv-cache-dtype int4 is not offered.
"""

from importlib.util import find_spec

if find_spec("saw_int4") is not None:
    from saw_int4.sglang_plugin.native import (
        attention_backends,
        int4_seam,
        kv_cache_dtypes,
        resolution_hooks,
    )
else:

    def int4_seam(function):
        return function

    def attention_backends():
        return {}

    def kv_cache_dtypes():
        return []

    def resolution_hooks():
        return {}
'''

# File, name to import, text that occurs once, text to put in its place, reason.
EDITS = [
    (
        "srt/arg_groups/fields/model.py",
        "kv_cache_dtypes",
        '                "fp4_mx_block16",\n            ],\n',
        '                "fp4_mx_block16",\n                *kv_cache_dtypes(),\n            ],\n',
        "accept --kv-cache-dtype int4",
    ),
    (
        "srt/arg_groups/choices.py",
        "attention_backends",
        '    "ascend",\n    "intel_xpu",\n]\n\n# trtllm_mha is valid',
        '    "ascend",\n    "intel_xpu",\n    *attention_backends(),\n]\n\n# trtllm_mha is valid',
        "accept --attention-backend saw_int4",
    ),
    (
        "srt/arg_groups/resolution_hooks.py",
        "resolution_hooks",
        "_HOOKS: Dict[str, List[Callable[[Any, Callable[[Any], None]], None]]] = {}\n",
        "_HOOKS: Dict[str, List[Callable[[Any, Callable[[Any], None]], None]]] = (\n    resolution_hooks()\n)\n",
        "select the backend for int4, refuse what cannot work with it",
    ),
    (
        "srt/layers/attention/attention_registry.py",
        "attention_backends",
        "ATTENTION_BACKENDS = {}\n",
        "ATTENTION_BACKENDS = attention_backends()\n",
        "know the attention backend that reads INT4 rows",
    ),
]


def main() -> None:
    define_missing_operators()
    tree = patching.find_sglang()
    folder = PATCHES / f"sglang-{tree.version}"
    series = compose(tree.root)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, text in series.items():
        (folder / name).write_text(text)
    print(f"{folder}: {len(series) - 1} patches")


def compose(root: Path) -> dict[str, str]:
    """The series for an unmodified tree: file name to text, manifest included."""
    changed = {MODULE: ("bring saw_int4's part in, where it is installed", None, MODULE_TEXT)}
    for path, name, old, new, reason in EDITS:
        before = (root / path).read_text()
        if before.count(old) != 1:
            raise SystemExit(f"{path}: expected this text once, found it {before.count(old)} times:\n{old}")
        changed[path] = (reason, before, add_import(before.replace(old, new), name))
    for path, functions in seams(root).items():
        before = (root / path).read_text()
        after = add_import(decorate(before, functions), "int4_seam")
        changed[path] = ("saw_int4 has a part in\n\n" + "\n".join(functions), before, after)

    series, files = {}, {}
    for number, (path, (reason, before, after)) in enumerate(changed.items(), 1):
        stem = path.removeprefix("srt/").removesuffix(".py").replace("/", "-")
        series[f"{number:04d}-{stem}.patch"] = patch_text(path, reason, before, after)
        files[path] = {
            "before": None if before is None else patching.digest(before.encode()),
            "after": patching.digest(after.encode()),
        }
    series["manifest.json"] = json.dumps(files, indent=2) + "\n"
    return series


def patch_text(path: str, reason: str, before: str | None, after: str) -> str:
    """One file's unified diff, with paths as in SGLang's repository, so that ``git apply`` takes it there."""
    repo_path = unified_diff.REPOSITORY_PREFIX + path
    head = f"{repo_path}: {reason}\n\ndiff --git a/{repo_path} b/{repo_path}\n"
    old = f"a/{repo_path}"
    if before is None:
        head, old = head + "new file mode 100644\n", "/dev/null"
    lines = (before or "").splitlines(keepends=True), after.splitlines(keepends=True)
    return head + "".join(difflib.unified_diff(*lines, old, f"b/{repo_path}"))


def seams(root: Path) -> dict[str, list[str]]:
    """Files of the tree, each with the qualified names of its functions that the plugin wraps."""
    found = defaultdict(list)
    for target in register.hooks():
        parts = target.split(".")[1:]
        depth = next(n for n in range(len(parts), 0, -1) if (root / "/".join(parts[:n])).with_suffix(".py").is_file())
        found["/".join(parts[:depth]) + ".py"].append(".".join(parts[depth:]))
    return found


def decorate(text: str, functions: list[str]) -> str:
    """Put the decorator right above each ``def``, under the decorators that are there."""
    lines = text.splitlines(keepends=True)
    nodes = [find_function(ast.parse(text), name) for name in functions]
    for node in sorted(nodes, key=lambda n: -n.lineno):
        lines.insert(node.lineno - 1, " " * node.col_offset + "@int4_seam\n")
    return "".join(lines)


def find_function(tree: ast.AST, qualified_name: str) -> ast.FunctionDef | ast.AsyncFunctionDef:
    node = tree
    for name in qualified_name.split("."):
        found = [child for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == name]
        if len(found) != 1:
            raise SystemExit(f"{qualified_name}: {name} is defined {len(found)} times, expected once")
        node = found[0]
    return node


def add_import(text: str, name: str) -> str:
    """Import a name of the new module: where SGLang's sorted imports would have it, else after the last import."""
    module = "sglang." + MODULE.removesuffix(".py").replace("/", ".")
    body = ast.parse(text).body
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    siblings = [node for node in imports if getattr(node, "module", None) and node.module.startswith("sglang.")]
    after = next((node for node in siblings if node.module > module), None)
    lines = text.splitlines(keepends=True)
    statement = f"from {module} import {name}\n"
    if after is not None:
        lines.insert(after.lineno - 1, statement)
    elif imports:
        lines.insert(imports[-1].end_lineno, statement if siblings else "\n" + statement)
    else:
        lines.insert(body[0].end_lineno, "\n" + statement)
    return "".join(lines)


if __name__ == "__main__":
    main()
