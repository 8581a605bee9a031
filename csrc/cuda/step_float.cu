#include "step.cuh"

namespace mechanic::cuda {

template void launch_step<float, float>(const Bucket&, const Reduction&, const LogTuner&,
                                        const StepScalars&, cudaStream_t);
template void launch_step<float, BFloat16>(const Bucket&, const Reduction&, const LogTuner&,
                                           const StepScalars&, cudaStream_t);
template void launch_step<float, Code>(const Bucket&, const Reduction&, const LogTuner&,
                                       const StepScalars&, cudaStream_t);

}  // namespace mechanic::cuda
