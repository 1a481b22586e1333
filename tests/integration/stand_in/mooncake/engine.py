"""What SGLang asks of the Mooncake transfer engine, between two processes of this machine.

Stands in where Mooncake cannot be loaded, whose library needs RDMA's. It writes bytes to where SGLang says, straight
into the other process. Everything else of a transfer, and what is sent, is SGLang's.
"""

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)
_AT_ONCE = 1024  # blocks of a call: the kernel's IOV_MAX


class _Block(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class TransferEngine:
    """One process's end; a peer is known by its process id, which takes the place of the port in its session."""

    def initialize(self, hostname, metadata_server, protocol, device_name) -> int:
        _libc.prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)  # where the kernel would let only our parent write to us
        return 0

    def get_rpc_port(self) -> int:
        return os.getpid()

    def batch_register_memory(self, pointers, lengths) -> int:
        return 0

    def batch_unregister_memory(self, pointers) -> int:
        return 0

    def transfer_sync_write(self, session, source, target, length) -> int:
        return self.batch_transfer_sync_write(session, [source], [target], [length])

    def batch_transfer_sync_write(self, session, sources, targets, lengths) -> int:
        peer = int(session.rsplit(":", 1)[1])
        for first in range(0, len(lengths), _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            ours, theirs = _blocks(sources[part], lengths[part]), _blocks(targets[part], lengths[part])
            done = _libc.process_vm_writev(peer, ours, len(ours), theirs, len(theirs), 0)
            if done != sum(lengths[part]):
                raise OSError(ctypes.get_errno(), f"{done} of {sum(lengths[part])} bytes written to process {peer}")
        return 0

    def send_probe(self, session) -> int:
        return 0


def _blocks(starts, lengths):
    return (_Block * len(starts))(*map(_Block, starts, lengths))
