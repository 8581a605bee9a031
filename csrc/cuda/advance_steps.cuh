// The counts of the weights' steps, which accumulate and step advance at their end.
#pragma once

#include "packets.cuh"

namespace mechanic::cuda {

// Only when no chunk of the scale reads the counts any more.
__device__ __forceinline__ void advance_steps(const Bucket& bucket, const Span& span, int first,
                                              int stride) {
  for (int64_t i = first; i < span.tensors; i += stride) {
    const Tensor& tensor = bucket.tables.tensors[span.first_tensor + i];
    if (tensor.gradient != 0 && tensor.step != 0) *address<float>(tensor.step, 0) += 1;
  }
}

}  // namespace mechanic::cuda
