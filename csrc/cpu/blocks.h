// Loops over the elements of a chunk, by blocks; compiled for each instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../formulas.h"
#include "../storage.h"
#include "states.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

// One binary for every x86-64: the loader picks the widest clone that the processor supports.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define MECHANIC_WIDEST "x86-64-v4"
#define MECHANIC_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "avx2", "default"), noinline))
#else
#define MECHANIC_WIDEST "avx512f"
#define MECHANIC_CLONES __attribute__((target_clones("avx512f", "avx2", "default"), noinline))
#endif
#define MECHANIC_HAS_CLONES
#else
#define MECHANIC_CLONES __attribute__((noinline))
#endif

namespace mechanic::cpu {

// Elements below which one thread does all the work: it is done before a second one has woken up.
constexpr int64_t kSerialElements = 1 << 16;

// Elements that are summed in float, and stored in one burst of non-temporal stores: in longer
// bursts the stores wait for each other (x_ref + S delta, 36 M floats on one core: 12 ms in blocks
// of 128, 25 ms in blocks of 1,024).
constexpr int kBlock = 128;

// Elements of a block of accumulate, few enough that all its streams stay in the first-level cache.
// Between 128 and 512 no difference was above the noise of the machine.
constexpr int kAccumulateBlock = 4 * kBlock;

// Partial sums are kept in lanes by the element's index and added in a fixed order, so that every
// instruction set gives the same bits.
constexpr int kLanes = 16;

struct Lanes {
  double ab[kLanes], aa[kLanes];
};

// Of step: ab is g.(x - x_ref) and aa g.g; ab is x.x and aa u.u.
struct StepLanes {
  Lanes gradient, update;
};

inline double reduce_lanes(const double* lane) {
  double sum[kLanes];
  for (int i = 0; i < kLanes; ++i) sum[i] = lane[i];
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
  }
  return sum[0];
}

// Whether the largest of the float sums is far from where products overflow or lose digits. The
// bits of positive floats compare as the floats do, and a maximum of integers vectorizes.
MECHANIC_INLINE bool in_range(const float* sums) {
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int l = 0; l < kLanes; ++l) {
    const uint32_t bits = bit_cast<uint32_t>(sums[l]) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest > bit_cast<uint32_t>(0x1p-80f) && largest < bit_cast<uint32_t>(0x1p80f);
}

// Doubles need no such check.
MECHANIC_INLINE bool in_range(const double*) { return true; }

// The products that are summed in Lanes::ab: a.b, or b.b, or none.
struct Dot {
  static constexpr bool kAdds = true;

  template <class T>
  static MECHANIC_INLINE T of(T a, T b) {
    return a * b;
  }
};

struct Nothing {
  static constexpr bool kAdds = false;

  template <class T>
  static MECHANIC_INLINE T of(T, T) {
    return 0;
  }
};

struct Square {
  static constexpr bool kAdds = true;

  template <class T>
  static MECHANIC_INLINE T of(T, T b) {
    return b * b;
  }
};

// Add the float sums of a block.
template <class T>
MECHANIC_INLINE void add_lanes(const T* ab, const T* aa, Lanes& lanes) {
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) lanes.ab[l] += ab[l], lanes.aa[l] += aa[l];
}

// lanes.ab += a.b, b.b or nothing, lanes.aa += a.a, in double, which is accurate for any floats.
template <class Second = Dot, class T>
MECHANIC_INLINE void add_products_wide(const T* __restrict a, const T* __restrict b, int n,
                                       Lanes& lanes) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      lanes.ab[l] += Second::of(double(a[i + l]), double(b[i + l]));
      lanes.aa[l] += double(a[i + l]) * double(a[i + l]);
    }
  }
  for (int l = 0; i + l < n; ++l) {
    lanes.ab[l] += Second::of(double(a[i + l]), double(b[i + l]));
    lanes.aa[l] += double(a[i + l]) * double(a[i + l]);
  }
}

