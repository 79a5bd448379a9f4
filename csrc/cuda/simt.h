// The interface of kernels to the machine: threads, warps, blocks, and the group of blocks that share a row.
//
// Kernels reach the hardware only through these names, so that csrc/tests/simt_on_host.h can run the very
// same code on a CPU, thread by thread, and the unit tests need no GPU.
//
// A group is a thread-block cluster where the target has them (sm_90 and later), one block elsewhere. The
// results never depend on its size: rows are cut into tiles of a fixed size, one warp reduces a tile, and
// tiles are merged in order.
#pragma once

#include <cstdint>

namespace tq {
namespace simt {

constexpr int kWarp = 32;

}  // namespace simt
}  // namespace tq

#if !defined(__CUDACC__)
#include "tests/simt_on_host.h"
#else

#include <cooperative_groups.h>
#include <cuda_fp16.h>

#define TQ_DEVICE static __device__ __forceinline__
#define TQ_UNROLL _Pragma("unroll")

namespace tq {
namespace simt {

constexpr unsigned kAllLanes = 0xffffffffu;

TQ_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
TQ_DEVICE int num_threads() { return static_cast<int>(blockDim.x); }
TQ_DEVICE int lane() { return thread() % kWarp; }

template <typename T>
TQ_DEVICE T shuffle(T value, int from) {
  return __shfl_sync(kAllLanes, value, from);
}
template <typename T>
TQ_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
template <typename T>
TQ_DEVICE T shuffle_up(T value, int distance) {
  return __shfl_up_sync(kAllLanes, value, distance);
}
TQ_DEVICE uint32_t ballot(bool condition) { return __ballot_sync(kAllLanes, condition); }
TQ_DEVICE void sync_block() { __syncthreads(); }

// Adds to a counter in shared memory and returns the value before.
TQ_DEVICE int add_to_shared(int* counter, int amount) { return atomicAdd(counter, amount); }

TQ_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char tq_shared_memory[];
  return tq_shared_memory;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
TQ_DEVICE int group_size() { return static_cast<int>(cooperative_groups::this_cluster().num_blocks()); }
TQ_DEVICE int group_rank() { return static_cast<int>(cooperative_groups::this_cluster().block_rank()); }
TQ_DEVICE void sync_group() { cooperative_groups::this_cluster().sync(); }
// The same place in the shared memory of the group's first block.
template <typename T>
TQ_DEVICE T* of_leader(T* place) {
  return cooperative_groups::this_cluster().map_shared_rank(place, 0);
}
#else
TQ_DEVICE int group_size() { return 1; }
TQ_DEVICE int group_rank() { return 0; }
TQ_DEVICE void sync_group() { __syncthreads(); }
template <typename T>
TQ_DEVICE T* of_leader(T* place) {
  return place;
}
#endif

// The index of this group in the grid, and of its row.
TQ_DEVICE int64_t group_idx() { return static_cast<int64_t>(blockIdx.x) / group_size(); }

// exp within a few units in the last place for arguments near 0; 0 for -inf.
TQ_DEVICE float exp_fast(float x) { return __expf(x); }
TQ_DEVICE float float_from_half_bits(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
TQ_DEVICE float float_from_bits(uint32_t bits) { return __uint_as_float(bits); }
TQ_DEVICE int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }
TQ_DEVICE int highest_bit(uint32_t bits) { return 31 - __clz(static_cast<int>(bits)); }

struct alignas(16) Quad {
  uint32_t words[4];
};
TQ_DEVICE Quad load_quad(const void* place) {
  const uint4 loaded = __ldg(static_cast<const uint4*>(place));
  return {{loaded.x, loaded.y, loaded.z, loaded.w}};
}

}  // namespace simt
}  // namespace tq

#endif

namespace tq {
namespace simt {

// Sums and maxima over a warp: pairs in a fixed order, the same result on every lane and in every run.
template <typename T>
TQ_DEVICE T warp_sum(T value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

template <typename T>
TQ_DEVICE T warp_max(T value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const T other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// The sum over this lane and those before it.
template <typename T>
TQ_DEVICE T running_sum(T value) {
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const T before = shuffle_up(value, distance);
    if (lane() >= distance) value += before;
  }
  return value;
}

// Warps of the whole group, and the place of this one among them.
TQ_DEVICE int warps_of_group() { return group_size() * (num_threads() / kWarp); }
TQ_DEVICE int warp_of_group() { return group_rank() * (num_threads() / kWarp) + thread() / kWarp; }

}  // namespace simt
}  // namespace tq
