"""The SGLang side: the only package that imports sglang.

The two functions here are entry points (see pyproject.toml). SGLang imports this module in every process, also where
no INT4 cache was asked for, so that it imports nothing itself.
"""


def load() -> None:
    """Entry point ``sglang.srt.plugins``: make ``--kv-cache-dtype int4`` known to SGLang."""
    from saw_int4.sglang_plugin import register

    register.register_all()


def activate_cpu_platform() -> str | None:
    """Entry point ``sglang.srt.platforms``: the CPU platform's class path where it was asked for, else None."""
    from saw_int4 import env

    if not env.flag(env.CPU_PLATFORM):
        return None
    from saw_int4.torchvision_compat import define_missing_operators

    define_missing_operators()
    return "saw_int4.sglang_plugin.cpu_platform:CpuPlatform"
