// The verbs on the processor.
#pragma once

#include "../chunk.h"
#include "../vectors.h"

namespace mechanic::cpu {

// clip: (N^2, max_norm) or null; steps: taken so far, or null where Δ is wide.
void accumulate(const Bucket& bucket, const double* clip, const double* steps, int threads);
void apply(const Bucket& bucket, const Tuner& tuner, int threads);
void measure(const Bucket& bucket, int threads);
void norm(const Bucket& bucket, int threads);
void tune(const Sums* sums, const Tuner& tuner);

// The vector verbs: vectors.py says what each does.
void step_along(const Vectors& vectors, const double* c, int threads);
void axpby(const Vectors& vectors, double a, double c, int threads);
void difference_dots(const Vectors& vectors, int threads);
void dots(const Vectors& vectors, int threads);
void abs_max(const Vectors& vectors, int threads);
void adarem(const Vectors& vectors, const AdaRemOptions& options, const double* peaks, int threads);

// The instruction set that the kernels were chosen for on this processor.
const char* instruction_set();

}  // namespace mechanic::cpu
