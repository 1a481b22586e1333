// Tiny kernels that test the emulator itself: each exists right (kPlanted false) and with one bug planted.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>

#include "emulator/bind.h"
#include "emulator/device.h"
#include "emulator/launch.h"

namespace saw_int4::emulator {
namespace {

using namespace dev;

constexpr int kThreads = 64, kBlocks = 3;

struct Params {
  const uint32_t* in;   // [kBlocks * kThreads], read-only
  uint32_t* out;        // [kBlocks * kThreads], write-only
  uint32_t* workspace;  // [1 + kBlocks * kThreads], zeros
};

uint32_t input(const Params& p, int i) {
  return ld_global(p.in + block_index() * kThreads + i);
}
void output(const Params& p, uint32_t value) {
  st_global(p.out + block_index() * kThreads + thread_index(), value);
}
uint32_t word(int i) {
  return shared_base() + 4 * i;
}

// Every thread hands its input to the thread half a block away.
template <bool kPlanted>
SAW_INT4_KERNEL missing_barrier(Params p) {
  const int t = thread_index();
  st_shared(word(t), input(p, t));
  if (!kPlanted) block_sync();
  output(p, ld_shared<uint32_t>(word((t + 32) % kThreads)));
}

// ... to its neighbour in the warp.
template <bool kPlanted>
SAW_INT4_KERNEL missing_warp_sync(Params p) {
  const int t = thread_index();
  st_shared(word(t), input(p, t));
  if (!kPlanted) warp_sync();
  output(p, ld_shared<uint32_t>(word(t ^ 1)));
}

// A shuffle brings the lanes together but orders no memory.
template <bool kPlanted>
SAW_INT4_KERNEL shuffle_as_barrier(Params p) {
  const int t = thread_index();
  st_shared(word(t), input(p, t));
  if (kPlanted) {
    shfl_xor(t, 1);
  } else {
    warp_sync();
  }
  output(p, ld_shared<uint32_t>(word(t ^ 1)));
}

// The buffer is used twice, and the second round must not overwrite what others still read.
template <bool kPlanted>
SAW_INT4_KERNEL overwrite_while_read(Params p) {
  const int t = thread_index();
  st_shared(word(t), input(p, t));
  block_sync();
  const uint32_t first = ld_shared<uint32_t>(word((t + 32) % kThreads));
  if (!kPlanted) block_sync();
  st_shared(word(t), first);
  block_sync();
  output(p, ld_shared<uint32_t>(word((t + 32) % kThreads)));
}

template <bool kPlanted>
SAW_INT4_KERNEL two_writers(Params p) {
  const int t = thread_index();
  st_shared(word(kPlanted ? t / 2 : t), input(p, t));
  output(p, ld_shared<uint32_t>(word(kPlanted ? t / 2 : t)));
}

template <bool kPlanted>
SAW_INT4_KERNEL uninitialised_shared(Params p) {
  const int t = thread_index();
  if (!kPlanted || t != 40) st_shared(word(t), input(p, t));
  output(p, ld_shared<uint32_t>(word(t)));
}

template <bool kPlanted>
SAW_INT4_KERNEL half_initialised_shared(Params p) {
  const int t = thread_index();
  st_shared(word(t), static_cast<uint16_t>(input(p, t)));
  if (!kPlanted) st_shared(word(t) + 2, static_cast<uint16_t>(input(p, t) >> 16));
  output(p, ld_shared<uint32_t>(word(t)));
}

template <bool kPlanted>
SAW_INT4_KERNEL read_before_wait(Params p) {
  const int t = thread_index();
  cp_async_zfill<4>(word(t), p.in + block_index() * kThreads + t, true);
  cp_async_commit();
  if (!kPlanted) cp_async_wait<0>();
  output(p, ld_shared<uint32_t>(word(t)));
  cp_async_wait<0>();
}

// The second group is needed, and a wait that leaves one group in flight covers only the first.
template <bool kPlanted>
SAW_INT4_KERNEL wait_one_group_short(Params p) {
  const int t = thread_index();
  cp_async_zfill<4>(word(kThreads + t), p.in + block_index() * kThreads + (t ^ 1), true);
  cp_async_commit();
  cp_async_zfill<4>(word(t), p.in + block_index() * kThreads + t, true);
  cp_async_commit();
  cp_async_wait<kPlanted ? 1 : 0>();
  output(p, ld_shared<uint32_t>(word(t)));
  cp_async_wait<0>();
}

// A wait covers the thread's own copies only.
template <bool kPlanted>
SAW_INT4_KERNEL wait_without_barrier(Params p) {
  const int t = thread_index();
  cp_async_zfill<4>(word(t), p.in + block_index() * kThreads + t, true);
  cp_async_commit();
  cp_async_wait<0>();
  if (!kPlanted) block_sync();
  output(p, ld_shared<uint32_t>(word((t + 32) % kThreads)));
}

// The stage of a pipeline is refilled while another warp may still read it.
template <bool kPlanted>
SAW_INT4_KERNEL refill_while_read(Params p) {
  const int t = thread_index();
  uint32_t sum = 0;
  for (int round = 0; round < 2; ++round) {
    cp_async_zfill<4>(word(t), p.in + block_index() * kThreads + t, round == 0);
    cp_async_commit();
    cp_async_wait<0>();
    block_sync();
    sum += ld_shared<uint32_t>(word((t + 32) % kThreads));
    if (!kPlanted) block_sync();
  }
  output(p, sum);
}

template <bool kPlanted>
SAW_INT4_KERNEL copy_never_waited_for(Params p) {
  const int t = thread_index();
  cp_async_zfill<4>(word(t), p.in + block_index() * kThreads + t, true);
  cp_async_commit();
  if (!kPlanted) cp_async_wait<0>();
  output(p, input(p, t));
}

template <bool kPlanted>
SAW_INT4_KERNEL copy_source_changes(Params p) {
  const int t = thread_index();
  uint32_t* mine = p.workspace + 1 + block_index() * kThreads + t;
  st_global(mine, input(p, t));
  cp_async_zfill<4>(word(t), mine, true);
  cp_async_commit();
  if (!kPlanted) cp_async_wait<0>();
  st_global(mine, 0u);
  cp_async_wait<0>();
  output(p, ld_shared<uint32_t>(word(t)));
}

// An mma waits for the whole warp.
template <bool kPlanted>
SAW_INT4_KERNEL mma_by_half_a_warp(Params p) {
  const uint32_t a[4] = {}, b[2] = {};
  float d[4] = {};
  if (!kPlanted || lane_id() >= 16) mma_m16n8k16_f16(d, a, b);
  warp_sync();
  output(p, input(p, thread_index()));
}

template <bool kPlanted>
SAW_INT4_KERNEL global_read_out_of_bounds(Params p) {
  const int i = block_index() * kThreads + thread_index() + (kPlanted ? 1 : 0);
  output(p, ld_global(p.in + i));
}

template <bool kPlanted>
SAW_INT4_KERNEL global_write_out_of_bounds(Params p) {
  const int i = block_index() * kThreads + thread_index();
  st_global(p.out + i - (kPlanted ? 1 : 0), input(p, thread_index()));
}

template <bool kPlanted>
SAW_INT4_KERNEL shared_out_of_bounds(Params p) {
  const int i = 2 * kThreads - 1 - thread_index() + (kPlanted ? 1 : 0);  // the launch asks for 2 * kThreads words
  st_shared(word(i), input(p, thread_index()));
  output(p, ld_shared<uint32_t>(word(i)));
}

template <bool kPlanted>
SAW_INT4_KERNEL misaligned_global(Params p) {
  const int first = thread_index() / 4 * 4 + (kPlanted && thread_index() == 9 ? 1 : 0);
  const uint32_t* from = p.in + block_index() * kThreads + first;
  const uint4 four = ld_global(reinterpret_cast<const uint4*>(from));
  const uint32_t values[4] = {four.x, four.y, four.z, four.w};
  output(p, values[thread_index() % 4]);
}

template <bool kPlanted>
SAW_INT4_KERNEL misaligned_shared(Params p) {
  const int t = thread_index();
  st_shared(word(2 * t + (kPlanted ? 1 : 0)), uint2{input(p, t), 0});
  output(p, ld_shared<uint32_t>(word(2 * t + (kPlanted ? 1 : 0))));
}

template <bool kPlanted>
SAW_INT4_KERNEL half_warp_barrier(Params p) {
  if (!kPlanted || lane_id() < 16) block_sync();
  output(p, input(p, thread_index()));
}

template <bool kPlanted>
SAW_INT4_KERNEL one_warp_skips_barrier(Params p) {
  if (!kPlanted || thread_index() < 32) block_sync();
  output(p, input(p, thread_index()));
}

template <bool kPlanted>
SAW_INT4_KERNEL warps_at_different_barriers(Params p) {
  if (kPlanted && thread_index() < 32) {
    block_sync();
  } else {
    block_sync();
  }
  output(p, input(p, thread_index()));
}

template <bool kPlanted>
SAW_INT4_KERNEL exit_before_barrier(Params p) {
  output(p, input(p, thread_index()));
  if (kPlanted && thread_index() == 5) return;
  block_sync();
}

template <bool kPlanted>
SAW_INT4_KERNEL exit_before_shuffle(Params p) {
  output(p, input(p, thread_index()));
  if (kPlanted && thread_index() == 63) return;
  shfl_idx(0, 3);
}

template <bool kPlanted>
SAW_INT4_KERNEL divergent_shuffle(Params p) {
  int t = thread_index();
  if (kPlanted && t % 2 == 0) {
    t = shfl_xor(t, 1) ^ 1;
  } else {
    t = shfl_xor(t, 1) ^ 1;
  }
  output(p, input(p, t));
}

template <bool kPlanted>
SAW_INT4_KERNEL write_to_read_only(Params p) {
  const int i = block_index() * kThreads + thread_index();
  st_global(kPlanted ? const_cast<uint32_t*>(p.in) + i : p.out + i, input(p, thread_index()));
}

template <bool kPlanted>
SAW_INT4_KERNEL read_of_output(Params p) {
  output(p, input(p, thread_index()));
  if (kPlanted) ld_global_coherent(p.out);
}

template <bool kPlanted>
SAW_INT4_KERNEL read_only_path_of_written(Params p) {
  uint32_t* mine = p.workspace + 1 + block_index() * kThreads + thread_index();
  st_global(mine, input(p, thread_index()));
  output(p, kPlanted ? ld_global(mine) : ld_global_coherent(mine));
}

template <bool kPlanted>
SAW_INT4_KERNEL missing_barrier_global(Params p) {
  uint32_t* block = p.workspace + 1 + block_index() * kThreads;
  const int t = thread_index();
  st_global(block + t, input(p, t));
  if (!kPlanted) block_sync();
  output(p, ld_global_coherent(block + (t + 32) % kThreads));
}

template <bool kPlanted>
SAW_INT4_KERNEL stale_workspace(Params p) {
  uint32_t* mine = p.workspace + 1 + block_index() * kThreads + thread_index();
  if (!kPlanted || thread_index() != 7) st_global(mine, input(p, thread_index()));
  output(p, ld_global_coherent(mine));
}

// The last block to arrive finishes for all: partials, barrier, count; barrier, and the last one reads everything.
// Without any one of these the partials need not have arrived.
enum class Omit { kNothing, kOrder, kBarrier };

// An atomic that orders nothing.
uint32_t relaxed_add(uint32_t* word, uint32_t value) {
  emulator::Machine& m = emulator::machine();
  return m.global().atomic_add(word, value, m.accessor(), Site::current());
}

template <Omit kOmit>
void last_block_finishes(Params p) {
  const int t = thread_index();
  st_global(p.workspace + 1 + block_index() * kThreads + t, input(p, t));
  if (kOmit != Omit::kBarrier) block_sync();
  if (t == 0) {
    st_shared(word(0), kOmit == Omit::kOrder ? relaxed_add(p.workspace, 1) : atomic_add_acq_rel_u32(p.workspace, 1));
  }
  block_sync();
  if (ld_shared<uint32_t>(word(0)) != kBlocks - 1) return;
  for (int b = 0; b < kBlocks; ++b) {
    st_global(p.out + b * kThreads + t, ld_global_coherent(p.workspace + 1 + b * kThreads + t));
  }
}

template <bool kPlanted>
SAW_INT4_KERNEL relaxed_count(Params p) {
  last_block_finishes<kPlanted ? Omit::kOrder : Omit::kNothing>(p);
}
template <bool kPlanted>
SAW_INT4_KERNEL missing_barrier_before_count(Params p) {
  last_block_finishes<kPlanted ? Omit::kBarrier : Omit::kNothing>(p);
}

// The count covers what others wrote before the barrier, and nothing that comes after it.
template <bool kPlanted>
SAW_INT4_KERNEL write_after_count(Params p) {
  const int t = thread_index();
  uint32_t* mine = p.workspace + 1 + block_index() * kThreads + t;
  if (!kPlanted || t != 0) st_global(mine, input(p, t));
  block_sync();
  if (t == 0) {
    st_shared(word(0), atomic_add_acq_rel_u32(p.workspace, 1));
    if (kPlanted) st_global(mine, input(p, t));
  }
  block_sync();
  if (ld_shared<uint32_t>(word(0)) != kBlocks - 1) return;
  for (int b = 0; b < kBlocks; ++b) {
    st_global(p.out + b * kThreads + t, ld_global_coherent(p.workspace + 1 + b * kThreads + t));
  }
}

// The second of two launches, which depends on what the first (launch_before) writes.
SAW_INT4_KERNEL launch_before(Params p) {
  st_global(p.workspace + 1 + block_index() * kThreads + thread_index(), input(p, thread_index()));
}
template <bool kPlanted>
SAW_INT4_KERNEL read_before_launch_ended(Params p) {
  uint32_t* mine = p.workspace + 1 + block_index() * kThreads + thread_index();
  if (!kPlanted) wait_for_launch_before();
  const uint32_t x = ld_global_coherent(mine);
  wait_for_launch_before();
  output(p, x);
}
template <bool kPlanted>
SAW_INT4_KERNEL read_only_path_after_launch_ended(Params p) {
  const uint32_t* mine = p.workspace + 1 + block_index() * kThreads + thread_index();
  wait_for_launch_before();
  output(p, kPlanted ? ld_global(mine) : ld_global_coherent(mine));
}
template <bool kPlanted>
SAW_INT4_KERNEL write_before_launch_ended(Params p) {
  if (!kPlanted) wait_for_launch_before();
  output(p, input(p, thread_index()));
  wait_for_launch_before();
}
template <bool kPlanted>
SAW_INT4_KERNEL atomic_before_launch_ended(Params p) {
  if (!kPlanted) wait_for_launch_before();
  atomic_add_acq_rel_u32(p.workspace, 1);
  wait_for_launch_before();
  output(p, input(p, thread_index()));
}
template <bool kPlanted>
SAW_INT4_KERNEL exit_before_launch_ended(Params p) {
  if (kPlanted && thread_index() == 7) return;
  wait_for_launch_before();
  output(p, input(p, thread_index()));
}

template <bool kPlanted>
SAW_INT4_KERNEL traps(Params p) {
  if (kPlanted && block_index() == 1 && thread_index() == 33) trap();
  output(p, input(p, thread_index()));
}

struct Case {
  void (*right)(Params);
  void (*planted)(Params);
};

#define CASE(name)            \
  {                           \
    #name, {                  \
      name<false>, name<true> \
    }                         \
  }
const std::map<std::string, Case> kCases = {CASE(missing_barrier),
                                            CASE(missing_warp_sync),
                                            CASE(shuffle_as_barrier),
                                            CASE(overwrite_while_read),
                                            CASE(two_writers),
                                            CASE(uninitialised_shared),
                                            CASE(half_initialised_shared),
                                            CASE(read_before_wait),
                                            CASE(wait_one_group_short),
                                            CASE(wait_without_barrier),
                                            CASE(refill_while_read),
                                            CASE(copy_never_waited_for),
                                            CASE(copy_source_changes),
                                            CASE(mma_by_half_a_warp),
                                            CASE(global_read_out_of_bounds),
                                            CASE(global_write_out_of_bounds),
                                            CASE(shared_out_of_bounds),
                                            CASE(misaligned_global),
                                            CASE(misaligned_shared),
                                            CASE(half_warp_barrier),
                                            CASE(one_warp_skips_barrier),
                                            CASE(warps_at_different_barriers),
                                            CASE(exit_before_barrier),
                                            CASE(exit_before_shuffle),
                                            CASE(divergent_shuffle),
                                            CASE(write_to_read_only),
                                            CASE(read_of_output),
                                            CASE(read_only_path_of_written),
                                            CASE(missing_barrier_global),
                                            CASE(relaxed_count),
                                            CASE(missing_barrier_before_count),
                                            CASE(write_after_count),
                                            CASE(read_before_launch_ended),
                                            CASE(read_only_path_after_launch_ended),
                                            CASE(write_before_launch_ended),
                                            CASE(atomic_before_launch_ended),
                                            CASE(exit_before_launch_ended),
                                            CASE(stale_workspace),
                                            CASE(traps)};
#undef CASE

std::vector<std::string> case_names() {
  std::vector<std::string> names;
  for (const auto& [name, kernels] : kCases) names.push_back(name);
  return names;
}

// Runs one case on in[i] = 1000 + i and returns out.
std::vector<uint32_t> run(const std::string& name, bool planted) {
  const Case& kernels = kCases.at(name);
  constexpr int kWords = kBlocks * kThreads;
  // Allocations in one vector, with a word of no allocation between them, so that a miss by one is a miss.
  std::vector<uint4> memory((3 * kWords + 16) / 4);
  auto* in = reinterpret_cast<uint32_t*>(memory.data());
  uint32_t *out = in + kWords + 4, *workspace = out + kWords + 4;
  for (int i = 0; i < kWords; ++i) in[i] = 1000 + i;
  Registered registered({{"in", in, 4 * kWords, Access::kRead},
                         {"out", out, 4 * kWords, Access::kWrite},
                         {"workspace", workspace, 4 * (kWords + 1), Access::kScratch}});
  const Params params{in, out, workspace};
  const auto kernel = planted ? kernels.planted : kernels.right;
  if (name.ends_with("launch_ended")) {
    launch("launch_before", launch_before, kBlocks, kThreads, 0, nullptr, params);
    launch_dependent(name.c_str(), kernel, kBlocks, kThreads, 0, nullptr, params);
  } else {
    launch(name.c_str(), kernel, kBlocks, kThreads, 2 * kThreads * 4, nullptr, params);
  }
  return {out, out + kWords};
}

// ---- collectives, lane by lane ----

struct LaneParams {
  const uint32_t* in;
  uint32_t* out;
};

template <bool kBf16>
SAW_INT4_KERNEL mma_kernel(LaneParams p) {
  const uint32_t* in = p.in + 10 * lane_id();
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = ld_global(in + i);
  for (int i = 0; i < 2; ++i) b[i] = ld_global(in + 4 + i);
  for (int i = 0; i < 4; ++i) d[i] = bits_float(ld_global(in + 6 + i));
  if constexpr (kBf16) {
    mma_m16n8k16_bf16(d, a, b);
  } else {
    mma_m16n8k16_f16(d, a, b);
  }
  for (int i = 0; i < 4; ++i) st_global(p.out + 4 * lane_id() + i, float_bits(d[i]));
}

SAW_INT4_KERNEL movmatrix_kernel(LaneParams p) {
  st_global(p.out + lane_id(), movmatrix_trans_b16(ld_global(p.in + lane_id())));
}

SAW_INT4_KERNEL collectives_kernel(LaneParams p) {
  const int value = static_cast<int>(ld_global(p.in + thread_index()));
  uint32_t* out = p.out + 7 * thread_index();
  st_global(out, static_cast<uint32_t>(shfl_xor(value, 5)));
  st_global(out + 1, static_cast<uint32_t>(shfl_up(value, 3)));
  st_global(out + 2, static_cast<uint32_t>(shfl_idx(value, (lane_id() * 7) % 32)));
  st_global(out + 3, static_cast<uint32_t>(any(value == 40)));
  st_global(out + 4, static_cast<uint32_t>(any(value < 0)));
  st_global(out + 5, static_cast<uint32_t>(warp_id()));
  st_global(out + 6, static_cast<uint32_t>(count_lanes(value % 3 == 0)));
}

// Four words of each lane, as fragments of four matrices; out: what lies where they were stored.
SAW_INT4_KERNEL st_matrices_kernel(LaneParams p) {
  uint32_t x[4];
  for (int i = 0; i < 4; ++i) x[i] = ld_global(p.in + 4 * lane_id() + i);
  st_matrices(shared_base(), x);
  block_sync();
  for (int i = 0; i < 4; ++i) st_global(p.out + 4 * lane_id() + i, ld_shared<uint32_t>(word(4 * lane_id() + i)));
}

// B, words 20 * 32 and on, by its columns or its rows; of each lane A and the sums. What may be wrong with it: bug; or
// kFirst: the sums are new ones.
enum class Bug { kNone, kUnpublished, kNoWait, kOperandChanges, kReadEarly, kNoStart, kNeverEnds, kFirst };

template <bool kRowsOfB>
void shared_mma_of(LaneParams p, Bug bug) {
  const uint32_t* in = p.in + 20 * lane_id();
  for (int i = lane_id(); i < 256; i += 32) st_shared(word(i), ld_global(p.in + 20 * 32 + i));
  if (bug != Bug::kUnpublished) publish_shared();
  block_sync();
  uint32_t a[1][4];
  float d[4][4];
  for (int i = 0; i < 4; ++i) a[0][i] = ld_global(in + i);
  for (int i = 0; i < 16; ++i) d[i / 4][i % 4] = bits_float(ld_global(in + 4 + i));
  if (bug != Bug::kNoStart && bug != Bug::kFirst) shared_mma_start(d);
  shared_mma_begin(a);
  if (bug == Bug::kFirst)
    shared_mma_first<kRowsOfB>(d, a[0], shared_operand(shared_base(), 0));
  else
    shared_mma<kRowsOfB>(d, a[0], shared_operand(shared_base(), 0));
  shared_mma_commit();
  if (bug == Bug::kNeverEnds) return;
  if (bug == Bug::kOperandChanges) ++a[0][2];
  if (bug != Bug::kNoWait) shared_mma_wait<0>(a);
  const float early = d[1][2];
  shared_mma_end(d);
  if (bug == Bug::kReadEarly) d[1][2] = early;
  for (int i = 0; i < 16; ++i) st_global(p.out + 16 * lane_id() + i, float_bits(d[i / 4][i % 4]));
}
template <bool kRowsOfB, int kBug>
SAW_INT4_KERNEL shared_mma_kernel(LaneParams p) {
  shared_mma_of<kRowsOfB>(p, Bug{kBug});
}
template <bool kRowsOfB>
void (*shared_mma_with(int bug))(LaneParams) {
  void (*const kernels[])(LaneParams) = {shared_mma_kernel<kRowsOfB, 0>, shared_mma_kernel<kRowsOfB, 1>,
                                         shared_mma_kernel<kRowsOfB, 2>, shared_mma_kernel<kRowsOfB, 3>,
                                         shared_mma_kernel<kRowsOfB, 4>, shared_mma_kernel<kRowsOfB, 5>,
                                         shared_mma_kernel<kRowsOfB, 6>, shared_mma_kernel<kRowsOfB, 7>};
  return kernels[bug];
}

// Every thread hands its input to the next warp of its four, and asks whether any of the four has a 40. Planted: no
// barrier; to the next four, which such a barrier does not cover; one warp leaves.
template <int kPlanted>
SAW_INT4_KERNEL four_warps_kernel(LaneParams p) {
  const int t = thread_index();
  const uint32_t value = ld_global(p.in + t);
  st_shared(word(t), value);
  if (kPlanted == 3 && warp_id() == 6) return;
  if (kPlanted != 1) four_warps_sync();
  const int from = kPlanted == 2 ? (t + 128) % 256 : t / 128 * 128 + (t + 32) % 128;
  st_global(p.out + 2 * t, ld_shared<uint32_t>(word(from)));
  st_global(p.out + 2 * t + 1, static_cast<uint32_t>(four_warps_any(value == 40)));
}
template <int kPlanted>
SAW_INT4_KERNEL four_warps_at_two_places(LaneParams p) {
  if (warp_id() == 1) {
    four_warps_sync();
  } else {
    four_warps_sync();
  }
  st_global(p.out + thread_index(), ld_global(p.in + thread_index()));
}

// Two products of every warp, the second of another B. Planted: one warp takes them in the other order.
template <bool kPlanted>
SAW_INT4_KERNEL four_warps_multiply(LaneParams p) {
  for (int i = 0; i < 4; ++i) st_shared(word(4 * thread_index() + i), ld_global(p.in + thread_index()));
  publish_shared();
  block_sync();
  uint32_t a[1][4] = {};
  float d[4][4] = {};
  shared_mma_start(d);
  for (int i = 0; i < 2; ++i) {
    shared_mma_begin(a);
    shared_mma<true>(d, a[0], shared_operand(shared_base(), (kPlanted && warp_id() == 2 ? 1 - i : i) * 1024));
    shared_mma_commit();
    shared_mma_wait<0>(a);
  }
  shared_mma_end(d);
  st_global(p.out + thread_index(), float_bits(d[0][0]));
}

std::vector<uint32_t> run_lanes(void (*kernel)(LaneParams), const char* name, int threads,
                                const std::vector<uint32_t>& in, size_t words_out) {
  std::vector<uint32_t> out(words_out);
  Registered registered({{"in", in.data(), static_cast<int64_t>(4 * in.size()), Access::kRead},
                         {"out", out.data(), static_cast<int64_t>(4 * words_out), Access::kWrite}});
  launch(name, kernel, 1, threads, 2048, nullptr, LaneParams{in.data(), out.data()});
  return out;
}

}  // namespace
}  // namespace saw_int4::emulator

