"""SGLang 0.5.21's paged allocator without Triton (later versions bring their own)."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator


class TorchPagedAllocator(PagedTokenToKVPoolAllocator):
    """Slots for new tokens: first the rest of a request's last page, then whole free pages in order."""

    def alloc_extend(
        self, prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, last_loc, extend_num_tokens, num_new_pages=None
    ):
        """Slots of tokens ``prefix_len .. seq_len - 1`` of each request, int64; None when pages run out."""
        return self._alloc(prefix_lens_cpu.tolist(), seq_lens_cpu.tolist(), last_loc.tolist())

    def alloc_decode(self, seq_lens, seq_lens_cpu, last_loc):
        """The slot of each request's newest token, int64; None when pages run out."""
        lens = seq_lens_cpu.tolist()
        return self._alloc([n - 1 for n in lens], lens, last_loc.tolist())

    def _alloc(self, prefix_lens: list[int], seq_lens: list[int], last_locs: list[int]):
        size = self.page_size
        pages_of = [-(-seq // size) - -(-prefix // size) for prefix, seq in zip(prefix_lens, seq_lens)]
        if sum(pages_of) > len(self.free_pages):
            self.merge_and_sort_free()
        if sum(pages_of) > len(self.free_pages):
            return None
        out = [torch.empty(0, dtype=torch.int64)]
        for prefix, seq, last, pages in zip(prefix_lens, seq_lens, last_locs, pages_of):
            in_last_page = min(seq - prefix, -prefix % size)
            out.append(torch.arange(last + 1, last + 1 + in_last_page))
            fresh = self.free_pages[:pages, None] * size + torch.arange(size)
            out.append(fresh.flatten()[: seq - prefix - in_last_page])
            self.free_pages = self.free_pages[pages:]
        return torch.cat(out)
