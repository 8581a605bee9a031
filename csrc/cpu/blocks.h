// Loops over one block of elements, written once and compiled for each instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "../formulas.h"
#include "../storage.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

// One binary serves every x86-64: the loader picks the widest clone that the processor has.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define MECHANIC_CLONES __attribute__((target_clones("avx512f", "avx2", "default"), noinline))
#define MECHANIC_HAS_CLONES
#else
#define MECHANIC_CLONES __attribute__((noinline))
#endif

namespace mechanic::cpu {

// Below this many elements the work is done before a second thread has woken up.
constexpr int64_t kSerial = 1 << 16;

// Call run with a number of this dtype.
template <class Run>
void for_weight(DType dtype, Run run) {
  switch (dtype) {
    case DType::kFloat:
      return run(float());
    case DType::kDouble:
      return run(double());
    case DType::kBFloat16:
      return run(BFloat16());
    case DType::kHalf:
      return run(Half());
  }
}

// Elements of a sum in float, and of a burst of stores past the caches: in longer bursts the stores
// wait for each other (x_ref + S delta, 36 M floats on one core: 12 ms by 128, 25 ms by 1,024).
constexpr int kBlock = 128;

// Elements that accumulate takes at a time: all its streams of them stay in the first cache.
// Between 128 and 512 no difference stood out from the noise of the machine.
constexpr int kRun = 4 * kBlock;

// Partial sums are kept in lanes by the element's number and folded in a fixed order, so that
// every instruction set gives the same bits.
constexpr int kLanes = 16;

struct Lanes {
  double ab[kLanes], aa[kLanes];
};

inline double fold(const double* lane) {
  double sum[kLanes];
  for (int i = 0; i < kLanes; ++i) sum[i] = lane[i];
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
  }
  return sum[0];
}

// Whether the largest of float sums is far from where products overflow or lose digits. The bits
// of positive floats compare as they do, and a maximum of integers is vector code.
MECHANIC_INLINE bool in_range(const float* sums) {
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int l = 0; l < kLanes; ++l) {
    const uint32_t bits = bit_cast<uint32_t>(sums[l]) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest > bit_cast<uint32_t>(0x1p-80f) && largest < bit_cast<uint32_t>(0x1p80f);
}

// Sums of doubles need no such care.
MECHANIC_INLINE bool in_range(const double*) { return true; }

// lanes.ab += a.b, lanes.aa += a.a, in double: right for any numbers.
template <class T>
MECHANIC_INLINE void add_products_wide(const T* __restrict a, const T* __restrict b, int n,
                                       Lanes& lanes) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      lanes.ab[l] += double(a[i + l]) * double(b[i + l]);
      lanes.aa[l] += double(a[i + l]) * double(a[i + l]);
    }
  }
  for (int l = 0; i + l < n; ++l) {
    lanes.ab[l] += double(a[i + l]) * double(b[i + l]);
    lanes.aa[l] += double(a[i + l]) * double(a[i + l]);
  }
}

// The same for a whole block. Eight float products a lane are summed in float first, or the
// conversions would take longer than memory does; a block in which that could overflow or
// underflow (gradients of 1e20 or 1e-25, or all 0) is summed in double.
template <class T>
MECHANIC_INLINE void add_block(const T* __restrict a, const T* __restrict b, Lanes& lanes) {
  T ab[kLanes] = {}, aa[kLanes] = {};
  for (int i = 0; i < kBlock; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      ab[l] += a[i + l] * b[i + l];
      aa[l] += a[i + l] * a[i + l];
    }
  }
  if (in_range(ab) && in_range(aa)) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) lanes.ab[l] += ab[l], lanes.aa[l] += aa[l];
  } else {
    add_products_wide(a, b, kBlock, lanes);
  }
}

// The same for any number of elements.
template <class T>
MECHANIC_INLINE void add_products(const T* a, const T* b, int n, Lanes& lanes) {
  int i = 0;
  for (; i + kBlock <= n; i += kBlock) add_block(a + i, b + i, lanes);
  if (i < n) add_products_wide(a + i, b + i, n - i, lanes);
}

// Δ as it lies in memory: wide or narrow, the other one is null.
template <class T>
struct Delta {
  T* wide;
  BFloat16* narrow;
  uint32_t seed;  // of the first element's random bits

  // n elements from start on, in memory or, widened, in room.
  MECHANIC_INLINE T* read(int64_t start, int n, T* room) const {
    if (!narrow) return wide + start;
    for (int i = 0; i < n; ++i) room[i] = T(widen(narrow[start + i]));
    return room;
  }

  // The same elements back from room.
  MECHANIC_INLINE void write(int64_t start, int n, const T* room) const {
    if (!narrow) return;
    const uint32_t first = seed + uint32_t(start);
    for (int i = 0; i < n; ++i) {
      narrow[start + i] = stochastic_round(random_bits16(first, uint32_t(i)), float(room[i]));
    }
  }
};

// The four arrays of one accumulate that are walked together; x may be absent.
template <class X, class S>
struct Streams {
  const X* g;
  const X* x;
  Delta<Wide<X>> delta;
  S *state0, *state1;
};

