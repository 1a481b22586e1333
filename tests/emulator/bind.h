// What every emulator library offers to Python, and the registration of memory for the duration of a call.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "emulator/machine.h"

namespace saw_int4::emulator {

struct Range {
  std::string name;
  const void* memory;
  int64_t bytes;
  Access access;
};

// The launches made while it lives may touch these ranges and nothing else.
class Registered {
 public:
  explicit Registered(const std::vector<Range>& ranges) {
    for (const Range& range : ranges) machine().global().add(range.name, range.memory, range.bytes, range.access);
  }
  ~Registered() { machine().global().clear(); }
  Registered(const Registered&) = delete;
  Registered& operator=(const Registered&) = delete;
};

inline void bind_machine(pybind11::module_& m) {
  pybind11::register_exception<Error>(m, "EmulatorError", PyExc_RuntimeError);
  m.def("last_kernel", [] { return machine().last_kernel(); });
  m.def(
      "configure",
      [](const std::string& order, int resident_blocks, uint32_t seed, int sm_count, uint32_t shared_bytes,
         bool dependent_launches) {
        Options& options = machine().options();
        if (order == "ascending") {
          options.order = BlockOrder::kAscending;
        } else if (order == "descending") {
          options.order = BlockOrder::kDescending;
        } else if (order == "shuffled") {
          options.order = BlockOrder::kShuffled;
        } else {
          throw Error("emulator: block order is " + order + ", expected ascending, descending or shuffled");
        }
        options.resident_blocks = resident_blocks;
        options.seed = seed;
        options.sm_count = sm_count;
        options.shared_bytes = shared_bytes;
        options.dependent_launches = dependent_launches;
      },
      pybind11::arg("order") = "ascending", pybind11::arg("resident_blocks") = 1, pybind11::arg("seed") = 0,
      pybind11::arg("sm_count") = Options().sm_count, pybind11::arg("shared_bytes") = Options().shared_bytes,
      pybind11::arg("dependent_launches") = Options().dependent_launches);
}

}  // namespace saw_int4::emulator
