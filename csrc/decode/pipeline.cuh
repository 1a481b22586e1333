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

  // To 16 bytes of shared memory and back, for kernels that have no registers to keep it in.
  SAW_INT4_DEVICE void keep(uint32_t at) const {
    const auto address = reinterpret_cast<uintptr_t>(slots);
    dev::st_shared(at, uint4{static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32),
                             static_cast<uint32_t>(head_bytes), static_cast<uint32_t>(end_token)});
  }
  static SAW_INT4_DEVICE TileSource kept(uint32_t at, int token_bytes) {
    const auto x = dev::ld_shared<uint4>(at);
    return {reinterpret_cast<const int32_t*>(static_cast<uintptr_t>(x.y) << 32 | x.x), static_cast<int>(x.z),
            token_bytes, static_cast<int>(x.w)};
  }
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

// Copies the first `tokens` tokens of a stage, in chunks of BYTES of K and of V; thread i of n has chunks i, i + n, ..
template <int BYTES>
struct StageCopy {
  const DecodeParams& p;
  const DecodePlan& plan;
  const TileSource& source;
  int thread, chunks;
  uint32_t slots_addr, stage_addr;

  SAW_INT4_DEVICE StageCopy(const DecodeParams& params, const DecodePlan& decode_plan, const TileSource& tile_source,
                            int thread_index, int tokens, uint32_t slots, uint32_t stage)
      : p(params),
        plan(decode_plan),
        source(tile_source),
        thread(thread_index),
        chunks(tokens * plan.chunks_per_token),
        slots_addr(slots),
        stage_addr(stage) {}

  // Requests chunk i, if there is one.
  SAW_INT4_DEVICE void request(int i) const {
    if (i >= chunks) return;
    const int token = static_cast<int>(dev::mul_hi(static_cast<uint32_t>(i), plan.chunk_magic));
    const int chunk = i - token * plan.chunks_per_token;
    const int slot = dev::ld_shared<int32_t>(slots_addr + 4 * token);
    // Of a slot past the end nothing is read, wherever this points.
    const bool valid = slot != kPastEnd;
    const uint64_t from = dev::mul_wide(static_cast<uint32_t>(slot), source.token_bytes) +
                          static_cast<uint32_t>(source.head_bytes + chunk * BYTES);
    const uint32_t to = stage_addr + token * plan.token_stride + chunk * BYTES;
    dev::cp_async_zfill<BYTES>(to, p.k_cache + from, valid);
    dev::cp_async_zfill<BYTES>(to + plan.stage_bytes / 2, p.v_cache + from, valid);
  }
  // Turn t of a thread that does not request all at once.
  SAW_INT4_DEVICE void turn(int t) const { request(thread + t * dev::thread_count()); }
  template <int kUnroll>
  SAW_INT4_DEVICE void all_turns() const {
    SAW_INT4_UNROLL_BY(kUnroll)
    for (int i = thread; i < chunks; i += dev::thread_count()) request(i);
  }
};

// A whole stage. The loops of 8 and 4 bytes are for few KV heads only and kept short, since code costs start-up time.
SAW_INT4_DEVICE void copy_stage(const DecodeParams& p, const DecodePlan& plan, const TileSource& source, int tokens,
                                uint32_t slots_addr, uint32_t stage_addr) {
  if (plan.chunk_bytes == 16)
    StageCopy<16>(p, plan, source, dev::thread_index(), tokens, slots_addr, stage_addr).all_turns<4>();
  else if (plan.chunk_bytes == 8)
    StageCopy<8>(p, plan, source, dev::thread_index(), tokens, slots_addr, stage_addr).all_turns<2>();
  else
    StageCopy<4>(p, plan, source, dev::thread_index(), tokens, slots_addr, stage_addr).all_turns<2>();
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
