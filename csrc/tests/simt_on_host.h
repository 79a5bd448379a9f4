// The primitives of cuda/simt.h on a CPU: every thread of a group of blocks is a fiber, and a fiber
// that waits at a barrier or a shuffle lets the others run. For unit tests; one group at a time.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define TQ_DEVICE static inline
#define TQ_UNROLL

namespace tq {
namespace simt {

struct Barrier {
  int size = 0;
  int arrived = 0;
  int round = 0;
};

struct HostBlock {
  std::unique_ptr<double[]> shared;  // doubles: aligned for every type
  Barrier barrier;
};

struct HostWarp {
  Barrier barrier;
  uint64_t slots[kWarp];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int block;
  int thread;
  bool is_done = false;
};

// One group of blocks that runs, and the fiber whose turn it is.
struct HostGroup {
  std::vector<HostBlock> blocks;
  std::vector<HostWarp> warps;
  std::vector<Fiber> fibers;
  Barrier barrier;
  ucontext_t scheduler;
  size_t current = 0;
  int threads = 0;
  int64_t idx = 0;
  std::function<void()> body;
};

inline HostGroup*& running_group() {
  static HostGroup* group = nullptr;
  return group;
}

TQ_DEVICE HostGroup& host() { return *running_group(); }
TQ_DEVICE Fiber& fiber() { return host().fibers[host().current]; }
TQ_DEVICE void let_others_run() { swapcontext(&fiber().context, &host().scheduler); }

TQ_DEVICE void wait_at(Barrier& barrier) {
  const int round = barrier.round;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.round;
    return;
  }
  while (barrier.round == round) let_others_run();
}

TQ_DEVICE int thread() { return fiber().thread; }
TQ_DEVICE int num_threads() { return host().threads; }
TQ_DEVICE int lane() { return thread() % kWarp; }
TQ_DEVICE int group_size() { return static_cast<int>(host().blocks.size()); }
TQ_DEVICE int group_rank() { return fiber().block; }
TQ_DEVICE int64_t group_idx() { return host().idx; }
TQ_DEVICE void sync_block() { wait_at(host().blocks[fiber().block].barrier); }
TQ_DEVICE void sync_group() { wait_at(host().barrier); }

TQ_DEVICE HostWarp& own_warp() {
  return host().warps[fiber().block * (host().threads / kWarp) + fiber().thread / kWarp];
}

template <typename T>
TQ_DEVICE T shuffle(T value, int from) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves 8 bytes at most");
  HostWarp& warp = own_warp();
  memcpy(&warp.slots[lane()], &value, sizeof value);
  wait_at(warp.barrier);
  memcpy(&value, &warp.slots[from], sizeof value);
  wait_at(warp.barrier);
  return value;
}
template <typename T>
TQ_DEVICE T shuffle_xor(T value, int mask) {
  return shuffle(value, lane() ^ mask);
}
template <typename T>
TQ_DEVICE T shuffle_up(T value, int distance) {
  return shuffle(value, lane() >= distance ? lane() - distance : lane());
}
TQ_DEVICE uint32_t ballot(bool condition) {
  HostWarp& warp = own_warp();
  warp.slots[lane()] = condition;
  wait_at(warp.barrier);
  uint32_t bits = 0;
  for (int i = 0; i < kWarp; ++i) bits |= static_cast<uint32_t>(warp.slots[i] != 0) << i;
  wait_at(warp.barrier);
  return bits;
}

TQ_DEVICE int add_to_shared(int* counter, int amount) {
  const int before = *counter;
  *counter += amount;
  return before;
}
TQ_DEVICE unsigned char* shared_memory() {
  return reinterpret_cast<unsigned char*>(host().blocks[fiber().block].shared.get());
}
template <typename T>
TQ_DEVICE T* of_leader(T* place) {
  const auto offset = reinterpret_cast<unsigned char*>(place) - shared_memory();
  return reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(host().blocks[0].shared.get()) + offset);
}

TQ_DEVICE float exp_fast(float x) { return std::exp(x); }
TQ_DEVICE float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
// Converts the numbers that tests store, which are not subnormal.
TQ_DEVICE float float_from_half_bits(uint16_t bits) {
  const uint32_t exponent = bits >> 10 & 31;
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t mantissa = static_cast<uint32_t>(bits & 1023u) << 13;
  if (exponent == 0) return float_from_bits(sign);
  return float_from_bits(sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | mantissa);
}
TQ_DEVICE int lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }
TQ_DEVICE int highest_bit(uint32_t bits) { return 31 - __builtin_clz(bits); }

struct alignas(16) Quad {
  uint32_t words[4];
};
// Loads of 16 bytes so far, by all threads: what a test counts passes over a row by.
inline int64_t& num_quads_loaded() {
  static int64_t count = 0;
  return count;
}
TQ_DEVICE Quad load_quad(const void* place) {
  ++num_quads_loaded();
  Quad loaded;
  memcpy(&loaded, __builtin_assume_aligned(place, 16), sizeof loaded);
  return loaded;
}

inline void run_fiber() {
  host().body();
  fiber().is_done = true;
  let_others_run();
}

inline void prepare(HostGroup& group, int blocks, int threads, size_t shared_bytes) {
  constexpr size_t kStack = 256 << 10;
  const size_t shared_words = shared_bytes / sizeof(double) + 1;
  group.threads = threads;
  group.barrier.size = blocks * threads;
  group.blocks.resize(blocks);
  for (HostBlock& block : group.blocks) {
    block.shared.reset(new double[shared_words]);
    memset(block.shared.get(), 0xff, shared_words * sizeof(double));
    block.barrier.size = threads;
  }
  group.warps.resize(blocks * threads / kWarp);
  for (HostWarp& warp : group.warps) warp.barrier.size = kWarp;
  group.fibers = std::vector<Fiber>(blocks * threads);
  for (size_t i = 0; i < group.fibers.size(); ++i) {
    Fiber& one = group.fibers[i];
    one.block = static_cast<int>(i) / threads;
    one.thread = static_cast<int>(i) % threads;
    one.stack.reset(new char[kStack]);
    getcontext(&one.context);
    one.context.uc_stack.ss_sp = one.stack.get();
    one.context.uc_stack.ss_size = kStack;
    one.context.uc_link = &group.scheduler;
    makecontext(&one.context, run_fiber, 0);
  }
}

inline void run_prepared(HostGroup& group) {
  running_group() = &group;
  size_t num_left = group.fibers.size();
  while (num_left > 0) {
    for (group.current = 0; group.current < group.fibers.size(); ++group.current) {
      if (fiber().is_done) continue;
      swapcontext(&group.scheduler, &fiber().context);
      if (fiber().is_done) --num_left;
    }
  }
  running_group() = nullptr;
}

// Runs `body` once on every thread of `groups` groups of `blocks` blocks, with this much shared
// memory a block, filled with a pattern that is no number.
inline void launch_on_host(
    int64_t groups, int blocks, int threads, size_t shared_bytes, const std::function<void()>& body) {
  for (int64_t idx = 0; idx < groups; ++idx) {
    HostGroup group;
    group.idx = idx;
    group.body = body;
    prepare(group, blocks, threads, shared_bytes);
    run_prepared(group);
  }
}

}  // namespace simt
}  // namespace tq
