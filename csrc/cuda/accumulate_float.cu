#include "accumulate.cuh"

namespace mechanic::cuda {

template void launch_accumulate<float, float>(const Bucket&, const Reduction&, const StepScalars&,
                                              cudaStream_t);
template void launch_accumulate<float, BFloat16>(const Bucket&, const Reduction&,
                                                 const StepScalars&, cudaStream_t);
template void launch_accumulate<float, Code>(const Bucket&, const Reduction&, const StepScalars&,
                                             cudaStream_t);

}  // namespace mechanic::cuda
