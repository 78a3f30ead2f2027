// What a kernel knows of a tensor: where it is, how big, how laid out. It owns nothing.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/macros.h"

namespace petite_fast {

constexpr int kMaxDims = 5;

struct TensorView {
  void* data;  // null: the tensor is absent
  DType dtype;
  int32_t dims;
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims];  // in elements
};

// Element offset of `index` (one entry per dimension).
PF_HOST_DEVICE int64_t offset_of(const TensorView& view, const int64_t* index) {
  int64_t offset = 0;
  for (int32_t i = 0; i < view.dims; ++i) offset += index[i] * view.stride[i];
  return offset;
}

PF_HOST_DEVICE int64_t offset_of(const TensorView& view, int64_t i, int64_t j) {
  return i * view.stride[0] + j * view.stride[1];
}

PF_HOST_DEVICE TensorView vector_view(void* data, DType dtype, int64_t size) {
  return TensorView{data, dtype, 1, {size}, {1}};
}

PF_HOST_DEVICE TensorView matrix_view(void* data, DType dtype, int64_t rows, int64_t cols,
                                      int64_t row_stride, int64_t col_stride) {
  return TensorView{data, dtype, 2, {rows, cols}, {row_stride, col_stride}};
}

template <typename T>
PF_HOST_DEVICE T* pointer_at(const TensorView& view, int64_t offset) {
  return static_cast<T*>(view.data) + offset;
}

}  // namespace petite_fast
