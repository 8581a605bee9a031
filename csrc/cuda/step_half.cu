#include "step.cuh"

namespace mechanic::cuda {

template void launch_step<Half, float>(const Bucket&, const Reduction&, const LogTuner&,
                                       const StepScalars&, cudaStream_t);
template void launch_step<Half, Half>(const Bucket&, const Reduction&, const LogTuner&,
                                      const StepScalars&, cudaStream_t);
template void launch_step<Half, BFloat16>(const Bucket&, const Reduction&, const LogTuner&,
                                          const StepScalars&, cudaStream_t);
template void launch_step<Half, Code>(const Bucket&, const Reduction&, const LogTuner&,
                                      const StepScalars&, cudaStream_t);

}  // namespace mechanic::cuda
