// tune: every row of the tuner's state is updated from the sums of its scale, a thread a row.
#include "../formulas.h"
#include "cuda.h"
#include "launch.cuh"

namespace mechanic::cuda {
namespace {

__global__ void __launch_bounds__(kThreads)
    tune_kernel(const Sums* sums, Tuner tuner, StepScalars scalars) {
  if (scalars.found_inf != nullptr && *scalars.found_inf != 0) return;
  bool finite = true;
  for (int64_t i = threadIdx.x; i < tuner.scales; i += kThreads) {
    finite &= tune_row(sums[i], tuner_row(tuner, i), tuner.constants, tuner.betas);
  }
  // The first row counts the steps in which any row was not finite.
  if (!__syncthreads_and(finite) && threadIdx.x == 0) tuner_row(tuner, 0).counters[kNonfinite] += 1;
}

}  // namespace

void tune(const Sums* sums, const Tuner& tuner, const StepScalars& scalars, cudaStream_t stream) {
  launch("tune", tune_kernel, 1, stream, sums, tuner, scalars);
}

}  // namespace mechanic::cuda
