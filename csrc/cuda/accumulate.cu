// accumulate: the choice of a kernel by the weights' dtype. The kernels are in accumulate_*.cu, a
// file a dtype, so that they compile in parallel.
#include "../storage.h"
#include "cuda.h"

namespace mechanic::cuda {

template <class X, class S>
void launch_accumulate(const Bucket& bucket, const Reduction& reduction, const StepScalars& scalars,
                       CUstream_st* stream);

void accumulate(const Bucket& bucket, const Reduction& reduction, const StepScalars& scalars,
                CUstream_st* stream) {
  for_stored(bucket.dtypes, [&](auto weight, auto state) {
    launch_accumulate<decltype(weight), decltype(state)>(bucket, reduction, scalars, stream);
  });
}

}  // namespace mechanic::cuda
