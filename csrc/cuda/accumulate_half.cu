#include "accumulate.cuh"

namespace mechanic::cuda {

template void launch_accumulate<Half, float>(const Bucket&, const Reduction&, const StepScalars&,
                                             cudaStream_t);
template void launch_accumulate<Half, Half>(const Bucket&, const Reduction&, const StepScalars&,
                                            cudaStream_t);
template void launch_accumulate<Half, BFloat16>(const Bucket&, const Reduction&, const StepScalars&,
                                                cudaStream_t);
template void launch_accumulate<Half, Code>(const Bucket&, const Reduction&, const StepScalars&,
                                            cudaStream_t);

}  // namespace mechanic::cuda
