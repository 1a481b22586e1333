// The emulated GPU: runs a grid block by block, each thread of a block as a fiber.
//
// The lanes of a warp run one after another and meet at collectives (shuffle, vote, mma, barriers): the last of the
// 32 lanes to arrive computes for all. Lanes at different call sites, or a lane that has exited, are errors, as all
// of the kernels' collectives name the full warp. Everything happens on the OS thread that calls launch.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "emulator/clocks.h"
#include "emulator/fiber.h"
#include "emulator/global_memory.h"
#include "emulator/report.h"
#include "emulator/shared_memory.h"

namespace saw_int4::emulator {

inline constexpr uint32_t kAllLanes = 0xffffffffu;

enum class BlockOrder { kAscending, kDescending, kShuffled };

struct Options {
  BlockOrder order = BlockOrder::kAscending;
  int resident_blocks = 1;  // > 1: that many blocks are in flight, switched at barriers and atomics, at random
  uint32_t seed = 0;
  int sm_count = 4;  // what the launch planners are told of the device; few, so that small grids do what full ones do
  uint32_t shared_bytes = 227 * 1024;  // the most a block may have: an H100's
  bool dependent_launches = true;      // whether a launch can start before the one it depends on has ended: sm_90
};

struct AsyncCopy {
  uint32_t address, bytes;
  const void* source;                  // null: zeros
  std::array<unsigned char, 16> data;  // as read at the issue
  Site site;
};

// A sum of products under way: where it will lie, and what it is.
struct Product {
  float* d;
  std::vector<float> sums;
};
struct Operands {
  const uint32_t* a;
  std::array<uint32_t, 4> values;
  int group;  // committed as
  Site site;
};

struct Warp;
struct Block;

struct Thread {
  int index = 0, lane = 0;
  Warp* warp = nullptr;
  Block* block = nullptr;
  std::vector<AsyncCopy> copies;  // oldest first
  std::vector<int> groups;        // copies in each committed group, oldest first; the rest are in the open one
  std::vector<Product> products;
  std::vector<Operands> operands;   // of products not waited for
  int product_groups = 0;           // committed
  size_t shared_mmas = 0;           // so far
  bool launch_before_ended = true;  // as far as the thread knows
  Context context;
  FiberStack stack;
};

struct Warp {
  int index = 0;
  uint32_t ready = 0, arrived = 0, exited = 0;  // lanes
  const char* waits_at = nullptr;               // the collective that the arrived lanes wait at, and its site
  Site site;
  bool at_barrier = false;  // all lanes arrived, and wait for other warps
  alignas(16) std::array<unsigned char, 32 * 48> in;
  alignas(16) std::array<unsigned char, 32 * 16> out;
};

struct Block {
  int index = 0;
  bool live = false;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<Warp>> warps;
  uint32_t warps_at_barrier = 0;
  uint32_t warps_at_fours = 0;                        // at barriers of four warps
  std::array<bool, kMaxWarps / 4> vote{}, outcome{};  // at those under way, and of the last
  std::array<Site, kMaxWarps / 4> fours_site{};
  std::array<std::vector<uint32_t>, kMaxWarps / 4> mma_operands;  // B of every shared_mma so far
  Site barrier_site;
  SharedMemory shared;
  Clocks clocks;
};

class Machine {
 public:
  static Machine& the() { return the_; }

  GlobalMemory& global() { return global_; }
  const std::string& last_kernel() const { return kernel_; }
  Options& options() { return options_; }

  // Runs the grid to its end. Throws Error for whatever is wrong with the kernel; the machine is usable after that.
  // dependent: the launch before may be under way until a thread has waited for it.
  void launch(const std::string& kernel, int grid, int block_threads, uint32_t shared_bytes, std::function<void()> body,
              bool dependent = false);

  // For the intrinsics, from inside a kernel.
  Thread& current() { return *current_; }
  Accessor accessor() {
    return {current_->block->index, current_->index, current_->block->clocks, current_->launch_before_ended};
  }
  void wait_for_launch_before() { current_->launch_before_ended = true; }
  int grid() const { return grid_; }
  int block_threads() const { return block_threads_; }
  uint32_t shared_bytes() const { return shared_bytes_; }

  // All 32 lanes contribute an In; fn(const In* in, Out* out) computes the 32 results once.
  template <class Out, class In, class Fn>
  Out collective(const char* what, const Site& site, const In& in, Fn fn);
  void warp_sync(const Site& site);
  void block_sync(const Site& site);
  // A barrier of the four warps that start at a multiple of four, and whether any of their threads voted for it.
  bool four_warps_any(bool vote, const Site& site);

  // shared_mma: products whose sums nobody may see before their end, and operands not to be changed before their wait.
  // The address of B is the same in all lanes of the four warps.
  void start_product(float* d, int n, const Site& site);
  std::vector<float>& product(const float* d, const Site& site);
  void end_product(float* d, const Site& site);
  void use_operands(const uint32_t* a, uint32_t b, const Site& site);
  void commit_products();
  void wait_for_products(int groups_left);

  void issue_copy(const AsyncCopy& copy);
  void commit_copies();
  void wait_for_copies(int groups_left, const Site& site);

  // Other blocks may run here when several are resident.
  void yield();

  [[noreturn]] void stop(const Site& site, const std::string& what);
  [[noreturn]] void exit_thread();

 private:
  static void run_thread();

  void start(Block& block, int index);
  bool step(Block& block, int first_warp);
  void arrive(const char* what, const Site& site);
  bool last_to_arrive() const { return current_->warp->arrived == kAllLanes; }
  void park();
  void resume(Thread& thread);
  void release(Warp& warp);
  void check_exit(const Thread& thread);
  std::string describe_stall(const Block& block) const;

  static Machine the_;

  GlobalMemory global_;
  Options options_;
  std::string kernel_;
  int grid_ = 0, block_threads_ = 0;
  uint32_t shared_bytes_ = 0;
  bool dependent_ = false;
  std::function<void()> body_;
  std::vector<std::unique_ptr<Block>> blocks_;
  Thread* current_ = nullptr;
  Context main_;
  std::string error_;
  std::mt19937 random_;
};

// The one machine of the process. Not thread-safe.
inline Machine& machine() {
  return Machine::the();
}

template <class Out, class In, class Fn>
Out Machine::collective(const char* what, const Site& site, const In& in, Fn fn) {
  static_assert(sizeof(In) <= 48 && sizeof(Out) <= 16);
  Thread& self = *current_;
  Warp& warp = *self.warp;
  arrive(what, site);
  std::memcpy(warp.in.data() + self.lane * sizeof(In), &in, sizeof(In));
  if (last_to_arrive()) {
    fn(reinterpret_cast<const In*>(warp.in.data()), reinterpret_cast<Out*>(warp.out.data()));
    release(warp);
  } else {
    park();
  }
  Out out;
  std::memcpy(&out, warp.out.data() + self.lane * sizeof(Out), sizeof(Out));
  return out;
}

}  // namespace saw_int4::emulator