PYBIND11_MODULE(SAW_INT4_MODULE, m) {
  using namespace saw_int4::emulator;
  bind_machine(m);
  m.def("case_names", &case_names);
  m.def("run", &run);
  m.def("mma", [](const std::vector<uint32_t>& in, bool bf16) {
    return run_lanes(bf16 ? mma_kernel<true> : mma_kernel<false>, "mma", 32, in, 128);
  });
  m.def("movmatrix",
        [](const std::vector<uint32_t>& in) { return run_lanes(movmatrix_kernel, "movmatrix", 32, in, 32); });
  m.def("collectives",
        [](const std::vector<uint32_t>& in) { return run_lanes(collectives_kernel, "collectives", 64, in, 7 * 64); });
  m.def("st_matrices",
        [](const std::vector<uint32_t>& in) { return run_lanes(st_matrices_kernel, "st_matrices", 32, in, 128); });
  m.def("shared_mma", [](const std::vector<uint32_t>& in, bool rows_of_b, int bug) {
    return run_lanes(rows_of_b ? shared_mma_with<true>(bug) : shared_mma_with<false>(bug), "shared_mma", 32, in, 512);
  });
  m.def("four_warps", [](const std::vector<uint32_t>& in, int planted) {
    void (*const kernels[])(LaneParams) = {four_warps_kernel<0>, four_warps_kernel<1>, four_warps_kernel<2>,
                                           four_warps_kernel<3>, four_warps_at_two_places<0>};
    return run_lanes(kernels[planted], "four_warps", 256, in, 512);
  });
  m.def("four_warps_multiply", [](const std::vector<uint32_t>& in, bool planted) {
    return run_lanes(planted ? four_warps_multiply<true> : four_warps_multiply<false>, "four_warps_multiply", 128, in,
                     128);
  });
  m.def("half_to_float", &saw_int4::emulator::half_to_float);
  m.def("float_to_half", &saw_int4::emulator::float_to_half);
  m.def("float_to_bf16", &saw_int4::emulator::float_to_bf16);
  m.def("half_fma", &saw_int4::emulator::half_fma);
  m.def("prmt", &saw_int4::dev::prmt);
  m.def("fmin", &saw_int4::dev::fmin);
  m.def("fmax", &saw_int4::dev::fmax);
  m.def("fmin_nan", &saw_int4::dev::fmin_nan);
  m.def("fmax_nan", &saw_int4::dev::fmax_nan);
  m.def("dot_u8x4", &saw_int4::dev::dot_u8x4);
  m.def("dot_s8x4", &saw_int4::dev::dot_s8x4);
  m.def("max3_signed", [](int32_t a, int32_t b, int32_t c) { return saw_int4::dev::max3(a, b, c); });
  m.def("max3_unsigned", [](uint32_t a, uint32_t b, uint32_t c) { return saw_int4::dev::max3(a, b, c); });
}
