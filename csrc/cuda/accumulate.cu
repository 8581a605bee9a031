// accumulate: the choice of a kernel by the weights' dtype; accumulate_*.cu hold the kernels, a
// file a dtype, so that they compile side by side.
#include "../storage.h"
#include "cuda.h"

namespace mechanic::cuda {

template <class X>
void launch_accumulate(const Bucket& bucket, const Reduction& folding, const StepScalars& scaler,
                       CUstream_st* stream);

void accumulate(const Bucket& bucket, const Reduction& folding, const StepScalars& scaler,
                CUstream_st* stream) {
  switch (bucket.weight) {
    case DType::kFloat:
      return launch_accumulate<float>(bucket, folding, scaler, stream);
    case DType::kDouble:
      return launch_accumulate<double>(bucket, folding, scaler, stream);
    case DType::kBFloat16:
      return launch_accumulate<BFloat16>(bucket, folding, scaler, stream);
    case DType::kHalf:
      return launch_accumulate<Half>(bucket, folding, scaler, stream);
  }
}

}  // namespace mechanic::cuda
