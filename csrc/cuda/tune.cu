// tune: every scale's row learns from its sums, a thread a row.
#include "../formulas.h"
#include "cuda.h"
#include "launch.cuh"

namespace mechanic::cuda {
namespace {

__global__ void __launch_bounds__(kThreads)
    tune_kernel(const Sums* sums, Tuner tuner, StepScalars scaler) {
  if (scaler.found_inf != nullptr && *scaler.found_inf != 0) return;
  const int64_t width = 4 * tuner.betas + 2;
  bool finite = true;
  for (int64_t row = threadIdx.x; row < tuner.scale_count; row += kThreads) {
    finite &= tune_row(sums[row], tuner.state + row * width, tuner.constants, tuner.betas);
  }
  // The first row counts the steps at which any was not finite.
  if (!__syncthreads_and(finite) && threadIdx.x == 0) tuner.state[width - 1] += 1;
}

}  // namespace

void tune(const Sums* sums, const Tuner& tuner, const StepScalars& scaler, cudaStream_t stream) {
  launch("tune", tune_kernel, 1, stream, sums, tuner, scaler);
}

}  // namespace mechanic::cuda
