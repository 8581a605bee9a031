// The base's own state and delta of a chunk as numbers of the arithmetic, however they are stored:
// in place, or a block at a time in scratch memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../quantize.h"
#include "../storage.h"

namespace mechanic::cpu {

// Elements of a loop over codes: the smallest block.
constexpr int kCodes = 32;

// Codes: the format where it is 8 bits; v, which is Unsigned, is rounded by random bits in bfloat16
// too.
template <class T, class S, class Codes>
struct State {
  static constexpr bool kInPlace = std::is_same_v<S, T>;
  static constexpr bool kHasCodes = std::is_same_v<S, Code>;
  using Stored = std::conditional_t<kHasCodes, typename Codes::Code, S>;

  Stored* at;
  float* scales;  // of codes, one for each 2^log_block elements
  int log_block;
  Rounding rounding;

  // Return n elements from `start` on.
  MECHANIC_INLINE T* read(int64_t start, int n, T* __restrict scratch) const {
    if constexpr (kInPlace) {
      return at + start;
    } else if constexpr (kHasCodes) {
      const Stored* __restrict codes = at + start;
      for (int first = 0; first < n; first += kCodes) {
        const float one = scales[(start + first) >> log_block];
#pragma omp simd
        for (int l = 0; l < kCodes; ++l) {
          scratch[first + l] = dequantize<Codes>(codes[first + l], one);
        }
      }
      return scratch;
    } else {
      for (int i = 0; i < n; ++i) scratch[i] = widen(at[start + i]);
      return scratch;
    }
  }

  // Write the same elements back from scratch.
  MECHANIC_INLINE void write(int64_t start, int n, const T* __restrict scratch) const {
    if constexpr (kHasCodes) {
      for (int first = 0; first < n; first += 1 << log_block) {
        write_codes(start + first, scratch + first);
      }
    } else if constexpr (std::is_same_v<S, BFloat16> && !Codes::kSigned) {
      for (int i = 0; i < n; ++i) {
        const uint32_t bits = rounding_bits(rounding, uint32_t(start + i), Codes::kStride);
        at[start + i] = stochastic_round(bits >> 16, scratch[i]);
      }
    } else if constexpr (!kInPlace) {
      for (int i = 0; i < n; ++i) narrow(scratch[i], at[start + i]);
    }
  }

 private:
  // Write a block that shares a scale.
  MECHANIC_INLINE void write_codes(int64_t start, const T* __restrict x) const {
    const int n = 1 << log_block;
    uint32_t largest = 0;
    for (int first = 0; first < n; first += kCodes) {
#pragma omp simd reduction(max : largest)
      for (int l = 0; l < kCodes; ++l) {
        const uint32_t bits = magnitude(x[first + l]);
        largest = bits > largest ? bits : largest;
      }
    }
    // Nearly always: then nothing has to be asked of each element.
    if (largest < uint32_t(kMost)) {
      write_block(
          start, x, int32_t(largest), [](float y) { return int32_t(magnitude(y)); },
          std::true_type());
      return;
    }
    int32_t counted = 0;
    for (int i = 0; i < n; ++i) counted = std::max(counted, size_of<Codes>(x[i]));
    write_block(start, x, counted, size_of<Codes>, std::false_type());
  }

  // The bits of |x|, of which an unsigned x below 0 has the largest.
  static MECHANIC_INLINE uint32_t magnitude(float x) {
    return bit_cast<uint32_t>(x) & (Codes::kSigned ? 0x7fffffffu : 0xffffffffu);
  }

  // By way of integers of 32 bits, since loops over codes take vectors of half the width.
  template <class Size, class Finite>
  MECHANIC_INLINE void write_block(int64_t start, const T* __restrict x, int32_t largest, Size size,
                                   Finite) const {
    const BlockScale scale = block_scale<Codes>(largest);
    scales[start >> log_block] = scale.one;
    const int n = 1 << log_block;
    alignas(64) int32_t counts[64];
    for (int first = 0; first < n; first += kCodes) {
      const uint32_t base = rounding_bits(rounding, uint32_t(start + first), Codes::kStride);
#pragma omp simd
      for (int l = 0; l < kCodes; ++l) {
        const float y = x[first + l];
        const uint32_t bits = base + uint32_t(l) * Codes::kStride;
        counts[first + l] = quantize<Codes, Finite::value>(y, size(y), scale.fractions, bits);
      }
    }
    Stored* __restrict codes = at + start;
    for (int first = 0; first < n; first += kCodes) {
#pragma omp simd
      for (int l = 0; l < kCodes; ++l) codes[first + l] = Stored(counts[first + l]);
    }
  }
};

// delta: T or bfloat16, whose other pointer is null.
template <class T>
struct WideDelta {
  T* full;
  BFloat16* bfloat16;
  uint32_t seed;  // of the first element's random bits

  // Return n elements from `start` on: in memory, or widened in scratch.
  MECHANIC_INLINE T* read(int64_t start, int n, T* scratch) const {
    if (!bfloat16) return full + start;
    for (int i = 0; i < n; ++i) scratch[i] = T(widen(bfloat16[start + i]));
    return scratch;
  }

  // Write the same elements back from scratch, rounded.
  MECHANIC_INLINE void write(int64_t start, int n, const T* scratch) const {
    if (!bfloat16) return;
    const uint32_t first = seed + uint32_t(start);
    for (int i = 0; i < n; ++i) {
      bfloat16[start + i] = stochastic_round(random_bits16(first, uint32_t(i)), float(scratch[i]));
    }
  }
};

// delta beside a state in S: codes beside codes.
template <class T, class S>
using Delta = std::conditional_t<std::is_same_v<S, Code>, State<T, Code, Linear>, WideDelta<T>>;

// Both states of a base with kStates of them.
template <class T, class S>
struct States {
  State<T, S, Signed> first;
  State<T, S, Unsigned> second;
};

}  // namespace mechanic::cpu
