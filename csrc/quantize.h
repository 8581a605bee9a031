// 8-bit codes of the base's state, by blocks that share a scale: the formulas of
// mechanic_fused/backends/quantize.py, which says what they are for, under the same names.
#pragma once

#include <cstdint>

#include "formulas.h"
#include "storage.h"

namespace mechanic {

// Larger numbers count as this one, so that no code decodes to infinity.
constexpr float kLargest = 0x1p127f;

// 2^32 over the golden ratio, by which the rounding of an element moves in a step.
constexpr uint32_t kTurn = 0x9e3779b9u;

// A format: codes of momenta, int8, and of v, uint8. kBias: what the root adds to the shifted bits
// of a float, so that 1 stays 1.
struct Signed {
  using Code = int8_t;
  static constexpr int kRoot = 2, kTop = 127;
  static constexpr int32_t kBias = (127 << 23) - ((127 << 23) >> kRoot);
};

struct Unsigned {
  using Code = uint8_t;
  static constexpr int kRoot = 3, kTop = 255;
  static constexpr int32_t kBias = (127 << 23) - ((127 << 23) >> kRoot);
};

// The root of x >= 0, on a line between powers of 2.
template <class Codes>
MECHANIC_INLINE float compand(float x) {
  return bit_cast<float>((bit_cast<int32_t>(x) >> Codes::kRoot) + Codes::kBias);
}

// Its inverse, exactly; 0 below what 0 is companded to.
template <class Codes>
MECHANIC_INLINE float expand(float r) {
  const int32_t bits = bit_cast<int32_t>(r) - Codes::kBias;
  return bit_cast<float>((bits < 0 ? 0 : bits) << Codes::kRoot);
}

// |x| where it counts for the largest of its block, else 0: a signed x that is not finite, an
// unsigned one that is NaN or below 0.
template <class Codes>
MECHANIC_INLINE float size_of(float x) {
  const float size = std::fabs(x);
  const float limited = size < kLargest ? size : kLargest;
  const bool counts = Codes::kTop == 127 ? x - x == 0 : x > 0;
  return counts ? limited : 0;
}

// What codes of a block count, companded: `one` a code, and how many codes make 1.
struct BlockScale {
  float one, codes;
};

template <class Codes>
MECHANIC_INLINE BlockScale block_scale(float largest_size) {
  const float largest = compand<Codes>(largest_size);
  return {largest / float(Codes::kTop), float(Codes::kTop) / largest};
}

// The code of x, with its size_of and BlockScale::codes; uniform rounds, in (0, 1).
template <class Codes>
MECHANIC_INLINE typename Codes::Code quantize(float x, float size, float codes, float uniform) {
  const float y = compand<Codes>(size) * codes + uniform;
  int32_t q = int32_t(y);
  q = q > Codes::kTop ? Codes::kTop : q;
  if constexpr (Codes::kTop == 127) {
    q = size > 0 ? q : 0;
    q = x < 0 ? -q : q;
    q = x - x == 0 ? q : -128;
  } else {
    q = q < 1 ? 1 : q;
    q = size > 0 ? q : 0;
  }
  return typename Codes::Code(q);
}

// The number of a code, with BlockScale::one of its block.
template <class Codes>
MECHANIC_INLINE float dequantize(typename Codes::Code code, float one) {
  const int32_t q = code;
  if constexpr (Codes::kTop == 127) {
    const float size = expand<Codes>(float(q < 0 ? -q : q) * one);
    const float x = q < 0 ? -size : size;
    return q == -128 ? bit_cast<float>(uint32_t(0x7fc00000)) : x;
  } else {
    return expand<Codes>(float(q) * one);
  }
}

// What decides how the elements of a chunk are rounded.
struct Rounding {
  uint32_t seed;  // of the first element
  uint32_t turn;  // the steps taken so far, times kTurn
};

// step_count may be null where nothing is rounded so. `first`: the index of the chunk's first
// element in the whole weight.
MECHANIC_INLINE Rounding rounding_of(const double* step_count, int64_t number, int64_t first) {
  if (step_count == nullptr) return {0, 0};
  return {hash32(uint32_t(number)) + uint32_t(first), uint32_t(int64_t(*step_count)) * kTurn};
}

// 16 bits for an element's state of a format.
template <class Codes>
MECHANIC_INLINE uint32_t random_bits(const Rounding& rounding, uint32_t element) {
  const uint32_t bits = hash32(rounding.seed + element);
  return ((Codes::kTop == 127 ? bits << 16 : bits) + rounding.turn) >> 16;
}

// The middle of one of 4,096 parts of (0, 1). Its distance from 0 and 1 is more than what a code
// and back are off by, so that codes which are not changed stay.
MECHANIC_INLINE float uniform(uint32_t bits) {
  return (float(int32_t(bits >> 4)) + 0.5f) * 0x1p-12f;
}

}  // namespace mechanic
