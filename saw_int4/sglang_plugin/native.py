"""What a patched SGLang calls (``patches/``): the plugin's own wrappers, at the same seams, without the plugin.

SGLang imports this while its own modules are being imported, so that it imports nothing of SGLang itself, and looks
wrappers up when they are first needed.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable

from saw_int4.sglang_plugin.names import ATTENTION_BACKEND, KV_CACHE_DTYPE

_MARK = "_saw_int4_seam"


def int4_seam(function: Callable) -> Callable:
    """Decorator: calls go through the wrapper that ``register.hooks`` has for this function, if it has one."""
    target = f"{function.__module__}.{function.__qualname__}"

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        wrapper = _wrappers().get(target)
        return function(*args, **kwargs) if wrapper is None else wrapper(function, *args, **kwargs)

    setattr(wrapped, _MARK, target)
    return wrapped


def is_seam(target: str) -> bool:
    """Whether SGLang's own source routes this function through ``int4_seam``."""
    try:
        function = pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        return False
    return getattr(function, _MARK, None) == target


def kv_cache_dtypes() -> list[str]:
    """The values of ``--kv-cache-dtype`` that we add."""
    return [KV_CACHE_DTYPE]


def attention_backends() -> dict[str, Callable]:
    """The attention backends that we add: name and factory."""
    from saw_int4.sglang_plugin import register

    return {ATTENTION_BACKEND: register.make_backend}


def resolution_hooks() -> dict[str, list[Callable]]:
    """Our wrappers of SGLang's argument resolution, as its ``_HOOKS`` holds them."""
    from saw_int4.sglang_plugin import server_args

    return {step: [wrapper] for step, wrapper in server_args.RESOLUTION_STEPS.items()}


@functools.cache
def _wrappers() -> dict[str, Callable]:
    """``register.hooks``, or nothing when it fails: servers with another cache go on, int4 is refused by ``verify``."""
    from saw_int4.sglang_plugin import register

    return register.attempt(register.hooks) or {}
