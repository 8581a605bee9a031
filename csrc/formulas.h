// Every scalar formula: the base updates and the tuner. Registers in, registers out.
// reference.py states the same in PyTorch; one rounding an operation there and here.
#pragma once

#include <cmath>
#include <cstdint>

#include "chunk.h"

#if defined(__CUDACC__)
#define MECHANIC_INLINE __host__ __device__ __forceinline__
#else
#define MECHANIC_INLINE inline __attribute__((always_inline))
#endif

namespace mechanic {

// c = min(1, max_norm / (N + 1e-6)) with clip = (N^2, max_norm), as torch's clip_grad_norm_.
MECHANIC_INLINE double clip_coefficient(const double* clip) {
  const double c = clip[1] / (std::sqrt(clip[0]) + 1e-6);
  return c < 1 ? c : 1;
}

// What multiplies a gradient: -1 to maximize, over GradScaler's scale, times c; null: without it.
MECHANIC_INLINE double multiplier(const Hyper& h, const float* grad_scale, const double* clip) {
  double gradient = h.gradient;
  if (grad_scale != nullptr) gradient /= double(*grad_scale);
  if (clip != nullptr) gradient *= clip_coefficient(clip);
  return gradient;
}

// What an update needs beside registers, made in double once a chunk.
template <class T>
struct Coefficients {
  T gradient;      // multiplies g: see multiplier
  T beta1, rest1;  // rest1 = 1 - beta1, or SGD's 1 - dampening
  T beta2, rest2;
  T eps, l2;
  T rate;         // lr, for Adam over its first bias correction
  T decay;        // lr * decoupled weight decay
  T correction2;  // Adam's 1 / sqrt(1 - beta2^t)
  bool nesterov;
};

template <class T>
MECHANIC_INLINE Coefficients<T> plain_coefficients(const Hyper& h) {
  Coefficients<T> c;
  c.gradient = T(h.gradient);
  c.beta1 = T(h.beta1);
  c.rest1 = T(1 - h.beta1);
  c.beta2 = T(h.beta2);
  c.rest2 = T(1 - h.beta2);
  c.eps = T(h.eps);
  c.l2 = T(h.l2);
  c.rate = T(h.lr);
  c.decay = T(h.lr * h.decay);
  c.correction2 = T(1);
  c.nesterov = h.nesterov != 0;
  return c;
}

// u = -lr (g + l2 x)
struct Sgd {
  static constexpr int kStates = 0;

  template <class T>
  static MECHANIC_INLINE Coefficients<T> coefficients(const Hyper& h, double) {
    return plain_coefficients<T>(h);
  }

  template <class T>
  static MECHANIC_INLINE T update(T g, T x, T&, T&, const Coefficients<T>& c) {
    return -(c.rate * (g + c.l2 * x));
  }
};

// buffer = mu buffer + (1 - dampening) d, the first time buffer = d; u = -lr buffer, or Nesterov's
struct Momentum {
  static constexpr int kStates = 1;

  template <class T>
  static MECHANIC_INLINE Coefficients<T> coefficients(const Hyper& h, double step) {
    Coefficients<T> c = plain_coefficients<T>(h);
    c.rest1 = step == 0 ? T(1) : T(1 - h.beta2);
    return c;
  }

  template <class T>
  static MECHANIC_INLINE T update(T g, T x, T& buffer, T&, const Coefficients<T>& c) {
    const T d = g + c.l2 * x;
    buffer = c.beta1 * buffer + c.rest1 * d;
    return -(c.rate * (c.nesterov ? d + c.beta1 * buffer : buffer));
  }
};

// u = -lr/(1-beta1^t) m / (sqrt(v)/sqrt(1-beta2^t) + eps) - lr decay x, as torch's Adam and AdamW
struct Adam {
  static constexpr int kStates = 2;

  template <class T>
  static MECHANIC_INLINE Coefficients<T> coefficients(const Hyper& h, double step) {
    Coefficients<T> c = plain_coefficients<T>(h);
    c.rate = T(h.lr / (1 - pow(h.beta1, step + 1)));
    c.correction2 = T(1 / sqrt(1 - pow(h.beta2, step + 1)));
    return c;
  }

  template <class T>
  static MECHANIC_INLINE T update(T g, T x, T& m, T& v, const Coefficients<T>& c) {
    // Beside a decoupled decay x may be infinite, and 0 times it would spoil m and v.
    g = c.l2 != 0 ? g + c.l2 * x : g;
    m = c.beta1 * m + c.rest1 * g;
    v = c.beta2 * v + c.rest2 * (g * g);
    const T direction = (c.rate * m) / (std::sqrt(v) * c.correction2 + c.eps);
    return -direction - c.decay * x;
  }
};

// u = -lr (sign(beta1 m + (1-beta1) g) + decay x); m = beta2 m + (1-beta2) g
struct Lion {
  static constexpr int kStates = 1;

  template <class T>
  static MECHANIC_INLINE Coefficients<T> coefficients(const Hyper& h, double) {
    return plain_coefficients<T>(h);
  }

