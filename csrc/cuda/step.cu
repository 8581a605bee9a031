// step: the choice of a kernel by the weights' dtype, as in accumulate.cu.
#include "../storage.h"
#include "cuda.h"

namespace mechanic::cuda {

template <class X>
void launch_step(const Bucket& bucket, const Reduction& reduction, const LogTuner& tuner,
                 const StepScalars& scalars, CUstream_st* stream);

void step(const Bucket& bucket, const Reduction& reduction, const LogTuner& tuner,
          const StepScalars& scalars, CUstream_st* stream) {
  for_dtype(bucket.dtypes.weight, [&](auto weight) {
    launch_step<decltype(weight)>(bucket, reduction, tuner, scalars, stream);
  });
}

}  // namespace mechanic::cuda
