// Token rows from HBM to shared memory, several tiles ahead. All threads of the block copy all heads of a tile in
// chunks of 16 bytes (8 or 4 where the rows of a token are no multiple), K and V alike; slots come one tile earlier
// still, through registers, so that no address waits for memory. One barrier per tile.
//
// In flight: (stages - 1) tiles of 8 warps x 32 tokens x 2 rows, 35 KB each at head_dim 128; two blocks per SM. HBM
// needs about 40 KB per SM in flight at 3.35 TB/s and 1.5 us.
#pragma once

#include "common/device.h"
#include "decode/config.h"

namespace saw_int4 {

// What a block reads while it works on one run of tiles.
struct TileSource {
  const int32_t* slots;  // of the request's token 0
  int head_bytes;        // of the block's first KV head inside a token, rounded down to a chunk
  int token_bytes;       // of a token in the cache
  int end_token;         // tokens of the request; the tail of the last tile is filled with zeros
};

// Slot of a token, or kPastEnd.
inline constexpr int kPastEnd = INT32_MIN;
inline constexpr int kNoSlot = INT32_MIN + 1;  // of a thread that fetches none
SAW_INT4_DEVICE int fetch_slot(const TileSource& source, int token) {
  return token < source.end_token ? dev::ld_global(source.slots + token) : kPastEnd;
}

// A slot outside the cache stops the kernel: reading on would be silent garbage.
SAW_INT4_DEVICE int checked_slot(int slot, int64_t num_slots) {
  if (slot != kPastEnd && static_cast<uint32_t>(slot) >= num_slots) dev::trap();
  return slot;
}

template <int BYTES, int kUnroll>
SAW_INT4_DEVICE void copy_chunks(const DecodeParams& p, const DecodePlan& plan, const TileSource& source, int tokens,
                                 uint32_t slots_addr, uint32_t stage_addr) {
  const int chunks = tokens * plan.chunks_per_token;
  const uint32_t v_stage = plan.stage_bytes / 2;
  SAW_INT4_UNROLL_BY(kUnroll)
  for (int i = dev::thread_index(); i < chunks; i += dev::thread_count()) {
    const int token = static_cast<int>(dev::mul_hi(static_cast<uint32_t>(i), plan.chunk_magic));
    const int chunk = i - token * plan.chunks_per_token;
    const int slot = dev::ld_shared<int32_t>(slots_addr + 4 * token);
    const bool valid = slot != kPastEnd;
    // Of a slot past the end nothing is read, wherever this points.
    const uint64_t from = dev::mul_wide(static_cast<uint32_t>(slot), static_cast<uint32_t>(source.token_bytes)) +
                          static_cast<uint32_t>(source.head_bytes + chunk * BYTES);
    const uint32_t to = stage_addr + token * plan.token_stride + chunk * BYTES;
    dev::cp_async_zfill<BYTES>(to, p.k_cache + from, valid);
    dev::cp_async_zfill<BYTES>(to + v_stage, p.v_cache + from, valid);
  }
}

// The stage's first `tokens` tokens. kUnroll: of the 16-byte loop; the others are for few KV heads only and kept short,
// since code costs start-up time.
template <int kUnroll>
SAW_INT4_DEVICE void copy_stage(const DecodeParams& p, const DecodePlan& plan, const TileSource& source, int tokens,
                                uint32_t slots_addr, uint32_t stage_addr) {
  if (plan.chunk_bytes == 16)
    copy_chunks<16, kUnroll>(p, plan, source, tokens, slots_addr, stage_addr);
  else if (plan.chunk_bytes == 8)
    copy_chunks<8, (kUnroll + 1) / 2>(p, plan, source, tokens, slots_addr, stage_addr);
  else
    copy_chunks<4, (kUnroll + 1) / 2>(p, plan, source, tokens, slots_addr, stage_addr);
}

// Waits until the oldest of the (stages - 1) copies in flight has landed.
SAW_INT4_DEVICE void wait_oldest(int stages) {
  if (stages == 2)
    dev::cp_async_wait<0>();
  else if (stages == 3)
    dev::cp_async_wait<1>();
  else
    dev::cp_async_wait<2>();
}

}  // namespace saw_int4