// The same for a whole block. First eight float products a lane are summed in float, since
// converting each would take longer than the memory accesses; a block in which that could overflow
// or underflow (gradients of 1e20 or 1e-25, or all 0) is summed in double.
template <class Second, class T>
MECHANIC_INLINE void add_block_products(const T* __restrict a, const T* __restrict b,
                                        Lanes& lanes) {
  T ab[kLanes] = {}, aa[kLanes] = {};
  for (int i = 0; i < kBlock; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      ab[l] += Second::of(a[i + l], b[i + l]);
      aa[l] += a[i + l] * a[i + l];
    }
  }
  if ((!Second::kAdds || in_range(ab)) && in_range(aa)) {
    add_lanes(ab, aa, lanes);
  } else {
    add_products_wide<Second>(a, b, kBlock, lanes);
  }
}

// The same for any number of elements.
template <class Second = Dot, class T>
MECHANIC_INLINE void add_products(const T* a, const T* b, int n, Lanes& lanes) {
  int i = 0;
  for (; i + kBlock <= n; i += kBlock) add_block_products<Second>(a + i, b + i, lanes);
  if (i < n) add_products_wide<Second>(a + i, b + i, n - i, lanes);
}

// lanes += a.b, in double.
template <class T>
MECHANIC_INLINE void add_dot_wide(const T* __restrict a, const T* __restrict b, int n,
                                  double* __restrict lanes) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) lanes[l] += double(a[i + l]) * double(b[i + l]);
  }
  for (int l = 0; i + l < n; ++l) lanes[l] += double(a[i + l]) * double(b[i + l]);
}

// The arrays of one chunk that accumulate works on; x may be null.
template <class X, class S>
struct AccumulateStreams {
  const X* g;
  const X* x;
  Delta<opmath_t<X>, S> delta;
  States<opmath_t<X>, S> states;
};

// lanes.ab += g.delta with the old delta, lanes.aa += g.g; delta += u.
template <class Base, bool kReadsX, class X, class S>
MECHANIC_INLINE void accumulate_block(const AccumulateStreams<X, S>& at, int64_t start, int n,
                                      const Coefficients<opmath_t<X>>& c, Lanes& lanes) {
  using T = opmath_t<X>;
  const X* __restrict g = at.g + start;
  const X* __restrict x = kReadsX ? at.x + start : nullptr;
  alignas(64) T scratch[kAccumulateBlock];
  T* __restrict delta = at.delta.read(start, n, scratch);
  alignas(64) T scratch0[kAccumulateBlock], scratch1[kAccumulateBlock];
  T* __restrict state0 = nullptr;
  T* __restrict state1 = nullptr;
  if constexpr (Base::kStates > 0) state0 = at.states.first.read(start, n, scratch0);
  if constexpr (Base::kStates > 1) state1 = at.states.second.read(start, n, scratch1);
  alignas(64) T gradient[kAccumulateBlock];
  for (int i = 0; i < n; ++i) gradient[i] = widen(g[i]) * c.gradient;
  add_products(gradient, delta, n, lanes);
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    T a = Base::kStates > 0 ? state0[i] : T(0);
    T b = Base::kStates > 1 ? state1[i] : T(0);
    const T weight = kReadsX ? T(widen(x[i])) : T(0);
    delta[i] =
        delta[i] + Base::template update<false>(finite_or_zero(gradient[i]), weight, a, b, c);
    if (Base::kStates > 0) state0[i] = a;
    if (Base::kStates > 1) state1[i] = b;
  }
  if constexpr (Base::kStates > 0) at.states.first.write(start, n, state0);
  if constexpr (Base::kStates > 1) at.states.second.write(start, n, state1);
  at.delta.write(start, n, delta);
}

