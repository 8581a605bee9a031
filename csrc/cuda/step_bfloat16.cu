#include "step.cuh"

namespace mechanic::cuda {

template void launch_step<BFloat16, float>(const Bucket&, const Reduction&, const LogTuner&,
                                           const StepScalars&, cudaStream_t);
template void launch_step<BFloat16, BFloat16>(const Bucket&, const Reduction&, const LogTuner&,
                                              const StepScalars&, cudaStream_t);
template void launch_step<BFloat16, Code>(const Bucket&, const Reduction&, const LogTuner&,
                                          const StepScalars&, cudaStream_t);

}  // namespace mechanic::cuda
