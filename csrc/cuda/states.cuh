// The base's own state and Δ of a chunk in registers, however they are stored.
#pragma once

#include <type_traits>

#include "../quantize.h"
#include "packets.cuh"

namespace mechanic::cuda {

// Elements that a thread takes at once where not all arrays are aligned: of codes as many as
// elsewhere, so that the threads of a block of codes are always neighbours.
template <class X, class S>
constexpr int kSingles = std::is_same_v<S, Code> ? kLanes<X> : 1;

// Codes: the format where it is 8 bits; v, which is Unsigned, is rounded by random bits in bfloat16
// too.
template <class T, class S, class Codes>
struct State {
  static constexpr bool kHasCodes = std::is_same_v<S, Code>;
  static constexpr bool kRounds = kHasCodes || (std::is_same_v<S, BFloat16> && !Codes::kSigned);
  using Stored = std::conditional_t<kHasCodes, typename Codes::Code, S>;

  Stored* at;
  float* scales;  // of codes, one for each 2^log_block elements

  template <int N, bool kPackets, Reuse kReuse = Reuse::kNever>
  __device__ __forceinline__ void load(int i, int log_block, T (&to)[N]) const {
    if constexpr (kHasCodes) {
      Stored codes[N];
      load_each<kReuse, N, kPackets>(at + i, [&](int l, Stored q) { codes[l] = q; });
      const float one = scales[i >> log_block];
#pragma unroll
      for (int l = 0; l < N; ++l) to[l] = dequantize<Codes>(codes[l], one);
    } else {
      cuda::load<kReuse, N, kPackets>(at + i, to);
    }
  }

  template <int N, bool kPackets, Reuse kReuse = Reuse::kNever>
  __device__ __forceinline__ void store(int i, int log_block, const Rounding& rounding,
                                        const T (&from)[N]) const {
    if constexpr (kHasCodes) {
      int32_t largest = 0;
#pragma unroll
      for (int l = 0; l < N; ++l) largest = max(largest, size_of<Codes>(from[l]));
      const int lane = int(threadIdx.x) & 31, lanes = (1 << log_block) / N;
      const unsigned group = (0xffffffffu >> (32 - lanes)) << (lane & ~(lanes - 1));
      const BlockScale scale = block_scale<Codes>(largest_of(largest, lanes, group));
      if ((lane & (lanes - 1)) == 0) scales[i >> log_block] = scale.one;
      store_each<kReuse, N, kPackets>(at + i, [&](int l) {
        const uint32_t bits = rounding_bits(rounding, uint32_t(i + l), Codes::kStride);
        const int32_t size = size_of<Codes>(from[l]);
        return Stored(quantize<Codes>(from[l], size, scale.fractions, bits));
      });
    } else if constexpr (kRounds) {
      store_each<kReuse, N, kPackets>(at + i, [&](int l) {
        return stochastic_round(rounding_bits(rounding, uint32_t(i + l), Codes::kStride) >> 16,
                                from[l]);
      });
    } else {
      cuda::store<kReuse, N, kPackets>(from, at + i);
    }
  }

 private:
  // The largest of the sizes that the threads of a group have; all of them must call.
  static __device__ __forceinline__ int32_t largest_of(int32_t size, int lanes, unsigned group) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    return __reduce_max_sync(group, size);
#else
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      size = max(size, __shfl_xor_sync(group, size, offset));
    }
    return size;
#endif
  }
};

// Whether the states of a base are rounded by random bits, which takes registers.
template <class Base, class S>
constexpr bool kRounds = Base::kStates > 0 && (std::is_same_v<S, Code> ||
                                               (std::is_same_v<S, BFloat16> && Base::kStates > 1));

// The states of a base: kStates of them.
template <class T, class S>
struct States {
  static constexpr bool kHasCodes = std::is_same_v<S, Code>;

  State<T, S, Signed> first;
  State<T, S, Unsigned> second;
  int log_block;

  template <class Base, int N, bool kPackets>
  __device__ __forceinline__ void load(int i, T (&a)[N], T (&b)[N]) const {
    if constexpr (Base::kStates > 0) first.template load<N, kPackets>(i, log_block, a);
    if constexpr (Base::kStates > 1) second.template load<N, kPackets>(i, log_block, b);
  }

  template <class Base, int N, bool kPackets>
  __device__ __forceinline__ void store(int i, const Rounding& rounding, const T (&a)[N],
                                        const T (&b)[N]) const {
    if constexpr (Base::kStates > 0) first.template store<N, kPackets>(i, log_block, rounding, a);
    if constexpr (Base::kStates > 1) second.template store<N, kPackets>(i, log_block, rounding, b);
  }
};

