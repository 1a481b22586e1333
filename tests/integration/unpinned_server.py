"""Our launcher where torch pins no memory: SGLang's LoRA asks for pinned memory, which no GPU is there to pin."""

import torch


def unpinned(make):
    return lambda *args, pin_memory=False, **options: make(*args, **options)


torch.Tensor.pin_memory = lambda self, *args: self
for name in ("arange", "empty", "full", "ones", "tensor", "zeros"):
    setattr(torch, name, unpinned(getattr(torch, name)))

from saw_int4 import launch_server  # noqa: E402

launch_server.choose_platform()

if __name__ == "__main__":
    launch_server.main()
