#include "common/ordered_key.h"

#include <cmath>
#include <limits>

#include "tests/check.h"

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

void order_of_bits_is_order_of_floats() {
  const float ascending[] = {-kInf, -3.4e38f, -1.0f, -1e-45f, 0.0f, 1e-45f, 0.5f, 1.0f, 3.4e38f, kInf};
  for (int i = 0; i + 1 < 10; ++i) {
    CHECK(tq::ordered_bits(ascending[i]) < tq::ordered_bits(ascending[i + 1]));
    CHECK(tq::value_from_ordered_bits(tq::ordered_bits(ascending[i])) == ascending[i]);
  }
  CHECK(tq::ordered_bits(-0.0f) == tq::ordered_bits(0.0f));
}

void keys_order_by_value_and_then_by_lower_id() {
  CHECK(tq::ordered_key(2.0f, 9) > tq::ordered_key(1.0f, 3));
  CHECK(tq::ordered_key(1.0f, 3) > tq::ordered_key(1.0f, 4));
  CHECK(tq::ordered_key(-0.0f, 1) > tq::ordered_key(0.0f, 2));
  CHECK(tq::ordered_key(-kInf, 0) > tq::ordered_key(-kInf, 0xfffffffeu));
}

void keys_give_back_value_and_id() {
  const uint64_t key = tq::ordered_key(-7.25f, 128255);
  CHECK(tq::value_of_key(key) == -7.25f);
  CHECK(tq::id_of_key(key) == 128255);
}

}  // namespace

int main() {
  order_of_bits_is_order_of_floats();
  keys_order_by_value_and_then_by_lower_id();
  keys_give_back_value_and_id();
  return tq_test::num_failures();
}
