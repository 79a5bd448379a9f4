#include "common/philox.h"

#include <cstdint>

#include "tests/check.h"

namespace {

void known_answers_hold() {
  // The three vectors published with Random123 for philox4x32-10.
  const tq::PhiloxWords zero = tq::philox4x32({0, 0, 0, 0}, 0, 0);
  CHECK(zero.w0 == 0x6627e8d5u && zero.w1 == 0xe169c58du);
  CHECK(zero.w2 == 0xbc57ac4cu && zero.w3 == 0x9b00dbd8u);
  const uint32_t all = 0xffffffffu;
  const tq::PhiloxWords ones = tq::philox4x32({all, all, all, all}, all, all);
  CHECK(ones.w0 == 0x408f276du && ones.w1 == 0x41c83b0eu);
  CHECK(ones.w2 == 0xa20bc7c6u && ones.w3 == 0x6d5451fdu);
  const tq::PhiloxWords pi =
      tq::philox4x32({0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}, 0xa4093822u, 0x299f31d0u);
  CHECK(pi.w0 == 0xd16cfe09u && pi.w1 == 0x94fdccebu);
  CHECK(pi.w2 == 0x5001e420u && pi.w3 == 0x24126ea1u);
}

void every_field_of_the_name_matters() {
  const double base = tq::philox_uniform(1, tq::kPurposeRollout, 2, 3, 4);
  CHECK(base == tq::philox_uniform(1, tq::kPurposeRollout, 2, 3, 4));
  CHECK(base != tq::philox_uniform(2, tq::kPurposeRollout, 2, 3, 4));
  CHECK(base != tq::philox_uniform(1, tq::kPurposeChoice, 2, 3, 4));
  CHECK(base != tq::philox_uniform(1, tq::kPurposeRollout, 3, 3, 4));
  CHECK(base != tq::philox_uniform(1, tq::kPurposeRollout, 2, 4, 4));
  CHECK(base != tq::philox_uniform(1, tq::kPurposeRollout, 2, 3, 5));
  // Upper halves of the 64-bit fields count as well.
  CHECK(base != tq::philox_uniform(1 + (int64_t{1} << 40), tq::kPurposeRollout, 2, 3, 4));
  CHECK(base != tq::philox_uniform(1, tq::kPurposeRollout, 2 + (int64_t{1} << 40), 3, 4));
}

void uniforms_lie_strictly_inside_the_unit_interval() {
  const uint32_t all = 0xffffffffu;
  CHECK(tq::uniform_from_words({0, 0, 0, 0}) > 0.0);
  CHECK(tq::uniform_from_words({0, 0, 0, 0}) == 0x1p-54);
  CHECK(tq::uniform_from_words({all, all, 0, 0}) < 1.0);
}

void uniforms_have_the_right_mean_and_variance() {
  constexpr int kDraws = 200000;
  double sum = 0.0;
  double sum_of_squares = 0.0;
  for (int i = 0; i < kDraws; ++i) {
    const double u = tq::philox_uniform(7, tq::kPurposeRollout, i, 0, 0);
    sum += u;
    sum_of_squares += u * u;
  }
  // Five standard errors: sqrt(1/12/n) and sqrt(4/45/n).
  CHECK_CLOSE(sum / kDraws, 0.5, 5 * 6.5e-4);
  CHECK_CLOSE(sum_of_squares / kDraws, 1.0 / 3.0, 5 * 6.7e-4);
}

}  // namespace

int main() {
  known_answers_hold();
  every_field_of_the_name_matters();
  uniforms_lie_strictly_inside_the_unit_interval();
  uniforms_have_the_right_mean_and_variance();
  return tq_test::num_failures();
}
