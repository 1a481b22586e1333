// Global memory: the allocations a launch may touch, registered by the host, and what the launch did to them.
//
// Every access must lie inside one allocation that permits it, at its natural alignment. Allocations that are both
// read and written also remember, per two bytes, who wrote them in this launch: a read by another thread of the
// block needs a barrier in between, a read by another block needs fences and atomics (fences.h), and the read-only path
// (ld_global) may never see a byte that the launch writes. What the launch before wrote, a dependent launch may read
// once it has waited, and not through that path, as it may have begun before the write; it writes nothing before.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "emulator/clocks.h"
#include "emulator/fences.h"
#include "emulator/report.h"

namespace saw_int4::emulator {

// kScratch: read and written, but what it holds before the launch means nothing (atomics excepted).
enum class Access { kRead = 1, kWrite = 2, kReadWrite = 3, kScratch = 7 };

// Who is accessing: a thread of a block, with the block's clocks.
struct Accessor {
  int block;
  int thread;
  Clocks& clocks;
  bool launch_before_ended;  // as far as the thread knows
};

class GlobalMemory {
 public:
  // Adjacent or overlapping ranges stay separate allocations; a range that coincides with one registered before
  // (an operator working in place) adds its permission to it.
  void add(const std::string& name, const void* memory, int64_t bytes, Access access);
  void clear() { allocations_.clear(); }
  void begin_launch(bool dependent);

  void read(void* to, const void* from, uint32_t bytes, bool read_only_path, const Accessor& who, const Site& site);
  void write(void* to, const void* from, uint32_t bytes, const Accessor& who, const Site& site);
  uint32_t atomic_add(uint32_t* target, uint32_t value, const Accessor& who, const Site& site);
  void fence(const Accessor& who) { fences_.fence(who.block, who.thread, who.clocks); }

 private:
  struct History {                              // of two bytes
    uint32_t written_in = 0, read_only_in = 0;  // launch numbers
    int block = 0;
    Stamp writer;
  };
  struct FreeHistory {
    void operator()(History* history) const { std::free(history); }
  };
  struct Allocation {
    std::string name;
    uintptr_t begin, end;
    int access;
    std::unique_ptr<History[], FreeHistory> history;  // where both read and written; zero pages until touched
  };

  Allocation& find(const char* verb, const void* pointer, uint32_t bytes, Access access, const Accessor& who,
                   const Site& site);
  template <class Fn>
  static void for_each(const Allocation& allocation, const void* pointer, uint32_t bytes, Fn fn);

  std::vector<Allocation> allocations_;  // by begin
  uint32_t launch_ = 0;
  bool dependent_ = false;  // the launch before may be under way
  Fences fences_;
};

}  // namespace saw_int4::emulator
