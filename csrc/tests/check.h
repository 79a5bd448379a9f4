// The smallest check that keeps going: every failure is printed with its line, and the exit code counts.
#pragma once

#include <cmath>
#include <cstdio>

namespace tq_test {

inline int& num_failures() {
  static int count = 0;
  return count;
}

inline void report(bool is_ok, const char* text, const char* file, int line) {
  if (!is_ok) {
    std::printf("%s:%d: failed: %s\n", file, line, text);
    ++num_failures();
  }
}

inline bool is_close(double a, double b, double tolerance) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  if (std::isinf(a) || std::isinf(b)) return a == b;
  return std::fabs(a - b) <= tolerance;
}

}  // namespace tq_test

#define CHECK(condition) ::tq_test::report((condition), #condition, __FILE__, __LINE__)
#define CHECK_CLOSE(a, b, tolerance) \
  ::tq_test::report(::tq_test::is_close((a), (b), (tolerance)), #a " is close to " #b, __FILE__, __LINE__)
