"""Our launcher, where one hook fails to apply in the spawned processes (name in SAW_TEST_SABOTAGE)."""

import os

from saw_int4 import launch_server

launch_server.choose_platform()

from sglang.srt.plugins.hook_registry import HookRegistry  # noqa: E402

if __name__ == "__main__":
    launch_server.main()
else:
    apply = HookRegistry._apply_target

    def sabotaged(target, hooks):
        if target.endswith(os.environ["SAW_TEST_SABOTAGE"]):
            raise RuntimeError(f"sabotage of {target}")
        apply(target, hooks)

    HookRegistry._apply_target = sabotaged