template <class Base, bool kReadsX, class X, class S>
MECHANIC_CLONES void accumulate_chunk(const AccumulateStreams<X, S>& at, int64_t n,
                                      const Coefficients<opmath_t<X>>& coefficients, Lanes& out) {
  const Coefficients<opmath_t<X>> c = coefficients;
  Lanes lanes = {};
  int64_t i = 0;
  for (; i + kAccumulateBlock <= n; i += kAccumulateBlock) {
    accumulate_block<Base, kReadsX>(at, i, kAccumulateBlock, c, lanes);
  }
  accumulate_block<Base, kReadsX>(at, i, int(n - i), c, lanes);
  out = lanes;
}

// The weights of a chunk: in T, or in 16 bits with low bits beside them; of a BFloat16 they may be
// null, then it is rounded stochastically.
template <class X>
struct Weights {
  X* x;
  int16_t* low;
  Rounding rounding;

  // Return n elements from `start` on: in memory, or joined in scratch.
  MECHANIC_INLINE opmath_t<X>* read(int64_t start, int n, opmath_t<X>* scratch) const {
    if constexpr (std::is_same_v<X, opmath_t<X>>) {
      return x + start;
    } else {
      if (low == nullptr) {
        for (int i = 0; i < n; ++i) scratch[i] = widen(x[start + i]);
      } else {
        for (int i = 0; i < n; ++i) scratch[i] = join(x[start + i], low[start + i]);
      }
      return scratch;
    }
  }

  // Write the same elements back from scratch.
  MECHANIC_INLINE void write(int64_t start, int n, const opmath_t<X>* scratch) const {
    if constexpr (std::is_same_v<X, BFloat16>) {
      if (low == nullptr) {
        for (int i = 0; i < n; ++i) {
          const uint32_t bits = rounding_bits(rounding, uint32_t(start + i), kWeightStride);
          x[start + i] = stochastic_round(bits >> 16, scratch[i]);
        }
        return;
      }
    }
    if constexpr (!std::is_same_v<X, opmath_t<X>>) {
      for (int i = 0; i < n; ++i) split(scratch[i], x[start + i], low[start + i]);
    }
  }
};

// The arrays of one chunk that step works on.
template <class X, class S>
struct StepStreams {
  const X* g;
  Weights<X> weights;
  const X* x_ref;  // from kept.first on
  States<opmath_t<X>, S> states;
  KeptBlocks kept;
};

// Those of n elements from `start` on that have an x_ref. So few have at most one run of them.
struct KeptRun {
  int first, count;

  MECHANIC_INLINE KeptRun(const KeptBlocks& kept, int64_t start, int n) {
    static_assert(kBlock <= kReferencePeriod - kReferenceBlock);
    const int at = (kept.phase + int(start)) % kReferencePeriod;
    first = at < kReferenceBlock ? 0 : kReferencePeriod - at;
    const int left = at < kReferenceBlock ? kReferenceBlock - at : kReferenceBlock;
    count = left < n - first ? left : n - first;
  }
};

// lanes += g.(x - x_ref) over those of n elements that have an x_ref, in double, given x.
template <bool kInPart, class X, class S>
MECHANIC_INLINE void add_displacement(const StepStreams<X, S>& at, int64_t start, int n,
                                      const opmath_t<X>* __restrict gradient,
                                      const opmath_t<X>* __restrict x, double* __restrict lanes) {
  using T = opmath_t<X>;
  const KeptRun run(at.kept, start, n);
  const int first = kInPart ? run.first : 0, count = kInPart ? run.count : n;
  if (count <= 0) return;
  const X* __restrict x_ref = at.x_ref + (kInPart ? at.kept.place(int(start) + first) : start);
  alignas(64) T displacement[kBlock];
  for (int i = 0; i < count; ++i) displacement[i] = x[first + i] - T(widen(x_ref[i]));
  add_dot_wide(gradient + first, displacement, count, lanes);
}

