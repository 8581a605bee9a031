// What the vector verbs work on: vectors over all weights of one device and dtype, piece by piece.
#pragma once

#include <cstdint>

#include "chunk.h"

namespace mechanic {

// The streams of one tensor, in the order in which a verb names them. vectors.py writes it.
struct Streams4 {
  int64_t at[4];
};

// What a chunk leaves behind: sums, or a maximum in the first place.
struct Partial {
  double value[4];
};

struct Vectors {
  const Streams4* streams;  // one a tensor
  const Chunk* chunks;
  Partial* partials;  // one a chunk
  int64_t chunk_count, elements;
  DType dtype;  // of the narrow streams; the others are float, or double beside double
};

// AdaRem's numbers: see formulas.h.
struct AdaRemOptions {
  double lr, beta, boost, decay, eps;
};

}  // namespace mechanic
