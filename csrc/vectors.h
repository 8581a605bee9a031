// What the vector ops work on: vectors over all weights of one device and dtype, by chunks.
#pragma once

#include <cstdint>

#include "chunk.h"

namespace mechanic {

// The addresses of one weight's part of each vector, in the order of the op's arguments.
// vectors/space.py writes them.
struct VectorStreams {
  int64_t address[4];
};

// The partial results of one chunk: sums, or a maximum in the first place.
struct Partial {
  double value[4];
};

struct Vectors {
  const VectorStreams* streams;  // one a weight
  const Chunk* chunks;
  Partial* partials;  // one a chunk
  int64_t chunk_count, elements;
  DType dtype;  // of the vectors that have the weights' dtype; the others have opmath_t of it
};

// AdaRem's numbers in one step; boost is lambda^t.
struct AdaRemOptions {
  double lr, beta, boost, decay, eps;
};

}  // namespace mechanic
