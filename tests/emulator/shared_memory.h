// Dynamic shared memory of one block, with the history of every byte beside it.
//
// Per byte: never written / valid / a cp.async is under way; the last writer; up to two readers since, from two
// warps where two warps read, else two lanes: enough to convict any later writer that no barrier orders after them.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "emulator/clocks.h"
#include "emulator/report.h"

namespace saw_int4::emulator {

class SharedMemory {
 public:
  // 128-byte aligned as csrc/common declares it, and no more than that; address 0 is not the block's.
  static constexpr uint32_t kBase = 1024 + 128;

  void reset(uint32_t bytes);

  void read(void* to, uint32_t address, uint32_t bytes, int thread, const Clocks& clocks, const Site& site);
  void write(uint32_t address, const void* from, uint32_t bytes, int thread, const Clocks& clocks, const Site& site);

  // For the tensor cores, which see what its writer published after writing it.
  void read_operand(void* to, uint32_t address, uint32_t bytes, int thread, const Clocks& clocks, const Site& site);
  void publish(int thread) { published_[thread] = written_; }

  // A cp.async from its issue to the wait that covers it: in between, nobody may touch the bytes.
  void begin_copy(uint32_t address, uint32_t bytes, int thread, const Clocks& clocks, const Site& site);
  void land_copy(uint32_t address, const void* from, uint32_t bytes, int thread, const Clocks& clocks);

 private:
  enum class State : uint32_t { kNeverWritten, kValid, kInFlight };
  struct Byte {
    State state = State::kNeverWritten;
    Stamp writer, reader, other_reader;
    uint32_t number = 0;  // of the write
  };

  // Applies fn to the history of each byte, once for all where they are alike.
  template <class Fn>
  void update(uint32_t offset, uint32_t bytes, Fn fn);
  uint32_t checked_offset(const char* verb, uint32_t address, uint32_t bytes, const Site& site) const;
  void check_write(const Byte& byte, uint32_t offset, int thread, const Clocks& clocks, const Site& site) const;

  std::vector<unsigned char> data_;
  std::vector<Byte> history_;
  uint32_t written_ = 0;                                     // writes so far
  std::array<uint32_t, kMaxWarps * kWarpSize> published_{};  // by thread: writes so far when it last published
};

}  // namespace saw_int4::emulator
