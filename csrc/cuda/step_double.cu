#include "step.cuh"

namespace mechanic::cuda {

template void launch_step<double, double>(const Bucket&, const Reduction&, const LogTuner&,
                                          const StepScalars&, cudaStream_t);

}  // namespace mechanic::cuda
