// What blocks know of each other's writes. Memory is weak: a write reaches another block only through
//
//     write, atomic_add_acq_rel_u32      in the writing block, then
//     atomic_add_acq_rel_u32, read       in the reading one, both on the same word,
//
// where each step is the same thread's as the one before, or has a barrier in between. (Word of a third block's write,
// passed on by the second, is not accepted: no kernel needs it.)
#pragma once

#include <algorithm>
#include <array>
#include <map>
#include <utility>
#include <vector>

#include "emulator/clocks.h"

namespace saw_int4::emulator {

class Fences {
 public:
  void clear() {
    blocks_.clear();
    released_.clear();
  }

  void fence(int block, int thread, Clocks& clocks) {
    Block& here = blocks_[block];
    Fence fence{clocks.now(thread), clocks.met_by(thread), {}};
    for (const Atomic& atomic : here.atomics) {
      if (clocks.comes_before(atomic.at, thread)) fence.seen.push_back({atomic.word, atomic.number});
    }
    here.fences[thread].push_back(std::move(fence));
    clocks.tick(thread);  // later writes of the thread are told apart from those that the fence covers
  }

  void atomic(int block, int thread, const Clocks& clocks, const void* word) {
    Block& here = blocks_[block];
    std::vector<Release>& releases = released_[word];
    here.atomics.push_back({clocks.now(thread), word, releases.size()});
    Release release{block, {}, {}};
    for (const auto& [_, fences] : here.fences) {
      for (const Fence& fence : fences) {
        if (clocks.comes_before(fence.at, thread)) release.add(fence);
      }
    }
    releases.push_back(release);
  }

  // Whether a write of another block, stamped there, is known to a thread.
  bool reaches(int writing_block, Stamp write, int block, int thread, const Clocks& clocks) const {
    const auto here = blocks_.find(block);
    if (here == blocks_.end()) return false;
    const auto known_to = [&](const Fence& fence) { return knows(fence, writing_block, write); };
    // The thread's own last fence, as a rule.
    const auto own = here->second.fences.find(thread);
    if (own != here->second.fences.end() && known_to(own->second.back())) return true;
    for (const auto& [_, fences] : here->second.fences) {
      for (const Fence& fence : fences) {
        if (clocks.comes_before(fence.at, thread) && known_to(fence)) return true;
      }
    }
    return false;
  }

 private:
  struct Atomic {
    Stamp at;
    const void* word;
    size_t number;  // of the atomics on this word
  };
  struct Fence {
    Stamp at;
    Clocks::Epochs met;                                // what came before it, by warp
    std::vector<std::pair<const void*, size_t>> seen;  // atomics that came before it
  };
  struct Release {  // what the fences before an atomic cover: all writes up to an epoch, by warp and by thread
    int block;
    Clocks::Epochs met;
    std::map<int, uint32_t> own;

    void add(const Fence& fence) {
      for (int i = 0; i < kMaxWarps; ++i) met[i] = std::max(met[i], fence.met[i]);
      uint32_t& epoch = own[fence.at.thread()];
      epoch = std::max(epoch, fence.at.epoch());
    }
    bool covers(Stamp write) const {
      const auto of_thread = own.find(write.thread());
      return met[write.warp()] >= write.epoch() || (of_thread != own.end() && of_thread->second >= write.epoch());
    }
  };
  struct Block {
    std::vector<Atomic> atomics;
    std::map<int, std::vector<Fence>> fences;  // by thread
  };

  bool knows(const Fence& fence, int writing_block, Stamp write) const {
    for (const auto& [word, number] : fence.seen) {
      const std::vector<Release>& releases = released_.at(word);
      for (size_t i = 0; i < number; ++i) {
        if (releases[i].block == writing_block && releases[i].covers(write)) return true;
      }
    }
    return false;
  }

  std::map<int, Block> blocks_;
  std::map<const void*, std::vector<Release>> released_;
};

}  // namespace saw_int4::emulator
