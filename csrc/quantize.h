// Block-wise quantization of the base's state to 8-bit codes, and of delta to 16 bits: the formulas
// of mechanic_fused/backends/quantize.py, which says what they are for, under the same names.
#pragma once

#include <cstdint>

#include "formulas.h"
#include "storage.h"

namespace mechanic {

// 2^32 over the golden ratio, by which the rounding of an element moves in a step.
constexpr uint32_t kTurn = 0x9e3779b9u;

// Of a number in units of codes, before it is rounded.
constexpr int kFractionBits = 12;

// A format of codes. kStride: 2^32 times an irrational number, by which the rounding moves from
// element to element. kBias: what the root adds to the shifted bits of a float, so that 1 stays 1.
template <class C, int kOrderBits, int kLargest, uint32_t kStep>
struct CodeFormat {
  using Code = C;
  static constexpr bool kSigned = C(-1) < C(0);
  static constexpr int kRoot = kOrderBits, kTop = kLargest;
  static constexpr int kNotANumber = -kTop - 1;  // where it has a sign
  static constexpr uint32_t kStride = kStep;
  static constexpr int32_t kBias = (127 << 23) - ((127 << 23) >> kRoot);
};

struct Signed : CodeFormat<int8_t, 2, 127, 0xbb67ae85u> {};     // momenta; the root of 3
struct Unsigned : CodeFormat<uint8_t, 3, 255, 0x6a09e667u> {};  // v; the root of 2
struct Linear : CodeFormat<int16_t, 0, 32767, 0xa54ff53au> {};  // delta; the root of 7

// The root of x >= 0, on a line between powers of 2.
template <class Codes>
MECHANIC_INLINE float compand(float x) {
  return bit_cast<float>((bit_cast<int32_t>(x) >> Codes::kRoot) + Codes::kBias);
}

// Its inverse, exactly; 0 below what 0 is companded to.
template <class Codes>
MECHANIC_INLINE float expand(float r) {
  const int32_t bits = bit_cast<int32_t>(r) - Codes::kBias;
  return bit_cast<float>(uint32_t(bits < 0 ? 0 : bits) << Codes::kRoot);
}

// 2^127: larger numbers count as this one, so that no code decodes to infinity.
constexpr int32_t kMost = 0x7f000000;

// The bits of |x| where it counts for the largest of its block, else 0: a signed x that is not
// finite, an unsigned one that is NaN or below 0. Bits of floats above 0 compare as the floats do.
template <class Codes>
MECHANIC_INLINE int32_t size_of(float x) {
  constexpr int32_t kInfinite = 0x7f800000;
  const int32_t bits = bit_cast<int32_t>(x) & (Codes::kSigned ? 0x7fffffff : -1);
  const int32_t limited = bits < kMost ? bits : kMost;
  // Of an unsigned x one below 0 has the largest bits.
  const bool counts = Codes::kSigned ? bits < kInfinite : uint32_t(bits) <= uint32_t(kInfinite);
  return counts ? limited : 0;
}

// Of a block: what a code counts, companded, and how many fractions of a code make 1.
struct BlockScale {
  float one, fractions;
};

template <class Codes>
MECHANIC_INLINE BlockScale block_scale(int32_t largest_size) {
  if constexpr (Codes::kRoot == 0) {
    // The largest power of 2 that is not above it, at least 2^-100: that and its inverse are exact.
    constexpr int32_t kLeastPower = (127 - 100) << 23;
    const int32_t power = largest_size & 0x7f800000;
    const float one = bit_cast<float>(power > kLeastPower ? power : kLeastPower) * 0x1p-14f;
    return {one, float(1 << kFractionBits) / one};
  }
  const float largest = compand<Codes>(bit_cast<float>(largest_size)), top = float(Codes::kTop);
  // The factor outweighs the rounding of dequantize and quantize: an unchanged x keeps its code.
  constexpr float kFractions = float((1 << kFractionBits) * (1 + 0x1p-21));
  return {largest / top, top / largest * kFractions};
}

// The code of x, with its size_of and BlockScale::fractions; rounding_bits round it. Where x is
// known to be finite the compiler need not ask.
template <class Codes, bool kFinite = false>
MECHANIC_INLINE int32_t quantize(float x, int32_t size, float fractions, uint32_t rounding_bits) {
  const int32_t count = int32_t(compand<Codes>(bit_cast<float>(size)) * fractions);
  int32_t q = (count + int32_t(rounding_bits >> (32 - kFractionBits))) >> kFractionBits;
  if constexpr (Codes::kRoot == 0) q = q < Codes::kTop ? q : Codes::kTop;
  if constexpr (Codes::kSigned) {
    q = size != 0 ? q : 0;
    q = x < 0 ? -q : q;
    const bool is_number = kFinite || (bit_cast<int32_t>(x) & 0x7fffffff) < 0x7f800000;
    return is_number ? q : Codes::kNotANumber;
  } else {
    q = q < 1 ? 1 : q;
    return size != 0 ? q : 0;
  }
}

// The number of a code, with BlockScale::one of its block.
template <class Codes>
MECHANIC_INLINE float dequantize(int32_t q, float one) {
  if constexpr (Codes::kSigned) {
    const int32_t size = bit_cast<int32_t>(expand<Codes>(float(q < 0 ? -q : q) * one));
    const int32_t not_a_number = q == Codes::kNotANumber ? 0x7fc00000 : 0;
    return bit_cast<float>(size | (q & INT32_MIN) | not_a_number);
  } else {
    return expand<Codes>(float(q) * one);
  }
}

// As kStride, of bfloat16 weights that are rounded by such bits: the root of 5.
constexpr uint32_t kWeightStride = 0x3c6ef372u;

// What decides how the elements of a chunk are rounded: the weight's part, and the index of the
// chunk's first element in the whole weight.
struct Rounding {
  uint32_t seed, first;
};

// step_count, the steps taken so far, may be null where nothing is rounded so.
MECHANIC_INLINE Rounding rounding_of(const double* step_count, int64_t number, int64_t first) {
  if (step_count == nullptr) return {0, 0};
  return {hash32(uint32_t(number)) + uint32_t(int64_t(*step_count)) * kTurn, uint32_t(first)};
}

// The bits by which an element of the chunk is rounded: a fraction of 1 in 32 bits.
MECHANIC_INLINE uint32_t rounding_bits(const Rounding& rounding, uint32_t element,
                                       uint32_t stride) {
  return rounding.seed + (rounding.first + element) * stride;
}

}  // namespace mechanic
