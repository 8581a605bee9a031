// step: the choice of a kernel by the weights' dtype, as in accumulate.cu.
#include "../storage.h"
#include "cuda.h"

namespace mechanic::cuda {

template <class X, class S>
void launch_step(const Bucket& bucket, const Reduction& reduction, const LogTuner& tuner,
                 const StepScalars& scalars, CUstream_st* stream);

void step(const Bucket& bucket, const Reduction& reduction, const LogTuner& tuner,
          const StepScalars& scalars, CUstream_st* stream) {
  for_stored(bucket.dtypes, [&](auto weight, auto state) {
    launch_step<decltype(weight), decltype(state)>(bucket, reduction, tuner, scalars, stream);
  });
}

}  // namespace mechanic::cuda
