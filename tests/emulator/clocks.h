// Who has synchronised with whom inside a block: a vector clock per warp, an epoch per warp.
//
// An access is stamped (thread, epoch of its warp). It comes before everything a thread does now if it is the
// thread's own, or if the thread's warp has since met the stamping warp's epoch at a barrier (of the block or of the
// warp). Shuffles, votes and mma order no memory, so they do not count.
#pragma once

#include <array>
#include <cstdint>

namespace saw_int4::emulator {

inline constexpr int kWarpSize = 32;
inline constexpr int kMaxWarps = 32;

struct Stamp {
  static constexpr int kEpochBits = 22;
  uint32_t bits = 0;  // 0: never

  Stamp() = default;
  Stamp(int thread, uint32_t epoch) : bits(static_cast<uint32_t>(thread) << kEpochBits | epoch) {}
  bool never() const { return bits == 0; }
  int thread() const { return static_cast<int>(bits >> kEpochBits); }
  int warp() const { return thread() / kWarpSize; }
  uint32_t epoch() const { return bits & ((1u << kEpochBits) - 1); }
  bool operator==(const Stamp&) const = default;
};

class Clocks {
 public:
  using Epochs = std::array<uint32_t, kMaxWarps>;  // by warp

  void reset() {
    for (auto& row : met_) row.fill(0);
    epoch_.fill(1);
  }
  Stamp now(int thread) const { return {thread, epoch_[thread / kWarpSize]}; }
  bool comes_before(Stamp past, int thread) const {
    return past.thread() == thread || met_[thread / kWarpSize][past.warp()] >= past.epoch();
  }
  // The newest epoch of each warp that comes before what a thread does now.
  const Epochs& met_by(int thread) const { return met_[thread / kWarpSize]; }
  // From here on stamps of the thread's warp are newer than before, whoever meets them.
  void tick(int thread) { ++epoch_[thread / kWarpSize]; }
  // The warps of the mask meet at a barrier. False when a warp has passed more barriers than a stamp can count.
  bool join(uint32_t warps) {
    Epochs newest{};
    for_each(warps, [&](int warp) {
      met_[warp][warp] = epoch_[warp]++;
      for (int i = 0; i < kMaxWarps; ++i) newest[i] = newest[i] > met_[warp][i] ? newest[i] : met_[warp][i];
    });
    bool counted = true;
    for_each(warps, [&](int warp) {
      met_[warp] = newest;
      counted = counted && epoch_[warp] < (1u << Stamp::kEpochBits);
    });
    return counted;
  }

 private:
  template <class Fn>
  static void for_each(uint32_t mask, Fn fn) {
    for (; mask != 0; mask &= mask - 1) fn(__builtin_ctz(mask));
  }

  std::array<Epochs, kMaxWarps> met_{};
  Epochs epoch_{};
};

}  // namespace saw_int4::emulator
