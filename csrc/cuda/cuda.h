// The ops on a GPU: one launch each, on a stream, without allocation or synchronization.
#pragma once

#include "../chunk.h"

struct CUstream_st;

namespace mechanic::cuda {

// Partial sums that a block adds at once: one a thread.
constexpr int64_t kGroup = 256;

// What reduce.cuh needs to turn the partial sums of chunks into the sums of scales.
struct Reduction {
  const Span* spans;  // one a scale
  unsigned* tickets;  // ticket_count() of them, all 0 between launches
};

// A ticket for each group of chunks, at most chunk_count / kGroup + scale_count, then one a scale.
inline int64_t ticket_count(int64_t chunk_count, int64_t scale_count) {
  return chunk_count / kGroup + 2 * scale_count;
}

// Numbers on the device that decide about one step; each may be null.
struct StepScalars {
  const float* grad_scale;   // GradScaler's factor, by which the gradients are divided
  const float* found_inf;    // if not 0, this step changes nothing
  const double* clip;        // (N^2, max_norm)
  const double* step_count;  // steps taken so far, by which what is narrow is rounded
};

// An error is thrown as std::runtime_error with the names of the op and of the CUDA call.
void accumulate(const Bucket& bucket, const Reduction& reduction, const StepScalars& scalars,
                CUstream_st* stream);
void norm(const Bucket& bucket, const Reduction& reduction, const StepScalars& scalars,
          CUstream_st* stream);
void apply(const Bucket& bucket, const Reduction& reduction, const Tuner& tuner,
           const StepScalars& scalars, CUstream_st* stream);
void step(const Bucket& bucket, const Reduction& reduction, const LogTuner& tuner,
          const StepScalars& scalars, CUstream_st* stream);
void muon_momentum(const Bucket& bucket, const Reduction& reduction, const Directions& n,
                   const StepScalars& scalars, CUstream_st* stream);
void muon_update(const Bucket& bucket, const Reduction& reduction, const Directions& o,
                 double ratio, const LogTuner& tuner, const StepScalars& scalars,
                 CUstream_st* stream);
void measure(const Bucket& bucket, const Reduction& reduction, CUstream_st* stream);
void tune(const Sums* sums, const Tuner& tuner, const StepScalars& scalars, CUstream_st* stream);
void log_tune(const Sums* sums, const LogTuner& tuner, const StepScalars& scalars,
              CUstream_st* stream);

}  // namespace mechanic::cuda
