// The verbs on the processor.
#pragma once

#include "../chunk.h"

namespace mechanic::cpu {

// clip: (N^2, max_norm) or null.
void accumulate(const Bucket& bucket, const double* clip, int threads);
void apply(const Bucket& bucket, const Tuner& tuner, int threads);
void measure(const Bucket& bucket, int threads);
void norm(const Bucket& bucket, int threads);
void tune(const Sums* sums, const Tuner& tuner);

// The instruction set that the kernels were chosen for on this processor.
const char* instruction_set();

}  // namespace mechanic::cpu
