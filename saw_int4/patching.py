"""Applies and reverts the source patches of ``patches/`` on an SGLang tree. What scripts/apply_patches.py runs.

Nothing is stored besides the tree: every touched file is either as SGLang ships it or as the series leaves it, byte
for byte (``manifest.json`` has both SHA-256), or the tree is refused. All new files are written next to the old ones
first, then renamed over them; a failure half way renames the old bytes back, and a tree that a killed process left
between the two states is recognised by its hashes and finished by the next ``apply`` or ``revert``. Until then the
server refuses int4, because seams are missing, and serves every other cache as before.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from saw_int4.unified_diff import Hunk, PatchError, parse, patched

_STAGED = ".{}.saw_int4_new"


class State(Enum):
    """What a tree is, for one series."""

    UNPATCHED = "unpatched"
    PATCHED = "patched"
    INTERRUPTED = "interrupted"  # some files before, some after: a killed run
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Tree:
    """An SGLang package folder and its version (None when nothing says it: a source checkout)."""

    root: Path
    version: str | None


@dataclass(frozen=True)
class Series:
    """The patches for one SGLang version.

    Attributes:
        version: of SGLang.
        hunks: of each file, by path relative to the package.
        before, after: SHA-256 of each file; None where there is no such file.
    """

    version: str
    hunks: dict[str, list[Hunk]]
    before: dict[str, str | None]
    after: dict[str, str | None]

    def state(self, root: Path) -> tuple[State, list[str]]:
        """What the tree is, and the files that are neither as shipped nor as patched."""
        actual = {path: _file_digest(root / path) for path in self.hunks}
        odd = [path for path, found in actual.items() if found not in (self.before[path], self.after[path])]
        if odd:
            return State.UNKNOWN, odd
        if actual == self.before:
            return State.UNPATCHED, []
        return (State.PATCHED if actual == self.after else State.INTERRUPTED), []


def digest(content: bytes) -> str:
    """SHA-256, hexadecimal."""
    return hashlib.sha256(content).hexdigest()


# ---- the tree ----------------------------------------------------------------------------------------------------


def find_sglang(path: Path | None = None) -> Tree:
    """The installed SGLang, or the one at ``path``: the package, a folder that holds it, or a source checkout.

    Raises:
        PatchError: there is none.
    """
    if path is None:
        spec = importlib.util.find_spec("sglang")
        if spec is None or not spec.submodule_search_locations:
            raise PatchError("SGLang is not installed for this Python. Install it, or name its folder with --sglang.")
        candidates = [Path(spec.submodule_search_locations[0])]
    else:
        candidates = [path, path / "sglang", path / "python" / "sglang"]
    for root in candidates:
        if (root / "srt").is_dir() and (root / "version.py").is_file():
            return Tree(root.resolve(), _version(root))
    raise PatchError(
        f"{path or candidates[0]} holds no SGLang: expected the folder sglang with srt/ and version.py in it, its "
        "parent, or a checkout of SGLang's repository."
    )


def _version(root: Path) -> str | None:
    generated = root / "_version.py"  # written when the package is built; a checkout has none
    match = generated.is_file() and re.search(r"^__version__\b.*['\"](.+?)['\"]\s*$", generated.read_text(), re.M)
    return match.group(1) if match else None


def _file_digest(path: Path) -> str | None:
    return digest(path.read_bytes()) if path.is_file() else None


# ---- the series --------------------------------------------------------------------------------------------------


def pick_series(patches: Path, tree: Tree) -> Series:
    """The series for a tree: by its version, or by its files where it says none.

    Raises:
        PatchError: there is no series for it.
    """
    folders = {folder.name.removeprefix("sglang-"): folder for folder in sorted(patches.glob("sglang-*"))}
    names = ", ".join(folders) or "none"
    if tree.version is not None:
        if tree.version not in folders:
            raise PatchError(
                f"{tree.root} is SGLang {tree.version}, there are patches for {names}. Install one of these, or use "
                "the plugin, which needs no patches."
            )
        return read_series(folders[tree.version])
    fitting = [s for s in map(read_series, folders.values()) if s.state(tree.root)[0] is not State.UNKNOWN]
    if len(fitting) != 1:
        raise PatchError(
            f"{tree.root} does not say its version, and its files are those of {len(fitting)} of the versions there "
            f"are patches for ({names}). In a changed source tree apply the patches with git apply --3way."
        )
    return fitting[0]


def read_series(folder: Path) -> Series:
    """Read patches and manifest of one version.

    Raises:
        PatchError: they do not belong together.
    """
    version = folder.name.removeprefix("sglang-")
    hunks: dict[str, list[Hunk]] = {}
    for patch in sorted(folder.glob("*.patch")):
        path, of_file = parse(patch.name, patch.read_bytes())
        if path in hunks:
            raise PatchError(f"{patch}: a second patch of {path}, expected one a file.")
        hunks[path] = of_file
    files = json.loads((folder / "manifest.json").read_text())
    if set(files) != set(hunks):
        raise PatchError(
            f"{folder}/manifest.json names other files than the patches: {sorted(set(files) ^ set(hunks))}. "
            "Restore the folder from version control."
        )
    before, after = ({path: files[path][key] for path in hunks} for key in ("before", "after"))
    return Series(version, hunks, before, after)


# ---- changing a tree ---------------------------------------------------------------------------------------------


def apply(tree: Tree, series: Series) -> bool:
    """Patch the tree; False when it was patched already. PatchError, and no change, where that is not possible."""
    return _bring_to(tree, series, series.after, reverse=False)


def revert(tree: Tree, series: Series) -> bool:
    """Bring back the files as SGLang ships them; False when they were. PatchError where that is not possible."""
    return _bring_to(tree, series, series.before, reverse=True)


def known_state(tree: Tree, series: Series) -> State:
    """The state of a tree. PatchError when a file is neither as shipped nor as patched."""
    state, odd = series.state(tree.root)
    if state is State.UNKNOWN:
        raise PatchError(
            f"{tree.root}: {', '.join(odd)}: changed since SGLang {series.version} was installed, expected its own "
            "files or those of this series. Re-install SGLang (pip install --force-reinstall --no-deps "
            f"sglang=={series.version}) or revert with the version of the patches that was applied."
        )
    return state


def _bring_to(tree: Tree, series: Series, wanted: dict[str, str | None], reverse: bool) -> bool:
    with _locked(tree.root):
        known_state(tree, series)
        old, new = {}, {}
        for path, hunks in series.hunks.items():
            file = tree.root / path
            content = file.read_bytes() if file.is_file() else None
            if (content and digest(content)) == wanted[path]:
                continue
            result = patched(path, content or b"", hunks, reverse) if wanted[path] is not None else None
            if (result and digest(result)) != wanted[path]:
                raise PatchError(f"{path}: the patch gives other bytes than manifest.json has. Restore patches/.")
            old[path], new[path] = content, result
        try:
            _replace_all(tree.root, old, new)
        finally:
            for path in series.hunks:  # also what a killed run left
                _staged(tree.root / path).unlink(missing_ok=True)
    return bool(new)


def _replace_all(root: Path, old: dict[str, bytes | None], new: dict[str, bytes | None]) -> None:
    """All files or none. New files first, and the last to go: the others import them."""
    order = sorted(new, key=lambda path: (old[path] is not None, new[path] is None))
    done = []
    try:
        for path in order:
            _stage(root / path, new[path])
        for path in order:
            done.append(path)
            _commit(root / path, new[path])
    except BaseException:  # also an interrupt: put back what was replaced
        for path in reversed(done):
            _stage(root / path, old[path])
            _commit(root / path, old[path])
        raise


def _staged(file: Path) -> Path:
    return file.with_name(_STAGED.format(file.name))


def _stage(file: Path, content: bytes | None) -> None:
    if content is None:
        return
    try:
        with _staged(file).open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        if file.exists():
            shutil.copymode(file, _staged(file))
    except OSError as error:
        raise PatchError(f"{file.parent} cannot be written ({error.strerror}). Nothing was changed.") from error


def _commit(file: Path, content: bytes | None) -> None:
    if content is None:
        file.unlink(missing_ok=True)
    else:
        _staged(file).replace(file)  # atomic; a hard link that a package cache shares is left alone


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One run at a time on a tree."""
    handle = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise PatchError(f"{root}: another run is changing this tree. Try again when it has ended.") from error
    finally:
        os.close(handle)
