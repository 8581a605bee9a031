// log_tune: every row of the log tuner's state is updated from the sums of its scale and the
// observed losses, a thread a row.
#include "../formulas.h"
#include "cuda.h"
#include "launch.cuh"
#include "reduce.cuh"

namespace mechanic::cuda {
namespace {

__global__ void __launch_bounds__(kThreads)
    log_tune_kernel(const Sums* sums, LogTuner tuner, StepScalars scalars) {
  if (scalars.found_inf != nullptr && *scalars.found_inf != 0) {
    // The losses of a step that is not taken go with it.
    if (threadIdx.x == 0) *tuner.losses = {};
    return;
  }
  const auto total = SumColumns<&Sums::gg, &Sums::uu, &Sums::count>::total(sums, tuner.scales, 1);
  const WholeModel model = {std::sqrt(total.of[0]) * std::sqrt(total.of[1]), total.of[2],
                            mean_loss(*tuner.losses)};
  const LogConstants constants = *tuner.constants;
  bool finite = true;
  for (int64_t i = threadIdx.x; i < tuner.scales; i += kThreads) {
    LogRow row = tuner.rows[i];
    finite &= log_tune_row(sums[i], model, row, constants);
    tuner.rows[i] = row;
  }
  // The first row counts the steps in which any row was not finite. After the barrier all threads
  // have read the losses.
  const bool all_finite = __syncthreads_and(finite);
  if (threadIdx.x != 0) return;
  if (!all_finite) tuner.rows[0].nonfinite += 1;
  *tuner.losses = {};
}

}  // namespace

void log_tune(const Sums* sums, const LogTuner& tuner, const StepScalars& scalars,
              cudaStream_t stream) {
  launch("log_tune", log_tune_kernel, 1, stream, sums, tuner, scalars);
}

}  // namespace mechanic::cuda