// The states of a chunk.
template <class Base, class T, class S>
__device__ __forceinline__ States<T, S> states_of(const Bucket& bucket, const Tensor& tensor,
                                                  const Chunk& chunk) {
  States<T, S> states = {};
  using First = State<T, S, Signed>;
  using Second = State<T, S, Unsigned>;
  if constexpr (Base::kStates > 0) {
    states.first.at = address<typename First::Stored>(tensor.state0, chunk.offset);
  }
  if constexpr (Base::kStates > 1) {
    states.second.at = address<typename Second::Stored>(tensor.state1, chunk.offset);
  }
  if constexpr (States<T, S>::kHasCodes && Base::kStates > 0) {
    states.log_block = 31 - __clz(int(bucket.counts.state_block));
    const int64_t first = chunk.offset >> states.log_block;
    states.first.scales = address<float>(tensor.scales0, first);
    if constexpr (Base::kStates > 1) states.second.scales = address<float>(tensor.scales1, first);
  }
  return states;
}

// What decides how a chunk is rounded: in shared memory, and read where it is needed.
struct ChunkRounding : Rounding {
  bool of_weights;  // whether a BFloat16 x is rounded stochastically too, having no low bits
};

__device__ __forceinline__ ChunkRounding chunk_rounding(const Tensor& tensor, const Chunk& chunk,
                                                        const double* step_count) {
  return {rounding_of(step_count, tensor.number, tensor.element + chunk.offset), tensor.x_low == 0};
}

// Δ of a chunk, T or bfloat16: a branch that all threads take alike. Both pointers have the same
// address, since the compiler would not know that a pointer which may be null is to global memory.
template <class T>
struct WideDelta {
  T* full;
  BFloat16* bfloat16;
  bool narrow;
  uint32_t seed;  // of the first element's random bits

  __device__ __forceinline__ const T* begin() const { return full; }

  template <Reuse kReuse, int N, bool kPackets = (N > 1)>
  __device__ __forceinline__ void load(int i, T (&to)[N]) const {
    if constexpr (std::is_same_v<T, float>) {
      if (narrow) return cuda::load<kReuse, N, kPackets>(bfloat16 + i, to);
    }
    cuda::load<kReuse, N, kPackets>(full + i, to);
  }

  template <Reuse kReuse, int N, bool kPackets = (N > 1)>
  __device__ __forceinline__ void store(int i, const Rounding&, const T (&from)[N]) const {
    if constexpr (std::is_same_v<T, float>) {
      if (narrow) {
        return store_each<kReuse, N, kPackets>(bfloat16 + i, [&](int l) {
          return stochastic_round(random_bits16(seed, uint32_t(i + l)), from[l]);
        });
      }
    }
    cuda::store<kReuse, N, kPackets>(from, full + i);
  }
};

// Δ of a chunk in codes.
template <class T>
struct CodedDelta {
  State<T, Code, Linear> codes;
  int log_block;

  __device__ __forceinline__ const int16_t* begin() const { return codes.at; }

  template <Reuse kReuse, int N, bool kPackets = (N > 1)>
  __device__ __forceinline__ void load(int i, T (&to)[N]) const {
    codes.template load<N, kPackets, kReuse>(i, log_block, to);
  }

  template <Reuse kReuse, int N, bool kPackets = (N > 1)>
  __device__ __forceinline__ void store(int i, const Rounding& rounding, const T (&from)[N]) const {
    codes.template store<N, kPackets, kReuse>(i, log_block, rounding, from);
  }
};

// Δ beside a state in S: codes beside codes.
template <class T, class S>
using Delta = std::conditional_t<std::is_same_v<S, Code>, CodedDelta<T>, WideDelta<T>>;

// step_count is needed where Δ is written in bfloat16.
template <class T, class S>
__device__ __forceinline__ Delta<T, S> delta_of(const Bucket& bucket, const Tensor& tensor,
                                                const Chunk& chunk, const double* step_count) {
  if constexpr (std::is_same_v<S, Code>) {
    const int log_block = 31 - __clz(int(bucket.counts.state_block));
    return {{address<int16_t>(tensor.delta, chunk.offset),
             address<float>(tensor.delta_scales, chunk.offset >> log_block)},
            log_block};
  } else {
    return {address<T>(tensor.delta, chunk.offset), address<BFloat16>(tensor.delta, chunk.offset),
            bucket.dtypes.delta == DType::kBFloat16,
            rounding_seed(step_count, tensor.number) + uint32_t(tensor.element + chunk.offset)};
  }
}

}  // namespace mechanic::cuda
