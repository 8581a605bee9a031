// The verbs on a GPU: one launch each, on a stream, without allocation or synchronization.
#pragma once

#include "../chunk.h"

struct CUstream_st;

namespace mechanic::cuda {

// A row of device_tables.py's spans: what belongs to a scale lies together.
struct Span {
  int64_t first_chunk, chunks, first_tensor, tensors;
};

// Chunks that are folded at once: the threads of a block.
constexpr int64_t kGroup = 256;

// What fold.cuh makes sums of scales with, from the partial sums of chunks.
struct Reduction {
  const Span* spans;  // one a scale
  unsigned* tickets;  // ticket_count() of them, all 0 between launches
};

// A ticket for each group of chunks, at most chunk_count / kGroup + scale_count, then one a scale.
inline int64_t ticket_count(int64_t chunk_count, int64_t scale_count) {
  return chunk_count / kGroup + 2 * scale_count;
}

// Numbers on the device that decide about a step, or null: GradScaler's, clipping's, the tuner's.
struct StepScalars {
  const float* grad_scale;  // what the gradients have been multiplied by
  const float* found_inf;   // not 0: nothing changes in this step
  const double* clip;       // (N^2, max_norm)
  const double* steps;      // taken so far: what the rounding of a narrow Δ goes by
};

// Errors are std::runtime_error with the verb's and the CUDA call's name.
void accumulate(const Bucket& bucket, const Reduction& folding, const StepScalars& scaler,
                CUstream_st* stream);
void norm(const Bucket& bucket, const Reduction& folding, const StepScalars& scaler, CUstream_st* stream);
void apply(const Bucket& bucket, const Reduction& folding, const Tuner& tuner, const StepScalars& scaler,
           CUstream_st* stream);
void measure(const Bucket& bucket, const Reduction& folding, CUstream_st* stream);
void tune(const Sums* sums, const Tuner& tuner, const StepScalars& scaler, CUstream_st* stream);

}  // namespace mechanic::cuda
