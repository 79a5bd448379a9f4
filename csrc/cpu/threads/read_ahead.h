// Fetching of memory that a thread is about to read, into its second-level cache.
#pragma once

#include <cstdint>

namespace tq {

constexpr int64_t kCacheLine = 64;

struct MemoryRun {
  const char* begin;
  const char* end;

  int64_t lines() const { return (end - begin + kCacheLine - 1) / kCacheLine; }
};

// Fetches what a thread will read, in that order and at the pace at which it reads: kDistance ahead, across the
// ends of the runs. While the thread waits for others, it catches up. What the vector code calls is inlined
// always (see isa.h).
class ReadAhead {
 public:
  // `runs` are not empty.
  ReadAhead(const MemoryRun* runs, int64_t count)
      : unread_(runs), run_(runs), end_(runs + count), next_(count > 0 ? runs->begin : nullptr) {}

  // The thread begins to read the run that begins at `begin`: it is one of those that follow. What is due by now
  // is fetched.
  inline __attribute__((always_inline)) void reach(const char* begin) {
    int64_t lines = reading_;
    for (const MemoryRun* run = unread_; run != end_; ++run) {
      const int64_t own = (run->end - run->begin + kCacheLine - 1) / kCacheLine;
      if (run->begin != begin) {
        lines += own;
        continue;
      }
      unread_ = run + 1;
      read_ += lines;
      reading_ = own;
      due_ = read_ + kDistance / kCacheLine - fetched_;
      fetch(due_);
      return;
    }
  }

  // Fetches up to `lines` of those that are due; returns whether there was one.
  inline __attribute__((always_inline)) bool fetch(int64_t lines) {
    if (lines > due_) lines = due_;
    if (lines <= 0 || run_ == end_) return false;
    due_ -= lines;
    fetched_ += lines;
    for (; lines > 0; --lines) {
      __builtin_prefetch(next_, 0, 2);
      move(1);
      if (run_ == end_) break;
    }
    return true;
  }

  // The thread reads `lines` more.
  inline __attribute__((always_inline)) void advance(int64_t lines) {
    due_ += lines;
    fetch(lines);
  }

  // The thread reads `lines` more, and fetches as many itself, which lie side by side. Null: it need not.
  inline __attribute__((always_inline)) const char* take(int64_t lines) {
    if (run_ == end_ || run_->end - next_ < lines * kCacheLine || due_ < 0) {
      advance(lines);
      return nullptr;
    }
    const char* const from = next_;
    fetched_ += lines;
    move(lines);
    return from;
  }

 private:
  static constexpr int64_t kDistance = int64_t{64} << 10;

  inline __attribute__((always_inline)) void move(int64_t lines) {
    next_ += lines * kCacheLine;
    if (next_ >= run_->end && ++run_ != end_) next_ = run_->begin;
  }

  const MemoryRun* unread_;  // the first run that the thread has not begun
  const MemoryRun* run_;     // which is fetched
  const MemoryRun* end_;
  const char* next_;
  int64_t read_ = 0;     // lines of the runs before the one that is read
  int64_t reading_ = 0;  // lines of that one
  int64_t fetched_ = 0;  // lines of all runs
  int64_t due_ = kDistance / kCacheLine;
};

// Spreads the reading of some lines over some work, in units of the caller's.
class ReadingPace {
 public:
  ReadingPace(ReadAhead& ahead, int64_t lines, int64_t work)
      : ahead_(ahead), lines_a_unit_(work > 0 ? (lines << kShift) / work : 0) {}

  inline __attribute__((always_inline)) void step(int64_t work) {
    due_ += work * lines_a_unit_;
    if (due_ < int64_t{1} << kShift) return;
    ahead_.advance(due_ >> kShift);
    due_ &= (int64_t{1} << kShift) - 1;
  }

 private:
  static constexpr int kShift = 24;

  ReadAhead& ahead_;
  int64_t lines_a_unit_;  // in 2^-kShift lines, as due_
  int64_t due_ = 0;
};

}  // namespace tq
