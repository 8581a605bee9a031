// What the verbs work on: addresses and lengths only, the same layout in C++, CUDA and Triton.
#pragma once

#include <cstdint>

namespace mechanic {

// A row of the tensor table. An address of 0: absent. bucket.py writes it.
struct Tensor {
  int64_t gradient, weight, x_ref, delta, state0, state1, step;
  int64_t scale;   // its row of the sums and of the tuner
  int64_t group;   // its row of the hyperparameters
  int64_t number;  // its own in the optimizer
};

// A piece of work: elements [offset, offset + length) of one tensor.
struct Chunk {
  int64_t tensor, offset, length;
};

// A row of the hyperparameters. SGD's momentum and dampening stand in beta1 and beta2.
struct Hyper {
  double lr, beta1, beta2, eps, l2, decay, nesterov, gradient;
};

// A row of the sums over one scale, and of the partial sums of one chunk.
struct Sums {
  double gd, xd, gg, xx;
};

enum class Kind : int64_t { kSgd, kMomentum, kAdam, kLion };
enum class DType : int64_t { kFloat, kDouble, kBFloat16, kHalf };

struct Bucket {
  const Tensor* tensors;
  const Chunk* chunks;
  const Hyper* hyper;
  Sums* partials;  // one a chunk
  Sums* sums;      // one a scale
  int64_t tensor_count, chunk_count, scale_count, elements;
  Kind kind;
  DType weight;  // of x, g and x_ref; the arithmetic is in float, or double beside double
  DType state;   // of the base's own state: the arithmetic's, or the weight's
  DType delta;   // the arithmetic's, or bfloat16
};

// The tuner: rows of s, r, v, m (betas each), then two counters; constants as in tuner.py.
struct Tuner {
  double* state;
  const double* constants;
  int64_t scale_count, betas;
};

}  // namespace mechanic
