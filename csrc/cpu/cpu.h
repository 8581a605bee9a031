// The ops on the CPU.
#pragma once

#include "../chunk.h"
#include "../vectors.h"

namespace mechanic::cpu {

// What each op does: see backends/__init__.py, and vectors/reference.py for those over vectors.

// clip: (N^2, max_norm) or null; step_count: the steps taken so far, null where nothing is rounded
// by random bits.
void accumulate(const Bucket& bucket, const double* clip, const double* step_count, int threads);
void apply(const Bucket& bucket, const Tuner& tuner, int threads);
void measure(const Bucket& bucket, int threads);
void norm(const Bucket& bucket, int threads);
void tune(const Sums* sums, const Tuner& tuner);
void step(const Bucket& bucket, const LogTuner& tuner, const double* clip, const double* step_count,
          int threads);
// The two ends of a step of Muon: the sums and n, in directions; then x += S u of O.
void muon_momentum(const Bucket& bucket, const Directions& n, const double* clip,
                   const double* step_count, int threads);
void muon_update(const Bucket& bucket, const Directions& o, double ratio, const LogTuner& tuner,
                 const double* step_count, int threads);
void log_tune(const Sums* sums, const LogTuner& tuner);

void step_along(const Vectors& vectors, const double* c, int threads);
void axpby(const Vectors& vectors, double a, double c, int threads);
void difference_dots(const Vectors& vectors, int threads);
void dots(const Vectors& vectors, int threads);
void abs_max(const Vectors& vectors, int threads);
void adarem(const Vectors& vectors, const AdaRemOptions& options, const double* peaks, int threads);

// Return the instruction set of the clones that run on this processor.
const char* instruction_set();

}  // namespace mechanic::cpu