// Add the float sums of g.(x - x_ref), if all elements have an x_ref, and of g.g; or the products
// in double, where that is needed.
template <bool kInPart, bool kWhole, class X, class S>
MECHANIC_INLINE void add_gradient_sums(const StepStreams<X, S>& at, int64_t start, int n,
                                       const opmath_t<X>* __restrict gradient,
                                       const opmath_t<X>* __restrict x, const opmath_t<X>* gd,
                                       const opmath_t<X>* gg, Lanes& lanes) {
  const bool in_float = kWhole && in_range(gg) && (kInPart || in_range(gd));
  if (in_float) {
    add_lanes(gd, gg, lanes);
  } else {
    add_products_wide<Nothing>(gradient, gradient, n, lanes);
  }
  if (kInPart || !in_float) add_displacement<kInPart>(at, start, n, gradient, x, lanes.ab);
}

// x += S u for n elements, at most kBlock (kWhole: exactly), and the sums with the x before it. All
// in one loop, so that loads and sums go on while roots and divisions are computed: 1.15 times the
// time of torch's AdamW, and 1.30 with a loop for each (benchmarks/README.md). kInPart: not all
// elements have an x_ref; as a branch it cost the weights that have it whole 2 %.
template <class Base, bool kInPart, bool kWhole, class X, class S>
MECHANIC_INLINE void step_block(const StepStreams<X, S>& at, int64_t start, int n,
                                const Coefficients<opmath_t<X>>& c, opmath_t<X> scale,
                                StepLanes& lanes) {
  using T = opmath_t<X>;
  const X* __restrict g = at.g + start;
  const X* __restrict x_ref = kInPart ? nullptr : at.x_ref + start;
  alignas(64) T scratch0[kBlock], scratch1[kBlock];
  T* __restrict state0 = nullptr;
  T* __restrict state1 = nullptr;
  if constexpr (Base::kStates > 0) state0 = at.states.first.read(start, n, scratch0);
  if constexpr (Base::kStates > 1) state1 = at.states.second.read(start, n, scratch1);
  alignas(64) T joined[kBlock];
  T* __restrict x = at.weights.read(start, n, joined);
  alignas(64) T gradient[kBlock];
  alignas(64) T x_old[kBlock];
  alignas(64) T update[kBlock];
  T gd[kLanes] = {}, gg[kLanes] = {}, xx[kLanes] = {}, uu[kLanes] = {};
  for (int first = 0; first < n; first += kLanes) {
    const int count = kWhole || n - first > kLanes ? kLanes : n - first;
#pragma omp simd
    for (int l = 0; l < count; ++l) {
      const int i = first + l;
      gradient[i] = widen(g[i]) * c.gradient;
      x_old[i] = x[i];
      if constexpr (!kInPart) gd[l] += gradient[i] * (x_old[i] - T(widen(x_ref[i])));
      gg[l] += gradient[i] * gradient[i];
      T a = Base::kStates > 0 ? state0[i] : T(0);
      T b = Base::kStates > 1 ? state1[i] : T(0);
      update[i] = Base::template update<true>(finite_or_zero(gradient[i]), x_old[i], a, b, c);
      if (Base::kStates > 0) state0[i] = a;
      if (Base::kStates > 1) state1[i] = b;
      xx[l] += x_old[i] * x_old[i];
      uu[l] += update[i] * update[i];
      x[i] = apply_update(x_old[i], scale, update[i]);
    }
  }
  if constexpr (Base::kStates > 0) at.states.first.write(start, n, state0);
  if constexpr (Base::kStates > 1) at.states.second.write(start, n, state1);
  at.weights.write(start, n, x);
  add_gradient_sums<kInPart, kWhole>(at, start, n, gradient, x_old, gd, gg, lanes.gradient);
  if (kWhole && in_range(xx) && in_range(uu)) {
    add_lanes(xx, uu, lanes.update);
  } else {
    add_products_wide<Square>(update, x_old, n, lanes.update);
  }
}