template <class Base, bool kReadsX, class X, class S>
MECHANIC_INLINE void accumulate_block(const Streams<X, S>& at, int64_t start, int n,
                                      const Coefficients<Wide<X>>& c, Lanes& lanes) {
  using T = Wide<X>;
  const X* __restrict g = at.g + start;
  const X* __restrict x = kReadsX ? at.x + start : nullptr;
  alignas(64) T room[kRun];
  T* __restrict delta = at.delta.read(start, n, room);
  S* __restrict state0 = Base::kStates > 0 ? at.state0 + start : nullptr;
  S* __restrict state1 = Base::kStates > 1 ? at.state1 + start : nullptr;
  alignas(64) T gradient[kRun];
  for (int i = 0; i < n; ++i) gradient[i] = widen(g[i]) * c.gradient;
  add_products(gradient, delta, n, lanes);
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    T a = Base::kStates > 0 ? T(widen(state0[i])) : T(0);
    T b = Base::kStates > 1 ? T(widen(state1[i])) : T(0);
    const T weight = kReadsX ? T(widen(x[i])) : T(0);
    delta[i] = delta[i] + Base::update(finite_or_zero(gradient[i]), weight, a, b, c);
    if (Base::kStates > 0) narrow(a, state0[i]);
    if (Base::kStates > 1) narrow(b, state1[i]);
  }
  at.delta.write(start, n, delta);
}

// lanes.ab += g.delta with the old delta, lanes.aa += g.g; delta += u.
template <class Base, bool kReadsX, class X, class S>
MECHANIC_CLONES void accumulate_run(const Streams<X, S>& at, int64_t n,
                                    const Coefficients<Wide<X>>& coefficients, Lanes& out) {
  const Coefficients<Wide<X>> c = coefficients;
  Lanes lanes = {};
  int64_t i = 0;
  for (; i + kRun <= n; i += kRun) accumulate_block<Base, kReadsX>(at, i, kRun, c, lanes);
  accumulate_block<Base, kReadsX>(at, i, int(n - i), c, lanes);
  out = lanes;
}

// lanes.aa += g.g over the elements that are finite; lanes.ab is left to anything.
template <class X>
MECHANIC_INLINE void norm_block(const X* __restrict g, int n, Wide<X> multiplier, Lanes& lanes) {
  alignas(64) Wide<X> gradient[kBlock];
  for (int i = 0; i < n; ++i) gradient[i] = finite_or_zero(widen(g[i]) * multiplier);
  add_products(gradient, gradient, n, lanes);
}

template <class X>
MECHANIC_CLONES void norm_run(const X* g, int64_t n, Wide<X> multiplier, Lanes& out) {
  Lanes lanes = {};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) norm_block(g + i, kBlock, multiplier, lanes);
  norm_block(g + i, int(n - i), multiplier, lanes);
  out = lanes;
}

// Store one block past the caches if so wished.
template <class X>
MECHANIC_INLINE void put_block(const X* fresh, X* x, int n, bool streams) {
#if defined(__SSE2__)
  if (streams && n == kBlock && reinterpret_cast<uintptr_t>(x) % 16 == 0) {
    for (size_t i = 0; i < kBlock * sizeof(X) / 16; ++i) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(x) + i,
                       _mm_load_si128(reinterpret_cast<const __m128i*>(fresh) + i));
    }
    return;
  }
#endif
  memcpy(x, fresh, n * sizeof(X));
}

// Write x = round(x_ref + S delta) if there is an x_ref, then measure what stands in x:
// lanes.ab += x.delta, lanes.aa += x.x.
template <class X>
MECHANIC_INLINE void apply_block(const X* __restrict x_ref, const Delta<Wide<X>>& at, int64_t start,
                                 X* __restrict x, int n, Wide<X> scale, bool streams,
                                 Lanes& lanes) {
  alignas(64) Wide<X> room[kBlock];
  const Wide<X>* __restrict delta = at.read(start, n, room);
  alignas(64) X fresh[kBlock];
  alignas(64) Wide<X> rounded[kBlock];
  if (x_ref) {
    for (int i = 0; i < n; ++i) {
      narrow(blend(Wide<X>(widen(x_ref[i])), scale, delta[i]), fresh[i]);
      rounded[i] = widen(fresh[i]);
    }
    put_block(fresh, x, n, streams);
  } else {
    for (int i = 0; i < n; ++i) rounded[i] = widen(x[i]);
  }
  add_products(rounded, delta, n, lanes);
}

template <class X>
MECHANIC_CLONES void apply_run(const X* x_ref, const Delta<Wide<X>>& at, X* x, int64_t n,
                               Wide<X> scale, bool streams, Lanes& out) {
  const Delta<Wide<X>> delta = at;
  Lanes lanes = {};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    apply_block<X>(x_ref ? x_ref + i : nullptr, delta, i, x + i, kBlock, scale, streams, lanes);
  }
  apply_block<X>(x_ref ? x_ref + i : nullptr, delta, i, x + i, int(n - i), scale, false, lanes);
#if defined(__SSE2__)
  if (streams) _mm_sfence();  // or another thread might read a weight before its store is done
#endif
  out = lanes;
}

}  // namespace mechanic::cpu
