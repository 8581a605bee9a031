// Loads and stores of N elements a thread, in packets of 16 bytes or one by one.
#pragma once

#include <type_traits>

#include "../formulas.h"
#include "../storage.h"

namespace mechanic::cuda {

// Elements that a thread takes at once: 16 bytes in the weight's dtype.
template <class X>
constexpr int kLanes = 16 / sizeof(X);

// Bytes of an access for N elements: 16, or 8 if they have no more.
template <int N, class Y>
constexpr int kBytes = N * sizeof(Y) < 16 ? N * sizeof(Y) : 16;

template <int N, class Y>
struct alignas(kBytes<N, Y>) Packet {
  Y lane[kBytes<N, Y> / sizeof(Y)];
};

template <int N, class Y>
using Bits = std::conditional_t<kBytes<N, Y> == 16, uint4,
                                std::conditional_t<kBytes<N, Y> == 8, uint2, unsigned>>;

// Data that this step does not touch again is marked evict-first in the second-level cache, so that
// the end of Δ stays there for apply, which begins at that end.
enum class Reuse { kSoon, kNever };

template <Reuse kReuse, class B>
__device__ __forceinline__ B load_packet(const B* from) {
  return kReuse == Reuse::kNever ? __ldcs(from) : *from;
}

template <Reuse kReuse, class B>
__device__ __forceinline__ void store_packet(B* to, B packet) {
  if constexpr (kReuse == Reuse::kNever) {
    __stcs(to, packet);
  } else {
    *to = packet;
  }
}

// Call take(l, y) for each of the N elements l, which is y; in packets, or one by one.
template <Reuse kReuse, int N, bool kPackets = (N > 1), class Y, class Take>
__device__ __forceinline__ void load_each(const Y* from, Take take) {
  if constexpr (!kPackets) {
#pragma unroll
    for (int l = 0; l < N; ++l) take(l, from[l]);
  } else {
    constexpr int kEach = kBytes<N, Y> / sizeof(Y);
#pragma unroll
    for (int i = 0; i < N; i += kEach) {
      const auto bits = load_packet<kReuse>(reinterpret_cast<const Bits<N, Y>*>(from + i));
      const auto packet = bit_cast<Packet<N, Y>>(bits);
#pragma unroll
      for (int l = 0; l < kEach; ++l) take(i + l, packet.lane[l]);
    }
  }
}

template <Reuse kReuse, int N, bool kPackets = (N > 1), class Y>
__device__ __forceinline__ void load(const Y* from, opmath_t<Y> (&to)[N]) {
  load_each<kReuse, N, kPackets>(from, [&](int l, Y y) { to[l] = widen(y); });
}

// Store round(l) for each of the N elements l.
template <Reuse kReuse, int N, bool kPackets = (N > 1), class Y, class Round>
__device__ __forceinline__ void store_each(Y* to, Round round) {
  if constexpr (!kPackets) {
#pragma unroll
    for (int l = 0; l < N; ++l) to[l] = round(l);
  } else {
    constexpr int kEach = kBytes<N, Y> / sizeof(Y);
#pragma unroll
    for (int i = 0; i < N; i += kEach) {
      Packet<N, Y> packet;
#pragma unroll
      for (int l = 0; l < kEach; ++l) packet.lane[l] = round(i + l);
      store_packet<kReuse>(reinterpret_cast<Bits<N, Y>*>(to + i), bit_cast<Bits<N, Y>>(packet));
    }
  }
}

template <Reuse kReuse, int N, bool kPackets = (N > 1), class Y>
__device__ __forceinline__ void store(const opmath_t<Y> (&from)[N], Y* to) {
  store_each<kReuse, N, kPackets>(to, [&](int l) {
    Y rounded;
    narrow(from[l], rounded);
    return rounded;
  });
}

// Return where a chunk begins in the array at an address, which is not 0.
template <class T>
__device__ __forceinline__ T* address(int64_t base, int64_t offset) {
  T* const from = reinterpret_cast<T*>(base) + offset;
  // The compiler cannot know which memory an address from a table is in; generic accesses are
  // slower.
  __builtin_assume(__isGlobal(from));
  return from;
}

// Return how many of n elements can be taken kLanes at a time: none where a stream is misaligned.
template <class X, class... Y>
__device__ __forceinline__ int packet_elements(int n, const Y*... streams) {
  const bool aligned = ((reinterpret_cast<uintptr_t>(streams) | ...) & 15) == 0;
  return aligned ? n - n % kLanes<X> : 0;
}

}  // namespace mechanic::cuda
