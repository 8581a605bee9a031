// A kernel launch whose error becomes an exception with the op's name.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda.h"

namespace mechanic::cuda {

// Threads of a block, in every kernel.
constexpr int kThreads = int(kGroup);

template <class T>
struct Same {
  using type = T;
};

template <class... Args>
void launch(const char* op, void (*kernel)(Args...), int64_t blocks, cudaStream_t stream,
            typename Same<Args>::type... args) {
  void* addresses[] = {&args...};
  // One block even without chunks: it sets the sums of the empty scales to 0.
  const dim3 grid(unsigned(std::max<int64_t>(blocks, 1)));
  const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid,
                                             dim3(kThreads), addresses, 0, stream);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report the error again
  throw std::runtime_error(std::string("mechanic_fused ") + op +
                           ": cudaLaunchKernel: " + cudaGetErrorString(error));
}

}  // namespace mechanic::cuda
