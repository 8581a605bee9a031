// How 16-bit numbers are stored: widened after a load, rounded to nearest even before a store.
// On a CPU by integer arithmetic without branches, so that loops vectorize; on a GPU by
// instructions that give the same bits, except for the payload of a NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "chunk.h"

namespace mechanic {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

template <class To, class From>
MECHANIC_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "both types must have the same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// The dtype of arithmetic: double for double, float for everything else.
template <class X>
struct OpMathType {
  using type = float;
};
template <>
struct OpMathType<double> {
  using type = double;
};
template <class X>
using opmath_t = typename OpMathType<X>::type;

// Call run with a number of this dtype.
template <class Run>
void for_dtype(DType dtype, Run run) {
  switch (dtype) {
    case DType::kFloat:
      return run(float());
    case DType::kDouble:
      return run(double());
    case DType::kBFloat16:
      return run(BFloat16());
    case DType::kHalf:
      return run(Half());
    case DType::kCode:  // of no weight
      return;
  }
}

// Stands for codes among the dtypes of a state and of delta, see quantize.h.
struct Code {};

// Call run with a number of the weights' dtype and one of the state's.
template <class Run>
void for_stored(const DTypes& dtypes, Run run) {
  for_dtype(dtypes.weight, [&](auto weight) {
    using T = opmath_t<decltype(weight)>;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (dtypes.state == DType::kCode) return run(weight, Code());
      if (dtypes.state == DType::kBFloat16) return run(weight, BFloat16());
    }
    if (dtypes.state == dtypes.weight) return run(weight, weight);
    run(weight, T());
  });
}

// Call run with a number of the weights' dtype, and with Code if delta has codes or else a number.
template <class Run>
void for_delta(const DTypes& dtypes, Run run) {
  for_dtype(dtypes.weight, [&](auto weight) {
    using T = opmath_t<decltype(weight)>;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (dtypes.delta == DType::kCode) return run(weight, Code());
    }
    run(weight, T());
  });
}

MECHANIC_INLINE float widen(float x) { return x; }
MECHANIC_INLINE double widen(double x) { return x; }
MECHANIC_INLINE float widen(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

MECHANIC_INLINE float widen(Half x) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  // A normal half is shifted to a float's fields and its exponent rebased; one of all ones (inf,
  // NaN) stays so. A subnormal half counts units of 2^-24. No float here is subnormal itself: where
  // the processor is told to take such numbers for 0 (torch.set_flush_denormal) nothing is lost.
  const uint32_t half = x.bits & 0x7fff;
  const uint32_t normal = (half << 13) + (half >= 0x7c00u ? 0x70000000u : 0x38000000u);
  const uint32_t subnormal = bit_cast<uint32_t>(float(int32_t(half)) * 0x1p-24f);
  const uint32_t magnitude = half < 0x0400u ? subnormal : normal;
  return bit_cast<float>(magnitude | uint32_t(x.bits & 0x8000) << 16);
#endif
}

MECHANIC_INLINE void narrow(float x, float& to) { to = x; }
MECHANIC_INLINE void narrow(double x, double& to) { to = x; }

MECHANIC_INLINE void narrow(float x, BFloat16& to) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  // Rounding up could turn a NaN into an infinity or a zero.
  to.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u | (bits >> 16) : rounded);
#endif
}

MECHANIC_INLINE void narrow(float x, Half& to) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal halves: rebias the exponent, round to even. Subnormal halves: adding 0.5, whose last
  // place is that of a subnormal half, rounds to that place.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t subnormal =
      bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to.bits = uint16_t(half | ((bits >> 16) & 0x8000u));
#endif
}

// A float that is kept as the 16-bit number nearest to it and 16 low bits. Whoever writes the
// 16-bit number alone moves the float by less than half its last place, and a 0 that is written
// stays 0.
//
// A bfloat16 is the upper half of a float. The low bits are the lower half, counted from the
// bfloat16, which is the nearest one: nothing is lost.
MECHANIC_INLINE float join(BFloat16 x, int16_t low) {
  const uint32_t high = uint32_t(x.bits) << 16;
  const uint32_t magnitude = high & 0x7fffffffu;
  const bool exact = magnitude == 0 || magnitude >= 0x7f800000u;
  return bit_cast<float>(exact ? high : high + uint32_t(int32_t(low)));
}

MECHANIC_INLINE void split(float wide, BFloat16& x, int16_t& low) {
  const uint32_t bits = bit_cast<uint32_t>(wide);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  x.bits = uint16_t(is_nan ? 0x7fc0u | (bits >> 16) : (bits + 0x8000u) >> 16);
  low = int16_t(uint16_t(bits));
}

// The exponent, as a float has it, of 2^-16 of the last place of a half.
MECHANIC_INLINE uint32_t low_exponent(float x) {
  const uint32_t exponent = (bit_cast<uint32_t>(x) & 0x7f800000u) >> 23;
  return (exponent < 113 ? 113 : exponent) - 26;
}

MECHANIC_INLINE float low_unit(float x) { return bit_cast<float>(low_exponent(x) << 23); }

// A half has fewer exponents than a float, so its low bits count fractions of its last place.
// Nothing is lost of a float in the range of normal halves.
MECHANIC_INLINE float join(Half x, int16_t low) {
  const float high = widen(x);
  return high + float(low) * low_unit(high);
}

MECHANIC_INLINE void split(float wide, Half& x, int16_t& low) {
  narrow(wide, x);
  const float high = widen(x);
  // Over the unit: a power of 2, whose reciprocal is exact.
  const float rest = (wide - high) * bit_cast<float>((254 - low_exponent(high)) << 23);
  const float limited = rest > 32767.0f ? 32767.0f : (rest < -32767.0f ? -32767.0f : rest);
  // Of an infinite or NaN x the rest is NaN.
  low = int16_t(int32_t(limited == limited ? limited + (limited < 0 ? -0.5f : 0.5f) : 0.0f));
}

}  // namespace mechanic
