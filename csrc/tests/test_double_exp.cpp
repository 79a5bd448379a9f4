// The exponentials of one instruction set (TQ_ISA) against the C library.
#include "cpu/simd/double_exp_rows.h"

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <vector>

#include "tests/check.h"

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Whether a and b are so many doubles apart at most; of the smallest ones, subnormal, too.
bool is_within(double a, double b, int64_t steps) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  int64_t bits_a = 0, bits_b = 0;
  __builtin_memcpy(&bits_a, &a, sizeof a);
  __builtin_memcpy(&bits_b, &b, sizeof b);
  return (a < 0) == (b < 0) && std::llabs(bits_a - bits_b) <= steps;
}

void exponentials_are_right_down_to_the_smallest_number() {
  constexpr int kCount = 200001;
  std::vector<double> x(kCount), got(kCount);
  for (int i = 0; i < kCount; ++i) x[i] = got[i] = -750.0 * i / (kCount - 1);
  tq::TQ_ISA::exp_in_place(got.data(), kCount);
  for (int i = 0; i < kCount; ++i) CHECK(is_within(got[i], std::exp(x[i]), 2));
}

// The exponential of a number does not depend on its neighbours, nor on whether it fills a vector with
// them.
void a_number_depends_on_no_other() {
  for (const double x : {0.0, -0.5, -700.25, -745.0, -kInfinity, kNaN}) {
    double alone = x;
    tq::TQ_ISA::exp_in_place(&alone, 1);
    CHECK(is_within(alone, std::exp(x), 2));
    for (int count = 1; count <= 19; ++count) {
      for (int at = 0; at < count; ++at) {
        double numbers[20];
        for (int i = 0; i < 20; ++i) numbers[i] = i % 2 == 0 ? -kInfinity : kNaN;
        numbers[at] = x;
        numbers[count] = -3.0;
        tq::TQ_ISA::exp_in_place(numbers, count);
        CHECK(is_within(numbers[at], alone, 0));
        CHECK(numbers[count] == -3.0);
      }
    }
  }
}

// Whether this processor has the instructions that the file was compiled for.
bool can_run() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

}  // namespace

int main() {
  if (!can_run()) return 77;
  exponentials_are_right_down_to_the_smallest_number();
  a_number_depends_on_no_other();
  return tq_test::num_failures();
}