  template <class T>
  static MECHANIC_INLINE T update(T g, T x, T& m, T&, const Coefficients<T>& c) {
    const T mixed = c.beta1 * m + c.rest1 * g;
    const T direction = T(mixed > 0) - T(mixed < 0);
    m = c.beta2 * m + c.rest2 * g;
    return -(c.rate * direction) - c.decay * x;
  }
};

// An element that is not finite enters the update as 0.
template <class T>
MECHANIC_INLINE T finite_or_zero(T g) {
  return g - g == T(0) ? g : T(0);
}

// A hash of 32 bits in which each depends on all, "lowbias32".
// Source: C. Wellons, Prospecting for Hash Functions, 2018.
MECHANIC_INLINE uint32_t hash32(uint32_t n) {
  n = (n ^ (n >> 16)) * 0x7feb352du;
  n = (n ^ (n >> 15)) * 0x846ca68bu;
  return n ^ (n >> 16);
}

// What the random bits of a weight depend on, after so many steps; null: none are wanted.
MECHANIC_INLINE uint32_t seed(const double* steps, int64_t number) {
  return steps == nullptr ? 0 : hash32(hash32(uint32_t(int64_t(*steps))) + uint32_t(number));
}

// 16 random bits for an element, which is its place in the weight's memory: the upper half of the
// hash, which its last step leaves as it is.
MECHANIC_INLINE uint32_t random_bits16(uint32_t seed, uint32_t element) {
  uint32_t n = element + seed;
  n = (n ^ (n >> 16)) * 0x7feb352du;
  return ((n ^ (n >> 15)) * 0x846ca68bu) >> 16;
}

// x = x_ref + S delta
template <class T>
MECHANIC_INLINE T blend(T x_ref, T scale, T delta) {
  return x_ref + scale * delta;
}

// x = w - c d
template <class T>
MECHANIC_INLINE T stepped_along(T w, T c, T d) {
  return w - c * d;
}

// AdaRem's update, and its momentum moved on: b = sign(g) m / (max|m| + eps),
// u = -lr ((1 + boost b) g + decay x), m = beta m + (1 - beta) g. reach = boost / (max|m| + eps).
template <class T>
struct AdaRem {
  T lr, beta, rest, reach, decay;

  MECHANIC_INLINE T update(T g, T x, T& m) const {
    const T sign = T(g > 0) - T(g < 0);
    const T adjusted = (T(1) + reach * (sign * m)) * g;
    m = beta * m + rest * g;
    return -(lr * (adjusted + decay * x));
  }
};

// S = sum of s, in the order of the betas
MECHANIC_INLINE double total(const double* s, int64_t betas) {
  double sum = s[0];
  for (int64_t i = 1; i < betas; ++i) sum = sum + s[i];
  return sum;
}

// The columns of Tuner::constants before the betas.
enum Constant { kDecay, kInit, kEps, kEpsInM, kClampsH, kFloorsR, kLearning, kPace, kBetas };

// One row of the tuner learns from its sums; returns whether sums and h were finite.
// h = g.delta + lambda S sqrt(g.g) / (sqrt(x.x) + eps) x.delta
MECHANIC_INLINE bool tune_row(const Sums& sums, double* state, const double* c, int64_t n) {
  double *s = state, *r = state + n, *v = state + 2 * n, *m = state + 3 * n;
  double* counters = state + 4 * n;
  const double decay = c[kDecay] * total(s, n) * std::sqrt(sums.gg);
  const double h = sums.gd + decay / (std::sqrt(sums.xx) + c[kEps]) * sums.xd;
  const bool finite = std::isfinite(sums.gd) && std::isfinite(sums.xd) && std::isfinite(sums.gg) &&
                      std::isfinite(sums.xx) && std::isfinite(h);
  counters[0] += 1;
  if (!finite || c[kLearning] == 0) return finite;
  for (int64_t i = 0; i < n; ++i) {
    const double beta = c[kBetas + i];
    const double reward_h = c[kClampsH] != 0 ? fmax(fmin(h, m[i]), -m[i]) : h;
    m[i] = fmax(beta * m[i], std::fabs(h) + (c[kEpsInM] != 0 ? c[kEps] : 0));
    v[i] = beta * beta * v[i] + h * h;
    r[i] = beta * r[i] - reward_h * s[i];
    if (c[kFloorsR] != 0) r[i] = fmax(r[i], 0.0);
    const double next =
        (c[kInit] / double(n) * m[i] + fmax(r[i], 0.0)) / (std::sqrt(v[i]) + c[kEps]);
    // Where S anneals with the schedule, s takes a part of its move.
    s[i] = c[kPace] < 1 ? s[i] + c[kPace] * (next - s[i]) : next;
  }
  return true;
}

// All rows; the first one counts the steps at which any was not finite.
MECHANIC_INLINE void tune_rows(const Sums* sums, const Tuner& tuner) {
  const int64_t width = 4 * tuner.betas + 2;
  bool finite = true;
  for (int64_t row = 0; row < tuner.scale_count; ++row) {
    finite &= tune_row(sums[row], tuner.state + row * width, tuner.constants, tuner.betas);
  }
  if (!finite) tuner.state[width - 1] += 1;
}

}  // namespace mechanic
