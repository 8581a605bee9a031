// From memory to registers and back: N elements a thread in accesses of 16 bytes, or one by one.
#pragma once

#include <type_traits>

#include "../storage.h"

namespace mechanic::cuda {

// Elements that a thread takes at once: 16 bytes of the weight's own dtype.
template <class X>
constexpr int kLanes = 16 / sizeof(X);

// Bytes of an access for N elements: 16, or 8 where there are no more.
template <int N, class Y>
constexpr int kBytes = N * sizeof(Y) < 16 ? N * sizeof(Y) : 16;

template <int N, class Y>
struct alignas(kBytes<N, Y>) Packet {
  Y lane[kBytes<N, Y> / sizeof(Y)];
};

template <int N, class Y>
using Bits = std::conditional_t<kBytes<N, Y> == 16, uint4, uint2>;

// What is not touched again in this step makes way for what is: evict-first in the second-level
// cache, where the end of Δ then waits for apply, which begins at that end.
enum class Reuse { kSoon, kNever };

template <Reuse kReuse, class B>
__device__ __forceinline__ B fetch(const B* from) {
  return kReuse == Reuse::kNever ? __ldcs(from) : *from;
}

template <Reuse kReuse, class B>
__device__ __forceinline__ void put(B* to, B packet) {
  if constexpr (kReuse == Reuse::kNever) {
    __stcs(to, packet);
  } else {
    *to = packet;
  }
}

template <Reuse kReuse, int N, class Y>
__device__ __forceinline__ void load(const Y* from, Wide<Y> (&to)[N]) {
  if constexpr (N == 1) {
    to[0] = widen(*from);
  } else {
    constexpr int kEach = kBytes<N, Y> / sizeof(Y);
#pragma unroll
    for (int i = 0; i < N; i += kEach) {
      const auto bits = fetch<kReuse>(reinterpret_cast<const Bits<N, Y>*>(from + i));
      const auto packet = bit_cast<Packet<N, Y>>(bits);
#pragma unroll
      for (int l = 0; l < kEach; ++l) to[i + l] = widen(packet.lane[l]);
    }
  }
}

// Store what round(l) gives for each of the N elements.
template <Reuse kReuse, int N, class Y, class Round>
__device__ __forceinline__ void store_each(Y* to, Round round) {
  if constexpr (N == 1) {
    *to = round(0);
  } else {
    constexpr int kEach = kBytes<N, Y> / sizeof(Y);
#pragma unroll
    for (int i = 0; i < N; i += kEach) {
      Packet<N, Y> packet;
#pragma unroll
      for (int l = 0; l < kEach; ++l) packet.lane[l] = round(i + l);
      put<kReuse>(reinterpret_cast<Bits<N, Y>*>(to + i), bit_cast<Bits<N, Y>>(packet));
    }
  }
}

template <Reuse kReuse, int N, class Y>
__device__ __forceinline__ void store(const Wide<Y> (&from)[N], Y* to) {
  store_each<kReuse, N>(to, [&](int l) {
    Y rounded;
    narrow(from[l], rounded);
    return rounded;
  });
}

// Δ of a chunk, read as what it is by a branch that all threads take alike. Two pointers to one
// place, since of one that may be null the compiler would not know that it is to global memory.
template <class T>
struct Delta {
  T* wide;
  BFloat16* narrow;
  bool is_narrow;
  uint32_t seed;  // of the first element's random bits

  template <Reuse kReuse, int N>
  __device__ __forceinline__ void load(int i, T (&to)[N]) const {
    if constexpr (std::is_same_v<T, float>) {
      if (is_narrow) return cuda::load<kReuse>(narrow + i, to);
    }
    cuda::load<kReuse>(wide + i, to);
  }

  template <Reuse kReuse, int N>
  __device__ __forceinline__ void store(int i, const T (&from)[N]) const {
    if constexpr (std::is_same_v<T, float>) {
      if (is_narrow) {
        return store_each<kReuse, N>(
            narrow + i, [&](int l) { return stochastic_round(random_bits16(seed, uint32_t(i + l)), from[l]); });
      }
    }
    cuda::store<kReuse>(from, wide + i);
  }
};

// Return where a stream of the chunk begins; base is not 0.
template <class T>
__device__ __forceinline__ T* address(int64_t base, int64_t offset) {
  T* const from = reinterpret_cast<T*>(base) + offset;
  // An address out of a table could lie anywhere, and generic accesses are slower.
  __builtin_assume(__isGlobal(from));
  return from;
}

// steps are needed where a narrow Δ is to be written.
template <class T>
__device__ __forceinline__ Delta<T> delta_of(const Bucket& bucket, const Tensor& tensor,
                                             const Chunk& chunk, const double* steps) {
  return {address<T>(tensor.delta, chunk.offset), address<BFloat16>(tensor.delta, chunk.offset),
          bucket.delta == DType::kBFloat16, seed(steps, tensor.number) + uint32_t(chunk.offset)};
}

// Return how many of n elements can be taken kLanes at a time: none in a misaligned shard.
template <class X, class... Y>
__device__ __forceinline__ int packed(int n, const Y*... streams) {
  const bool aligned = ((reinterpret_cast<uintptr_t>(streams) | ...) & 15) == 0;
  return aligned ? n - n % kLanes<X> : 0;
}

}  // namespace mechanic::cuda
