// The emulated operators as Python functions on CPU tensors: checked as the real ones are, with every tensor
// registered as memory that the kernels may read, write, or both.
#include "emulator/library.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/extension.h>

#include "checks.h"
#include "decode/config.h"
#include "emulator/bind.h"

namespace saw_int4::emulator {
namespace {

// The memory behind an argument: read, or written where the schema says so, or for a kernel's own use.
void add(std::vector<Range>& ranges, const c10::Argument& argument, const at::Tensor& t) {
  const bool written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
  const Access access = argument.name() == "workspace" ? Access::kScratch : written ? Access::kWrite : Access::kRead;
  const auto add_range = [&](const at::Tensor& x) {
    ranges.push_back({argument.name().c_str(), x.const_data_ptr(), x.numel() * x.element_size(), access});
  };
  if (t.is_contiguous()) return add_range(t);
  // [T, ...] with a stride between tokens: what lies between the rows is none of the kernel's business.
  for (int64_t i = 0; i < t.size(0); ++i) add_range(t[i]);
}
void add(std::vector<Range>& ranges, const c10::Argument& argument, const OptionalTensor& t) {
  if (t.has_value()) add(ranges, argument, *t);
}
template <typename Number>
void add(std::vector<Range>&, const c10::Argument&, const Number&) {}

template <typename Params, typename... Args>
auto emulated(const char* name, Params (*params)(Args...), void (*launch)(const Params&)) {
  return operator_of(params, [=](const Params& p, const auto&... values) {
    const auto schema = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
    auto argument = schema.schema().arguments().begin();
    std::vector<Range> ranges;
    (add(ranges, *argument++, values), ...);
    const Registered registered(ranges);
    launch(p);
  });
}

}  // namespace
}  // namespace saw_int4::emulator

PYBIND11_MODULE(SAW_INT4_MODULE, m) {
  using namespace saw_int4::emulator;
  bind_machine(m);
  m.def("append_kv", emulated("saw_int4::append_kv", saw_int4::append_params, append));
  m.def("decode_attention", emulated("saw_int4::decode_attention", saw_int4::decode_params, decode));
  m.def("decode_workspace_bytes", [](int64_t num_query_rows, int num_q_heads, int head_dim, bool batch_invariant) {
    return saw_int4::decode_workspace_bytes(machine().options().sm_count, num_query_rows, num_q_heads, head_dim,
                                            batch_invariant);
  });
  m.def("gather_kv", emulated("saw_int4::gather_kv", saw_int4::gather_params, gather));
  m.def("transform_rows", emulated("saw_int4::transform_rows", saw_int4::transform_rows_params, transform_rows));
}
