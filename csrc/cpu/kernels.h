// The CPU kernels, once per instruction set, and the choice between them at run time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "decode/decode_cpu.h"
#include "params.h"

namespace saw_int4 {

struct CpuKernels {
  const char* isa;
  // Rows begin .. end - 1 of [T * H]. scratch: 5 bytes per channel (a float and a code).
  void (*append_rows)(const AppendParams&, int64_t begin, int64_t end, float* scratch);
  void (*gather_rows)(const GatherParams&, int64_t begin, int64_t end, float* scratch);
  void (*transform_rows)(const TransformRowsParams&, int64_t begin, int64_t end, float* scratch);
  // The three phases of decode_attention: rows of [T_q * H_q]; one chunk for one KV head; rows of [T_q] to the end.
  void (*decode_prepare)(const DecodeParams&, const DecodeScratch&, int64_t begin, int64_t end);
  void (*decode_chunk)(const DecodeParams&, const DecodeScratch&, const DecodeChunk&, int kv_head, float* scratch);
  void (*decode_merge)(const DecodeParams&, const DecodeScratch&, const DecodeRows&, const DecodeChunk* chunks,
                       int64_t row, int q_head, float* scratch);
  // Floats of scratch that decode_chunk and decode_merge need for up to `rows` query rows of one KV head.
  int64_t (*decode_scratch_floats)(int head_dim, int groups, int64_t rows);
};

// The kernels in use: the widest instruction set that this machine has, unless set_cpu_isa chose another.
const CpuKernels& cpu_kernels();
std::vector<std::string> cpu_isas();       // what this machine can run, widest first
void set_cpu_isa(const std::string& isa);  // throws std::invalid_argument for any other name

}  // namespace saw_int4
