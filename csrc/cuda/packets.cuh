// From memory to registers and back: N elements a thread in accesses of 16 bytes, or one by one.
#pragma once

#include "../storage.h"

namespace mechanic::cuda {

// Elements that a thread takes at once: 16 bytes of the weight's own dtype.
template <class X>
constexpr int kLanes = 16 / sizeof(X);

template <class Y>
struct alignas(16) Packet {
  Y lane[16 / sizeof(Y)];
};

// What is not touched again in this step makes way for what is: evict-first in the second-level
// cache, where the end of Δ then waits for apply, which begins at that end.
enum class Reuse { kSoon, kNever };

template <Reuse kReuse>
__device__ __forceinline__ uint4 fetch(const uint4* from) {
  return kReuse == Reuse::kNever ? __ldcs(from) : *from;
}

template <Reuse kReuse>
__device__ __forceinline__ void put(uint4* to, uint4 packet) {
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
    constexpr int kEach = 16 / sizeof(Y);
#pragma unroll
    for (int i = 0; i < N; i += kEach) {
      const uint4 bits = fetch<kReuse>(reinterpret_cast<const uint4*>(from + i));
      const auto packet = bit_cast<Packet<Y>>(bits);
#pragma unroll
      for (int l = 0; l < kEach; ++l) to[i + l] = widen(packet.lane[l]);
    }
  }
}

template <Reuse kReuse, int N, class Y>
__device__ __forceinline__ void store(const Wide<Y> (&from)[N], Y* to) {
  if constexpr (N == 1) {
    narrow(from[0], *to);
  } else {
    constexpr int kEach = 16 / sizeof(Y);
#pragma unroll
    for (int i = 0; i < N; i += kEach) {
      Packet<Y> packet;
#pragma unroll
      for (int l = 0; l < kEach; ++l) narrow(from[i + l], packet.lane[l]);
      put<kReuse>(reinterpret_cast<uint4*>(to + i), bit_cast<uint4>(packet));
    }
  }
}

// Return where a stream of the chunk begins; base is not 0.
template <class T>
__device__ __forceinline__ T* address(int64_t base, int64_t offset) {
  T* const from = reinterpret_cast<T*>(base) + offset;
  // An address out of a table could lie anywhere, and generic accesses are slower.
  __builtin_assume(__isGlobal(from));
  return from;
}

// Return how many of n elements can be taken kLanes at a time: none in a misaligned shard.
template <class X, class... Y>
__device__ __forceinline__ int packed(int n, const Y*... streams) {
  const bool aligned = ((reinterpret_cast<uintptr_t>(streams) | ...) & 15) == 0;
  return aligned ? n - n % kLanes<X> : 0;
}

}  // namespace mechanic::cuda
