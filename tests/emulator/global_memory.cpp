#include "emulator/global_memory.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace saw_int4::emulator {

namespace {
constexpr uint32_t kGranule = 2;  // bytes per History: the narrowest access of any kernel
constexpr int kBoth = static_cast<int>(Access::kReadWrite);
}  // namespace

void GlobalMemory::add(const std::string& name, const void* memory, int64_t bytes, Access access) {
  if (memory == nullptr || bytes <= 0) return;
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t end = begin + static_cast<uintptr_t>(bytes);
  Allocation allocation{name, begin, end, static_cast<int>(access), nullptr};
  const auto at = std::ranges::lower_bound(allocations_, begin, {}, &Allocation::begin);
  const bool same = at != allocations_.end() && at->begin == begin && at->end == end;
  if (same) {
    allocation.name = at->name + " and " + name;
    allocation.access |= at->access;
  } else {
    const bool hits_next = at != allocations_.end() && at->begin < end;
    const bool hits_previous = at != allocations_.begin() && std::prev(at)->end > begin;
    if (hits_next || hits_previous) {
      throw Error("emulator: " + name + " overlaps " + (hits_next ? at : std::prev(at))->name +
                  " in part; expected separate memory or the very same range");
    }
  }
  if ((allocation.access & kBoth) == kBoth) {
    const size_t granules = (end - begin) / kGranule + 2;
    allocation.history.reset(static_cast<History*>(std::calloc(granules, sizeof(History))));
    if (allocation.history == nullptr) throw std::bad_alloc();
  }
  if (same) {
    *at = std::move(allocation);
  } else {
    allocations_.insert(at, std::move(allocation));
  }
}

void GlobalMemory::begin_launch(bool dependent) {
  ++launch_;
  dependent_ = dependent;
  fences_.clear();
}

GlobalMemory::Allocation& GlobalMemory::find(const char* verb, const void* pointer, uint32_t bytes, Access access,
                                             const Accessor& who, const Site& site) {
  const auto begin = reinterpret_cast<uintptr_t>(pointer);
  const auto after = std::ranges::upper_bound(allocations_, begin, {}, &Allocation::begin);
  Allocation* below = after == allocations_.begin() ? nullptr : &*std::prev(after);
  if (below == nullptr || begin + bytes > below->end) {
    std::string where = text("address ", pointer);
    if (below != nullptr) {
      where +=
          text(", ", begin - below->begin, " bytes into ", below->name, " of ", below->end - below->begin, " bytes");
    }
    if (after != allocations_.end()) where += text(", ", after->begin - begin, " bytes before ", after->name);
    fail(site, text("global ", verb, " of ", bytes, " bytes out of bounds: ", where));
  }
  if (begin % bytes != 0) {
    fail(site, text("misaligned global ", verb, " of ", bytes, " bytes at address ", pointer, ", ",
                    begin - below->begin, " bytes into ", below->name));
  }
  if ((below->access & static_cast<int>(access)) != static_cast<int>(access)) {
    fail(site, text("global ", verb, " of ", below->name, ", which the kernel may not ",
                    access == Access::kRead ? "read" : "write"));
  }
  if (access != Access::kRead && !who.launch_before_ended) {
    fail(site, text("global ", verb, " of ", below->name, " without wait_for_launch_before"));
  }
  return *below;
}

template <class Fn>
void GlobalMemory::for_each(const Allocation& allocation, const void* pointer, uint32_t bytes, Fn fn) {
  if (allocation.history == nullptr) return;
  const uintptr_t origin = allocation.begin / kGranule, begin = reinterpret_cast<uintptr_t>(pointer);
  for (uintptr_t i = begin / kGranule; i <= (begin + bytes - 1) / kGranule; ++i) {
    fn(allocation.history[i - origin], i * kGranule - allocation.begin);
  }
}

void GlobalMemory::read(void* to, const void* from, uint32_t bytes, bool read_only_path, const Accessor& who,
                        const Site& site) {
  const Allocation& allocation = find("read", from, bytes, Access::kRead, who, site);
  for_each(allocation, from, bytes, [&](History& history, uintptr_t at) {
    if (read_only_path) history.read_only_in = launch_;
    if (dependent_ && history.written_in == launch_ - 1) {
      if (!who.launch_before_ended) {
        fail(site, text("read of byte ", at, " of ", allocation.name,
                        ", which the launch before writes, without wait_for_launch_before"));
      }
      if (read_only_path) {
        fail(site, text("read of byte ", at, " of ", allocation.name,
                        ", which the launch before writes, through the read-only path; use ld_global_coherent"));
      }
      return;
    }
    if (history.written_in != launch_) {
      if (allocation.access == static_cast<int>(Access::kScratch)) {
        fail(site, text("read of byte ", at, " of ", allocation.name, ", which this launch has not written"));
      }
      return;
    }
    const auto writer = [&] {
      return text("byte ", at, " of ", allocation.name, " was written by block ", history.block, ", ",
                  name_thread(history.writer.thread()));
    };
    if (read_only_path) {
      fail(site, text("read through the read-only path of memory that this launch writes: ", writer(),
                      "; use ld_global_coherent"));
    }
    if (history.block == who.block) {
      if (!who.clocks.comes_before(history.writer, who.thread)) {
        fail(site, text("race in global memory: ", writer(), " with no barrier in between"));
      }
    } else if (!fences_.reaches(history.block, history.writer, who.block, who.thread, who.clocks)) {
      fail(site, text("race in global memory: ", writer(),
                      "; no atomic_add_acq_rel_u32 of the same word there, then here, lies in between"));
    }
  });
  std::memcpy(to, from, bytes);
}

void GlobalMemory::write(void* to, const void* from, uint32_t bytes, const Accessor& who, const Site& site) {
  const Allocation& allocation = find("write", to, bytes, Access::kWrite, who, site);
  const Stamp now = who.clocks.now(who.thread);
  for_each(allocation, to, bytes, [&](History& history, uintptr_t at) {
    if (history.read_only_in == launch_) {
      fail(site, text("global write of byte ", at, " of ", allocation.name,
                      ", which this launch has read through the read-only path; use ld_global_coherent there"));
    }
    history = {launch_, 0, who.block, now};
  });
  std::memcpy(to, from, bytes);
}

uint32_t GlobalMemory::atomic_add(uint32_t* target, uint32_t value, const Accessor& who, const Site& site) {
  find("atomic", target, sizeof(uint32_t), Access::kReadWrite, who, site);
  fences_.atomic(who.block, who.thread, who.clocks, target);
  const uint32_t before = *target;
  *target = before + value;
  return before;
}

}  // namespace saw_int4::emulator
