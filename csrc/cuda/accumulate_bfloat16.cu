#include "accumulate.cuh"

namespace mechanic::cuda {

template void launch_accumulate<BFloat16>(const Bucket&, const Folding&, const Scaler&,
                                          cudaStream_t);

}  // namespace mechanic::cuda
