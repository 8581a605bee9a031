// Loops over one block of elements, written once and compiled for each instruction set.
#pragma once

#include <cstdint>

#include "../formulas.h"
#include "../storage.h"

// One binary serves every x86-64: the loader picks the widest clone that the processor has.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define MECHANIC_CLONES __attribute__((target_clones("avx512f", "avx2", "default"), noinline))
#else
#define MECHANIC_CLONES __attribute__((noinline))
#endif

namespace mechanic::cpu {

// Elements of a block: a few streams of it, widened, stay in the first-level cache.
constexpr int kBlock = 1024;

// Partial sums are kept in lanes by the element's number, and folded in a fixed order, so that
// every instruction set gives the same bits. Products are exact or nearly so in double: the
// gradients 1e20 and 1e-25 neither overflow nor vanish, and memory is the bottleneck anyway.
constexpr int kLanes = 16;

struct Lanes {
  double first[kLanes], second[kLanes];
};

inline double fold(const double* lane) {
  double sum[kLanes];
  for (int i = 0; i < kLanes; ++i) sum[i] = lane[i];
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
  }
  return sum[0];
}

template <class X>
MECHANIC_CLONES void widen_block(const X* from, Wide<X>* to, int n) {
  for (int i = 0; i < n; ++i) to[i] = widen(from[i]);
}

template <class X>
MECHANIC_CLONES void narrow_block(const Wide<X>* from, X* to, int n) {
  for (int i = 0; i < n; ++i) narrow(from[i], to[i]);
}

template <class Base, bool kReadsX, class T>
MECHANIC_INLINE void accumulate_element(const T* g, const T* x, T* delta, T* state0, T* state1,
                                        const Coefficients<T>& c, int i, double& gd, double& gg) {
  const T gradient = g[i] * c.gradient;
  const double wide_gradient = gradient;
  gd += wide_gradient * double(delta[i]);
  gg += wide_gradient * wide_gradient;
  T a = Base::kStates > 0 ? state0[i] : T(0);
  T b = Base::kStates > 1 ? state1[i] : T(0);
  const T weight = kReadsX ? x[i] : T(0);
  delta[i] = delta[i] + Base::update(finite_or_zero(gradient), weight, a, b, c);
  if (Base::kStates > 0) state0[i] = a;
  if (Base::kStates > 1) state1[i] = b;
}

// lanes.first += g.delta with the old delta, lanes.second += g.g; delta += u.
template <class Base, bool kReadsX, class T>
MECHANIC_CLONES void accumulate_block(const T* __restrict g, const T* __restrict x,
                                      T* __restrict delta, T* __restrict state0,
                                      T* __restrict state1, int n, const Coefficients<T>& c_in,
                                      Lanes& lanes) {
  const Coefficients<T> c = c_in;
  double gd[kLanes], gg[kLanes];
  for (int l = 0; l < kLanes; ++l) gd[l] = lanes.first[l], gg[l] = lanes.second[l];
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      accumulate_element<Base, kReadsX>(g, x, delta, state0, state1, c, i + l, gd[l], gg[l]);
    }
  }
  for (int l = 0; i + l < n; ++l) {
    accumulate_element<Base, kReadsX>(g, x, delta, state0, state1, c, i + l, gd[l], gg[l]);
  }
  for (int l = 0; l < kLanes; ++l) lanes.first[l] = gd[l], lanes.second[l] = gg[l];
}

// x = round(x_ref + S delta), in the weight's own dtype.
template <class X>
MECHANIC_CLONES void blend_block(const X* __restrict x_ref, const Wide<X>* __restrict delta,
                                 X* __restrict x, int n, Wide<X> scale) {
  for (int i = 0; i < n; ++i) narrow(blend(widen(x_ref[i]), scale, delta[i]), x[i]);
}

// lanes.first += x.delta, lanes.second += x.x.
template <class X>
MECHANIC_CLONES void measure_block(const X* __restrict x, const Wide<X>* __restrict delta, int n,
                                   Lanes& lanes) {
  double xd[kLanes], xx[kLanes];
  for (int l = 0; l < kLanes; ++l) xd[l] = lanes.first[l], xx[l] = lanes.second[l];
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const double wide = widen(x[i + l]);
      xd[l] += wide * double(delta[i + l]);
      xx[l] += wide * wide;
    }
  }
  for (int l = 0; i + l < n; ++l) {
    const double wide = widen(x[i + l]);
    xd[l] += wide * double(delta[i + l]);
    xx[l] += wide * wide;
  }
  for (int l = 0; l < kLanes; ++l) lanes.first[l] = xd[l], lanes.second[l] = xx[l];
}

}  // namespace mechanic::cpu
