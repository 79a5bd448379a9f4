// The vector maths of one instruction set (TQ_ISA) against the C library and against common/philox.h.
#include "cpu/double_lanes.h"

#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/philox_lanes.h"
#include "tests/check.h"

namespace {

using namespace tq::TQ_ISA;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Whether a and b are so many doubles apart at most; of the smallest ones, subnormal, too.
bool is_within(double a, double b, int64_t steps) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  int64_t bits_a = 0, bits_b = 0;
  __builtin_memcpy(&bits_a, &a, sizeof a);
  __builtin_memcpy(&bits_b, &b, sizeof b);
  return (a < 0) == (b < 0) && std::llabs(bits_a - bits_b) <= steps;
}

// `lane` holds x, the others something else that must not matter.
F64s around(double x, int lane) {
  F64s value = broadcast_wide(lane % 2 == 0 ? -kInfinity : std::nan(""));
  value[lane] = x;
  return value;
}

void exponentials_are_right_down_to_the_smallest_number() {
  for (int i = 0; i <= 200000; ++i) {
    const double x = -750.0 * i / 200000;
    CHECK(is_within(exp_nonpositive(around(x, i % kWide))[i % kWide], std::exp(x), 2));
  }
  CHECK(exp_nonpositive(around(0.0, 0))[0] == 1.0);
  CHECK(exp_nonpositive(around(-kInfinity, 0))[0] == 0.0);
  CHECK(std::isnan(exp_nonpositive(around(std::nan(""), 0))[0]));
}

void expm1_keeps_its_digits_near_zero_and_does_not_overflow_early() {
  for (int i = 0; i <= 200000; ++i) {
    const double x = -40.0 + 745.0 * i / 200000;
    CHECK(is_within(expm1_of(around(x, i % kWide))[i % kWide], std::expm1(x), 4));
    const double small = std::ldexp(1.0 + i / 200001.0, -1 - i % 60) * (i % 2 == 0 ? 1 : -1);
    CHECK(is_within(expm1_of(around(small, i % kWide))[i % kWide], std::expm1(small), 4));
  }
  CHECK(is_within(expm1_of(around(709.7, 0))[0], std::expm1(709.7), 4));
  CHECK(expm1_of(around(kInfinity, 0))[0] == kInfinity && expm1_of(around(-kInfinity, 0))[0] == -1.0);
  CHECK(std::isnan(expm1_of(around(std::nan(""), 0))[0]));
}

void logarithms_keep_their_digits_near_one() {
  for (int i = 0; i < 200000; ++i) {
    const double x = std::ldexp(1.0 + i / 200000.0, i % 120 - 60);
    CHECK(is_within(log_of_normal(around(x, i % kWide))[i % kWide], std::log(x), 1));
    const double below_one = 1.0 - std::ldexp(1.0 + i / 200000.0, -2 - i % 51);
    CHECK(is_within(log_of_normal(around(below_one, i % kWide))[i % kWide], std::log(below_one), 1));
  }
  CHECK(log_of_normal(around(1.0, 0))[0] == 0.0);
}

void uniforms_are_those_of_the_scalar_generator() {
  const int64_t seeds[] = {0, -1, int64_t{1} << 40, INT64_MIN};
  for (int i = 0; i < 20000; ++i) {
    const int64_t seed = seeds[i % 4] + i, key = seeds[i / 4 % 4] - 7 * i, step = seeds[i / 16 % 4];
    const PhiloxStream stream = philox_stream(seed, tq::kPurposeChoice, key, step);
    I64s indices = {};
    for (int lane = 0; lane < kWide; ++lane) indices[lane] = seeds[lane % 4] + 1000 * i + lane;
    const F64s got = philox_uniforms(stream, indices);
    for (int lane = 0; lane < kWide; ++lane) {
      CHECK(got[lane] == tq::philox_uniform(seed, tq::kPurposeChoice, key, step, indices[lane]));
    }
  }
}

void a_part_of_a_vector_is_all_that_is_read_and_written() {
  double numbers[kWide + 1];
  float written[kWide + 1];
  for (int count = 0; count <= kWide; ++count) {
    for (int i = 0; i <= kWide; ++i) numbers[i] = i + 1.5, written[i] = -1.0f;
    const F64s loaded = load_doubles(numbers, count);
    store_floats(written, loaded, count);
    for (int lane = 0; lane < kWide; ++lane) CHECK(loaded[lane] == (lane < count ? lane + 1.5 : 0.0));
    for (int i = 0; i <= kWide; ++i) CHECK(written[i] == (i < count ? i + 1.5f : -1.0f));
  }
}

void reductions_see_every_lane() {
  for (int lane = 0; lane < kWide; ++lane) {
    F64s value = broadcast_wide(1.0);
    value[lane] = 3.0;
    CHECK(reduce_max(value) == 3.0 && reduce_sum(value) == kWide + 2.0);
    CHECK(mask_equal(value, broadcast_wide(3.0)) == 1u << lane);
    CHECK(square_root(value * value)[lane] == 3.0);
  }
}

// False where this processor lacks the instructions that the file was compiled for.
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
  expm1_keeps_its_digits_near_zero_and_does_not_overflow_early();
  logarithms_keep_their_digits_near_one();
  uniforms_are_those_of_the_scalar_generator();
  a_part_of_a_vector_is_all_that_is_read_and_written();
  reductions_see_every_lane();
  return tq_test::num_failures();
}