template <class Base, bool kInPart, class X, class S>
MECHANIC_CLONES void step_chunk(const StepStreams<X, S>& at, int64_t n,
                                const Coefficients<opmath_t<X>>& coefficients, opmath_t<X> scale,
                                StepLanes& out) {
  const Coefficients<opmath_t<X>> c = coefficients;
  StepLanes lanes = {};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    step_block<Base, kInPart, true>(at, i, kBlock, c, scale, lanes);
  }
  step_block<Base, kInPart, false>(at, i, int(n - i), c, scale, lanes);
  out = lanes;
}

// The momentum of n elements moves, to[...] = n, and the sums; x stays. In lanes.update.aa is x.x.
template <bool kInPart, bool kWhole, class X, class S, class N>
MECHANIC_INLINE void momentum_block(const StepStreams<X, S>& at, N* __restrict to, int64_t start,
                                    int n, const Coefficients<opmath_t<X>>& c, StepLanes& lanes) {
  using T = opmath_t<X>;
  const X* __restrict g = at.g + start;
  const X* __restrict x_ref = kInPart ? nullptr : at.x_ref + start;
  alignas(64) T scratch[kBlock], joined[kBlock], gradient[kBlock], direction[kBlock];
  T* __restrict buffer = at.states.first.read(start, n, scratch);
  const T* __restrict x = at.weights.read(start, n, joined);
  T gd[kLanes] = {}, gg[kLanes] = {}, xx[kLanes] = {}, none[kLanes] = {};
  for (int first = 0; first < n; first += kLanes) {
    const int count = kWhole || n - first > kLanes ? kLanes : n - first;
#pragma omp simd
    for (int l = 0; l < count; ++l) {
      const int i = first + l;
      gradient[i] = widen(g[i]) * c.gradient;
      if constexpr (!kInPart) gd[l] += gradient[i] * (x[i] - T(widen(x_ref[i])));
      gg[l] += gradient[i] * gradient[i];
      xx[l] += x[i] * x[i];
      T moved = buffer[i];
      direction[i] = Muon::momentum(finite_or_zero(gradient[i]), moved, c);
      buffer[i] = moved;
    }
  }
  at.states.first.write(start, n, buffer);
  for (int i = 0; i < n; ++i) narrow(direction[i], to[start + i]);
  add_gradient_sums<kInPart, kWhole>(at, start, n, gradient, x, gd, gg, lanes.gradient);
  if (kWhole && in_range(xx)) {
    add_lanes(none, xx, lanes.update);
  } else {
    add_products_wide<Nothing>(x, x, n, lanes.update);
  }
}

template <bool kInPart, class X, class S, class N>
MECHANIC_CLONES void momentum_chunk(const StepStreams<X, S>& at, N* to, int64_t n,
                                    const Coefficients<opmath_t<X>>& coefficients, StepLanes& out) {
  const Coefficients<opmath_t<X>> c = coefficients;
  StepLanes lanes = {};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) momentum_block<kInPart, true>(at, to, i, kBlock, c, lanes);
  momentum_block<kInPart, false>(at, to, i, int(n - i), c, lanes);
  out = lanes;
}

// x += S u for n elements, given O, and lanes.aa += u.u.
template <class X, class N>
MECHANIC_INLINE void direction_block(const Weights<X>& at, const N* __restrict o, int64_t start,
                                     int n, const Coefficients<opmath_t<X>>& c, opmath_t<X> ratio,
                                     opmath_t<X> scale, Lanes& lanes) {
  using T = opmath_t<X>;
  alignas(64) T joined[kBlock], update[kBlock];
  T* __restrict x = at.read(start, n, joined);
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    update[i] = Muon::update(T(widen(o[start + i])) * ratio, x[i], c);
    x[i] = apply_update(x[i], scale, update[i]);
  }
  at.write(start, n, x);
  add_products<Nothing>(update, update, n, lanes);
}

