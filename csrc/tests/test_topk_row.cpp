// The CUDA kernel of topk_logprobs, run on the CPU (tests/simt_on_host.h).
#include "cuda/topk_row.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "tests/check.h"

namespace {

struct TopK {
  std::vector<int64_t> ids;
  std::vector<float> logprobs;
  std::vector<float> lse;
};

TopK run(const std::vector<float>& logits, int64_t stride, int vocab_size, int k, int blocks, int threads) {
  const int64_t rows = static_cast<int64_t>(logits.size()) / stride;
  TopK out{std::vector<int64_t>(rows * k, -1), std::vector<float>(rows * k, NAN), std::vector<float>(rows, NAN)};
  const tq::TopKRows job{logits.data(),       stride,        vocab_size, k, 1.0f, nullptr, out.ids.data(),
                         out.logprobs.data(), out.lse.data()};
  tq::simt::launch_on_host(
      rows, blocks, threads, tq::topk_shared_bytes(vocab_size, k), [&] { tq::topk_row<tq::Float32>(job); });
  return out;
}

void check_row(const std::vector<float>& logits, int64_t stride, int vocab_size, const TopK& got, int k) {
  for (size_t row = 0; row < got.lse.size(); ++row) {
    std::vector<int64_t> order(vocab_size);
    std::vector<float> values(logits.begin() + row * stride, logits.begin() + row * stride + vocab_size);
    double sum = 0.0;
    double peak = -INFINITY;
    for (int i = 0; i < vocab_size; ++i) {
      order[i] = i;
      if (std::isnan(values[i])) values[i] = -INFINITY;
      peak = std::max(peak, static_cast<double>(values[i]));
    }
    for (const float x : values) sum += x == -INFINITY ? 0.0 : std::exp(x - peak);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return values[a] > values[b]; });
    const double lse = sum > 0.0 ? peak + std::log(sum) : -INFINITY;
    CHECK_CLOSE(got.lse[row], lse, 1e-5 + 2e-7 * std::fabs(lse));
    for (int i = 0; i < k; ++i) {
      CHECK(got.ids[row * k + i] == order[i]);
      const double expected = sum > 0.0 ? values[order[i]] - lse : -INFINITY;
      CHECK_CLOSE(got.logprobs[row * k + i], expected, 1e-5);
    }
  }
}

void check(const std::vector<float>& logits, int64_t stride, int vocab_size, int k) {
  const TopK alone = run(logits, stride, vocab_size, k, 1, 96);
  check_row(logits, stride, vocab_size, alone, k);
  // The size of a group and of its blocks changes nothing, to the last bit.
  const TopK group = run(logits, stride, vocab_size, k, 3, 64);
  CHECK(alone.ids == group.ids);
  CHECK(alone.logprobs == group.logprobs);
  CHECK(alone.lse == group.lse);
}

std::vector<float> random_logits(int64_t count) {
  std::mt19937 engine(count);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  std::vector<float> logits(count);
  for (float& x : logits) x = normal(engine);
  return logits;
}

void random_rows_at_awkward_sizes() {
  for (const int size : {1, 2, 31, 1000, 2048, 2049, 9001}) {
    for (const int k : {1, 10, 128}) {
      if (k <= size) check(random_logits(3 * size), size, size, k);
    }
  }
}

void rows_that_crowd_one_lane() {
  constexpr int kSize = 7000;
  std::vector<float> ramp(kSize);
  for (int i = 0; i < kSize; ++i) ramp[i] = static_cast<float>(i);
  check(ramp, kSize, kSize, 128);
  std::reverse(ramp.begin(), ramp.end());
  check(ramp, kSize, kSize, 100);
  check(std::vector<float>(kSize, 2.5f), kSize, kSize, 128);
  for (float& x : ramp) x = std::floor(x / 500.0f);
  check(ramp, kSize, kSize, 77);
}

// Lanes tie with each other and within themselves: ids must decide, in the lane keys as in the result.
void rows_of_few_values() {
  std::vector<float> logits = random_logits(2 * 5000);
  for (float& x : logits) x = std::floor(x / 3.0f);
  for (const int k : {1, 5, 33, 100}) {
    check(logits, 5000, 5000, k);
    check(std::vector<float>(5000, 2.5f), 5000, 5000, k);
  }
}

void padding_and_nan_take_no_part() {
  std::vector<float> logits = random_logits(2 * 2600);
  for (size_t i = 2500; i < 2600; ++i) logits[i] = logits[i + 2600] = 1e30f;
  for (size_t i = 0; i < 2500; i += 3) logits[i] = NAN;
  check(logits, 2600, 2500, 20);
  check(std::vector<float>(2100, NAN), 2100, 2100, 3);
}

void an_infinite_logit_is_first_and_its_lse_is_not_finite() {
  std::vector<float> logits = random_logits(2100);
  logits[2077] = INFINITY;
  const TopK got = run(logits, 2100, 2100, 2, 1, 64);
  CHECK(got.ids[0] == 2077);
  CHECK(!std::isfinite(got.lse[0]));
}

// tests/ops/test_topk_logprobs.py holds the same numbers against what Python asks of the card.
void shared_memory_is_what_python_reckons() {
  CHECK(tq::topk_shared_bytes(1, 1) == 548);
  CHECK(tq::topk_shared_bytes(5000, 128) == 42592);
  CHECK(tq::topk_shared_bytes(128256, 10) == 22136);
  CHECK(tq::topk_shared_bytes(131072, 128) == 84232);
  CHECK(tq::topk_shared_bytes(1 << 19, 128) == 134920);
}

}  // namespace

int main() {
  random_rows_at_awkward_sizes();
  rows_that_crowd_one_lane();
  rows_of_few_values();
  padding_and_nan_take_no_part();
  an_infinite_logit_is_first_and_its_lse_is_not_finite();
  shared_memory_is_what_python_reckons();
  return tq_test::num_failures();
}
