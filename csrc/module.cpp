// saw_int4._C: loading it registers the operators; its functions are the format's twin for tests and sizing.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/kernels.h"
#include "format.h"
#if defined(SAW_INT4_WITH_CUDA)
#include "decode/decode_cuda.h"
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("FORMAT_VERSION") = saw_int4::kFormatVersion;
  m.attr("CODES_PER_WORD") = saw_int4::kCodesPerWord;
  m.attr("CODE_MAX") = saw_int4::kCodeMax;
  m.attr("PARAM_BYTES") = saw_int4::kParamBytes;
  m.attr("MAX_GROUPS") = saw_int4::kMaxGroups;
  m.attr("NAN_PARAM") = saw_int4::kNanParam;
  m.def("row_bytes", &saw_int4::row_bytes);
  m.def("scale_byte", &saw_int4::scale_byte);
  m.def("offset_byte", &saw_int4::offset_byte);
  m.def("word_of_channel", &saw_int4::word_of_channel);
  m.def("bit_of_channel", &saw_int4::bit_of_channel);
  m.def("group_of_channel", &saw_int4::group_of_channel);
  m.def("cpu_isas", &saw_int4::cpu_isas, "Instruction sets that this machine can run, widest first.");
  m.def("cpu_isa", [] { return saw_int4::cpu_kernels().isa; }, "The instruction set in use.");
  m.def("set_cpu_isa", &saw_int4::set_cpu_isa, "Choose the instruction set, for tests and benchmarks.");
#if defined(SAW_INT4_WITH_CUDA)
  m.def("decode_workspace_bytes", &saw_int4::decode_workspace_bytes_on);
#endif
}