template <class X, class N>
MECHANIC_CLONES void direction_chunk(const Weights<X>& weights, const N* o, int64_t n,
                                     const Coefficients<opmath_t<X>>& coefficients,
                                     opmath_t<X> ratio, opmath_t<X> scale, Lanes& out) {
  const Weights<X> at = weights;
  const Coefficients<opmath_t<X>> c = coefficients;
  Lanes lanes = {};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    direction_block(at, o, i, kBlock, c, ratio, scale, lanes);
  }
  direction_block(at, o, i, int(n - i), c, ratio, scale, lanes);
  out = lanes;
}

// lanes.aa += g.g over the finite elements; lanes.ab means nothing.
template <class X>
MECHANIC_INLINE void norm_block(const X* __restrict g, int n, opmath_t<X> multiplier,
                                Lanes& lanes) {
  alignas(64) opmath_t<X> gradient[kBlock];
  for (int i = 0; i < n; ++i) gradient[i] = finite_or_zero(widen(g[i]) * multiplier);
  add_products(gradient, gradient, n, lanes);
}

template <class X>
MECHANIC_CLONES void norm_chunk(const X* g, int64_t n, opmath_t<X> multiplier, Lanes& out) {
  Lanes lanes = {};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) norm_block(g + i, kBlock, multiplier, lanes);
  norm_block(g + i, int(n - i), multiplier, lanes);
  out = lanes;
}

// Write one block, optionally with non-temporal stores.
template <class X>
MECHANIC_INLINE void store_block(const X* from, X* to, int n, [[maybe_unused]] bool non_temporal) {
#if defined(__SSE2__)
  if (non_temporal && n == kBlock && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    for (size_t i = 0; i < kBlock * sizeof(X) / 16; ++i) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i,
                       _mm_load_si128(reinterpret_cast<const __m128i*>(from) + i));
    }
    return;
  }
#endif
  memcpy(to, from, n * sizeof(X));
}

// The arrays of one chunk that apply works on; x_ref is null where x is only measured. S: codes, or
// anything else.
template <class X, class S>
struct ApplyStreams {
  const X* x_ref;
  Delta<opmath_t<X>, S> delta;
  X* x;
};

// x = round(x_ref + S delta) if there is an x_ref; then lanes.ab += x.delta, lanes.aa += x.x.
template <class X, class S>
MECHANIC_INLINE void apply_block(const ApplyStreams<X, S>& at, int64_t start, int n,
                                 opmath_t<X> scale, bool non_temporal, Lanes& lanes) {
  using T = opmath_t<X>;
  const X* __restrict x_ref = at.x_ref ? at.x_ref + start : nullptr;
  X* __restrict x = at.x + start;
  alignas(64) T scratch[kBlock];
  const T* __restrict delta = at.delta.read(start, n, scratch);
  alignas(64) X x_new[kBlock];
  alignas(64) T rounded[kBlock];
  if (x_ref) {
    for (int i = 0; i < n; ++i) {
      narrow(apply_scale(T(widen(x_ref[i])), scale, delta[i]), x_new[i]);
      rounded[i] = widen(x_new[i]);
    }
    store_block(x_new, x, n, non_temporal);
  } else {
    for (int i = 0; i < n; ++i) rounded[i] = widen(x[i]);
  }
  add_products(rounded, delta, n, lanes);
}

template <class X, class S>
MECHANIC_CLONES void apply_chunk(const ApplyStreams<X, S>& streams, int64_t n, opmath_t<X> scale,
                                 bool non_temporal, Lanes& out) {
  const ApplyStreams<X, S> at = streams;
  Lanes lanes = {};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) apply_block(at, i, kBlock, scale, non_temporal, lanes);
  apply_block(at, i, int(n - i), scale, false, lanes);
#if defined(__SSE2__)
  if (non_temporal) _mm_sfence();  // or another thread might read a weight before it is stored
#endif
  out = lanes;
}

}  // namespace mechanic::cpu
