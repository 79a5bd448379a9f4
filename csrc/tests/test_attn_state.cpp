#include "common/attn_state.h"

#include <cmath>
#include <initializer_list>

#include "tests/check.h"

namespace {

void weights_are_the_shares_of_the_mass() {
  const tq::AttentionMerge merge = tq::merge_attention_lse(std::log(1.0f), std::log(3.0f));
  CHECK_CLOSE(merge.weight_a, 0.25, 1e-7);
  CHECK_CLOSE(merge.weight_b, 0.75, 1e-7);
  CHECK_CLOSE(merge.lse, std::log(4.0), 1e-6);
}

void an_empty_part_has_no_weight() {
  for (const float empty : {-INFINITY, INFINITY, NAN}) {
    const tq::AttentionMerge merge = tq::merge_attention_lse(empty, 2.0f);
    CHECK(merge.weight_a == 0.0f && merge.weight_b == 1.0f && merge.lse == 2.0f);
  }
}

void two_empty_parts_stay_empty() {
  const tq::AttentionMerge merge = tq::merge_attention_lse(INFINITY, -INFINITY);
  CHECK(merge.weight_a == 0.0f && merge.weight_b == 0.0f && merge.lse == -INFINITY);
}

void far_apart_parts_do_not_overflow() {
  const tq::AttentionMerge merge = tq::merge_attention_lse(1e30f, -1e30f);
  CHECK(merge.weight_a == 1.0f && merge.weight_b == 0.0f && merge.lse == 1e30f);
}

}  // namespace

int main() {
  weights_are_the_shares_of_the_mass();
  an_empty_part_has_no_weight();
  two_empty_parts_stay_empty();
  far_apart_parts_do_not_overflow();
  return tq_test::num_failures();
}
