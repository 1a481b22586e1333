// What the emulator says when a kernel is wrong.
#pragma once

#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>

namespace saw_int4::emulator {

using Site = std::source_location;  // where in the kernel source an intrinsic was called

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

// Stops the launch: machine().launch throws Error naming the kernel, the block, the running thread and the site.
// Called from kernel code; the fibers of the launch are abandoned where they stand.
[[noreturn]] void fail(const Site& site, const std::string& what);

std::string name_thread(int thread);      // "thread 37 (warp 1, lane 5)"
std::string name_lanes(uint32_t lanes);   // "lanes 0-15, 20"
std::string name_site(const Site& site);  // "csrc/append/append_kernel.cuh:41"

}  // namespace saw_int4::emulator
