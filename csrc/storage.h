// How 16-bit numbers lie in memory: widened at the door, rounded to nearest even on the way out.
// Integer arithmetic without branches, so that loops over them become vector code; on a GPU the
// instructions that give the same bits (but for what is written into a NaN).
#pragma once

#include <cstdint>
#include <cstring>

#include "formulas.h"

namespace mechanic {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

template <class To, class From>
MECHANIC_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps their number");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// The arithmetic, and a Δ that is not narrow: double beside double, float beside everything else.
template <class X>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class X>
using Wide = typename WideOf<X>::type;

MECHANIC_INLINE float widen(float x) { return x; }
MECHANIC_INLINE double widen(double x) { return x; }
MECHANIC_INLINE float widen(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

MECHANIC_INLINE float widen(Half x) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  // Exponent and mantissa moved into a float's places are 2^112 too small; the multiplication
  // also makes subnormal halves right. An exponent of all ones (inf, NaN) must stay all ones.
  const uint32_t shifted = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t scaled = bit_cast<uint32_t>(bit_cast<float>(shifted) * 0x1p112f);
  const uint32_t magnitude = shifted >= 0x0f800000u ? (shifted | 0x7f800000u) : scaled;
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

// Up in magnitude as often as what is cut off is of a last place; bits: 16 random ones. x is the
// result of an operation: its NaNs are quiet ones, which cutting leaves NaN and adding might not.
MECHANIC_INLINE BFloat16 stochastic_round(uint32_t bits, float x) {
  return {uint16_t((bit_cast<uint32_t>(x) + (x == x ? bits : 0)) >> 16)};
}

MECHANIC_INLINE void narrow(float x, Half& to) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal halves: move the exponent, round to even. Subnormal ones: let the float addition of a
  // number whose last place is the last place of a subnormal half do the rounding.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t subnormal =
      bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to.bits = uint16_t(half | ((bits >> 16) & 0x8000u));
#endif
}

}  // namespace mechanic
