#include "accumulate.cuh"

namespace mechanic::cuda {

template void launch_accumulate<double, double>(const Bucket&, const Reduction&, const StepScalars&,
                                                cudaStream_t);

}  // namespace mechanic::cuda
