#include "emulator/shared_memory.h"

#include <cstring>

namespace saw_int4::emulator {

void SharedMemory::reset(uint32_t bytes) {
  data_.assign(bytes, 0xa5);
  history_.assign(bytes, Byte{});
  written_ = 0;
  published_.fill(0);
}

uint32_t SharedMemory::checked_offset(const char* verb, uint32_t address, uint32_t bytes, const Site& site) const {
  if (address < kBase || address - kBase + bytes > data_.size()) {
    fail(site, text("shared ", verb, " of ", bytes, " bytes out of bounds: offset ",
                    static_cast<int64_t>(address) - kBase, " of ", data_.size(), " bytes of shared memory"));
  }
  if (address % bytes != 0) {
    fail(site, text("misaligned shared ", verb, " of ", bytes, " bytes at offset ", address - kBase,
                    ", which is not a multiple of ", bytes));
  }
  return address - kBase;
}

template <class Fn>
void SharedMemory::update(uint32_t offset, uint32_t bytes, Fn fn) {
  Byte* history = history_.data() + offset;
  const bool alike = std::memcmp(history, history + 1, (bytes - 1) * sizeof(Byte)) == 0;
  fn(history[0], offset);
  for (uint32_t i = 1; i < bytes; ++i) {
    if (alike) {
      history[i] = history[0];
    } else {
      fn(history[i], offset + i);
    }
  }
}

void SharedMemory::read(void* to, uint32_t address, uint32_t bytes, int thread, const Clocks& clocks,
                        const Site& site) {
  const uint32_t offset = checked_offset("read", address, bytes, site);
  const Stamp now = clocks.now(thread);
  update(offset, bytes, [&](Byte& byte, uint32_t at) {
    if (byte.state == State::kNeverWritten) {
      fail(site, text("read of uninitialised shared memory: byte ", at, " was never written"));
    }
    if (byte.state == State::kInFlight) {
      fail(site, text("shared read before its wait: byte ", at, " is the target of a cp.async of ",
                      name_thread(byte.writer.thread()), " that has not been waited for"));
    }
    if (!clocks.comes_before(byte.writer, thread)) {
      fail(site, text("race in shared memory: byte ", at, " is read, and was written by ",
                      name_thread(byte.writer.thread()), " with no barrier in between"));
    }
    if (byte.reader.never() || clocks.comes_before(byte.reader, thread)) {
      byte.reader = now;
    } else if (byte.other_reader.never() || clocks.comes_before(byte.other_reader, thread) ||
               (byte.other_reader.warp() == byte.reader.warp() && now.warp() != byte.reader.warp())) {
      byte.other_reader = now;
    }
  });
  std::memcpy(to, data_.data() + offset, bytes);
}

void SharedMemory::check_write(const Byte& byte, uint32_t at, int thread, const Clocks& clocks,
                               const Site& site) const {
  if (byte.state == State::kInFlight) {
    fail(site, text("shared write before the wait: byte ", at, " is the target of a cp.async of ",
                    name_thread(byte.writer.thread()), " that has not been waited for"));
  }
  if (!byte.writer.never() && !clocks.comes_before(byte.writer, thread)) {
    fail(site, text("race in shared memory: byte ", at, " is written, and was written by ",
                    name_thread(byte.writer.thread()), " with no barrier in between"));
  }
  for (const Stamp reader : {byte.reader, byte.other_reader}) {
    if (!reader.never() && !clocks.comes_before(reader, thread)) {
      fail(site, text("race in shared memory: byte ", at, " is written, and was read by ", name_thread(reader.thread()),
                      " with no barrier in between"));
    }
  }
}

void SharedMemory::write(uint32_t address, const void* from, uint32_t bytes, int thread, const Clocks& clocks,
                         const Site& site) {
  const uint32_t offset = checked_offset("write", address, bytes, site), number = ++written_;
  const Stamp now = clocks.now(thread);
  update(offset, bytes, [&](Byte& byte, uint32_t at) {
    check_write(byte, at, thread, clocks, site);
    byte = {State::kValid, now, {}, {}, number};
  });
  std::memcpy(data_.data() + offset, from, bytes);
}

void SharedMemory::read_operand(void* to, uint32_t address, uint32_t bytes, int thread, const Clocks& clocks,
                                const Site& site) {
  read(to, address, bytes, thread, clocks, site);
  for (uint32_t at = address - kBase; at < address - kBase + bytes; ++at) {
    const Byte& byte = history_[at];
    if (byte.number <= published_[byte.writer.thread()]) continue;
    fail(site, text("shared_mma reads byte ", at, ", which ", name_thread(byte.writer.thread()),
                    " has not published since it wrote it"));
  }
}

void SharedMemory::begin_copy(uint32_t address, uint32_t bytes, int thread, const Clocks& clocks, const Site& site) {
  const uint32_t offset = checked_offset("cp.async", address, bytes, site);
  const Stamp now = clocks.now(thread);
  update(offset, bytes, [&](Byte& byte, uint32_t at) {
    check_write(byte, at, thread, clocks, site);
    byte = {State::kInFlight, now, {}, {}, 0};
  });
  std::memset(data_.data() + offset, 0xa5, bytes);
}

void SharedMemory::land_copy(uint32_t address, const void* from, uint32_t bytes, int thread, const Clocks& clocks) {
  const uint32_t offset = address - kBase;
  const uint32_t number = ++written_;
  const Stamp now = clocks.now(thread);
  update(offset, bytes, [&](Byte& byte, uint32_t) { byte = {State::kValid, now, {}, {}, number}; });
  std::memcpy(data_.data() + offset, from, bytes);
}

}  // namespace saw_int4::emulator
