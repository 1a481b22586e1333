// Closed sets of template arguments: a value outside is an error that lists the set.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "params.h"

namespace saw_int4 {

// f(std::integral_constant<int, D>) for the head_dims that the CUDA kernels are built for.
template <typename F>
void dispatch_head_dim(int head_dim, const char* op, const F& f) {
  switch (head_dim) {
    case 64:
      return f(std::integral_constant<int, 64>());
    case 80:
      return f(std::integral_constant<int, 80>());
    case 96:
      return f(std::integral_constant<int, 96>());
    case 112:
      return f(std::integral_constant<int, 112>());
    case 128:
      return f(std::integral_constant<int, 128>());
    case 192:
      return f(std::integral_constant<int, 192>());
    case 256:
      return f(std::integral_constant<int, 256>());
    default:
      throw std::runtime_error(std::string(op) + ": head_dim is " + std::to_string(head_dim) +
                               ", the CUDA kernels are built for 64, 80, 96, 112, 128, 192 and 256");
  }
}

// f(std::integral_constant<int, groups>), groups of a row.
template <typename F>
void dispatch_groups(int groups, const char* op, const F& f) {
  switch (groups) {
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant<int, 2>());
    default:
      throw std::runtime_error(std::string(op) + ": rows have " + std::to_string(groups) +
                               " groups, the CUDA kernels are built for 1 and 2");
  }
}

// f(std::integral_constant<DType, dtype>).
template <typename F>
void dispatch_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(std::integral_constant<DType, DType::kFloat32>());
    case DType::kFloat16:
      return f(std::integral_constant<DType, DType::kFloat16>());
    case DType::kBFloat16:
      return f(std::integral_constant<DType, DType::kBFloat16>());
  }
}

// [T, H, D] rows are read 16 bytes at a time.
inline void check_row_alignment(const void* base, int64_t token_stride, DType dtype, const char* op, const char* name) {
  const int64_t bytes = dtype == DType::kFloat32 ? 4 : 2;
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0 || token_stride * bytes % 16 != 0)
    throw std::runtime_error(
        std::string(op) + ": " + name + " starts at an address or has a token stride (" + std::to_string(token_stride) +
        " elements) that is no multiple of 16 bytes, as the CUDA kernel needs; call .contiguous()");
}

// Kernels count the rows of T tokens of H heads in 32 bits.
inline void check_row_count(int64_t tokens, int heads, const char* op) {
  if (tokens * heads > INT32_MAX)
    throw std::runtime_error(std::string(op) + ": " + std::to_string(tokens) + " tokens of " + std::to_string(heads) +
                             " heads are more than 2^31 - 1 rows; call it with fewer tokens at a time");
}

// Blocks of `per_block` rows for them.
inline int row_blocks(int64_t tokens, int heads, int per_block, const char* op) {
  check_row_count(tokens, heads, op);
  return static_cast<int>((tokens * heads + per_block - 1) / per_block);
}

}  // namespace saw_int4
