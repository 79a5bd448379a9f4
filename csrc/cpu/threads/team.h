// Threads that run one function together and wait for each other in it. Starting threads for each step of a
// pass, and what the caller does alone between the steps, would take as long as the steps of a small model.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "cpu/threads/read_ahead.h"
#include "stable_tensor.h"

namespace tq {

// [begin, end)
struct Range {
  int64_t begin;
  int64_t end;
};

class Member;

class Team {
 public:
  explicit Team(int64_t most) : most_(most) {}

  // The number of this thread in the team, or -1 where it came too late. `parts` of the `most` were given to
  // it; `leads` says that it is the one that others may not have to wait for.
  int64_t join(int64_t parts, bool leads) {
    const int64_t number = joined_.fetch_add(1);
    if (number >= kClosed) return -1;
    parts_.fetch_add(parts);
    if (leads) {
      // With OpenMP every thread comes; other pools may run the parts one after the other.
      const auto given_up = std::chrono::steady_clock::now() + std::chrono::milliseconds(5);
      for (int64_t spins = 0; parts_.load() < most_; ++spins) {
        if (spins % 256 == 255 && std::chrono::steady_clock::now() > given_up) break;
        pause(spins);
      }
      size_.store(joined_.exchange(kClosed), std::memory_order_release);
    }
    for (int64_t spins = 0; size_.load(std::memory_order_acquire) == 0; ++spins) pause(spins);
    return number;
  }

 private:
  friend class Member;

  static constexpr int64_t kClosed = int64_t{1} << 32;

  // A thread that waits for long lets others run, because the one that it waits for may be among them.
  static void pause(int64_t spins) {
    constexpr int64_t kSpins = 4096;
    if (spins > kSpins) return std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  const int64_t most_;
  std::atomic<int64_t> joined_{0};
  std::atomic<int64_t> parts_{0};
  std::atomic<int64_t> size_{0};
  alignas(64) std::atomic<int64_t> arrivals_{0};
};

// A thread in its team.
class Member {
 public:
  Member(Team& team, int64_t number) : team_(team), number_(number), size_(team.size_.load()) {}

  int64_t number() const { return number_; }
  int64_t size() const { return size_; }

  // This thread's part of [0, count).
  Range share(int64_t count) const { return {count * number_ / size_, count * (number_ + 1) / size_}; }

  // Returns when all threads of the team have called this as often. `meanwhile` is called again and again
  // until then; it does a little and says whether there was anything to do.
  template <typename Meanwhile>
  void wait(const Meanwhile& meanwhile) {
    target_ += size_;
    team_.arrivals_.fetch_add(1, std::memory_order_acq_rel);
    for (int64_t spins = 0; team_.arrivals_.load(std::memory_order_acquire) < target_;) {
      if (!meanwhile()) Team::pause(spins++);
    }
  }

 private:
  Team& team_;
  int64_t number_;
  int64_t size_;
  int64_t target_ = 0;
};

// Calls run(member) on up to `most` threads at once, each with a Member of one team. It must not throw.
template <typename Run>
void run_as_team(int64_t most, const Run& run) {
  Team team(most);
  const auto caller = std::this_thread::get_id();
  torch::stable::parallel_for(0, most, 1, [&](int64_t begin, int64_t end) {
    const int64_t number = team.join(end - begin, std::this_thread::get_id() == caller);
    if (number < 0) return;
    Member member(team, number);
    run(member);
  });
}

// The same; add_runs(member, runs) adds what a thread reads, in order, and run(member, ahead) fetches it ahead.
template <typename AddRuns, typename Run>
void run_as_reading_team(int64_t most, const AddRuns& add_runs, const Run& run) {
  run_as_team(most, [&](Member& member) {
    std::vector<MemoryRun> runs;
    add_runs(member, runs);
    ReadAhead ahead(runs.data(), static_cast<int64_t>(runs.size()));
    run(member, ahead);
  });
}

}  // namespace tq
