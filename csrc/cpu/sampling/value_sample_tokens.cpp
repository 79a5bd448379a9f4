// value_sample_tokens on CPU: blocks of the vocabulary, in each the product of all directions with the
// block's embeddings, then every row's logits reduced while the products are in cache. Only the block that
// a draw falls into is computed again.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "cpu/linear/linear_layers.h"
#include "cpu/sampling/draw_on_threads.h"
#include "cpu/sampling/guided_block_rows.h"
#include "cpu/sampling/softmax_rows.h"
#include "cpu/simd/widen_rows.h"

namespace tq {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr KeptValues kEverything{-kInfinity, std::numeric_limits<int64_t>::max()};

// So many rows meet a block of embeddings while it is in cache: those that share its transposed copy.
constexpr int64_t kMostRowsTogether = 16 * kMostManyTileRows;
// A row that is cut off is held whole while it is drawn from, and so many of them at once.
constexpr int64_t kMostWholeRows = 8;

void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
}

struct Output {
  int64_t* ids;
  float* prior_logprobs;
  float* guided_logprobs;
  float* kl;
  bool* valid;

  void write(int64_t row, const DrawnToken& token, double divergence) const {
    ids[row] = token.id;
    prior_logprobs[row] = token.logprob;
    guided_logprobs[row] = token.proposal_logprob;
    kl[row] = static_cast<float>(std::max(divergence, 0.0));
    valid[row] = token.is_valid;
  }
};

// What all rows share.
struct Problem {
  DrawArguments arguments;
  Tensor directions;
  Tensor embeddings;
  // The type that both are multiplied in. Embeddings of another are widened, block by block.
  ElementType product_type;
  ElementType embedding_type;
  PerRow<float> alpha;
  bool greedy;

  int64_t rows() const { return arguments.logits.size(0); }
  int64_t size() const { return arguments.vocab_size; }
  int64_t rank() const { return directions.size(1); }
  int64_t blocks() const { return num_guided_blocks(size()); }
  int64_t block_size(int64_t b) const { return std::min(kGuidedBlock, size() - b * kGuidedBlock); }
  LogitsRow row_at(int64_t row) const { return logits_row(arguments.logits, arguments.type, row, size()); }
  LogitsRow block_at(int64_t row, int64_t b) const {
    const auto bytes = static_cast<int64_t>(arguments.logits.element_size());
    const auto* const from = static_cast<const char*>(row_at(row).data);
    return {from + b * kGuidedBlock * bytes, arguments.type, block_size(b)};
  }
  SamplerParameters parameters(int64_t row) const {
    SamplerParameters parameters = arguments.parameters(row);
    if (greedy) parameters.temperature = 0.0f;
    return parameters;
  }
  bool is_cut(int64_t row) const {
    const SamplerParameters of_row = parameters(row);
    return of_row.temperature != 0.0f && ((of_row.top_k > 0 && of_row.top_k < size()) || of_row.top_p < 1.0);
  }
  GuidedScale scale(int64_t row) const {
    const float temperature = parameters(row).temperature;
    // The inverse of a very low temperature overflows; the largest float in its place still gives every
    // element but ties of the largest a mass of 0.
    return {1.0f / alpha.at(row), temperature == 0.0f ? 1.0f : std::min(1.0f / temperature, FLT_MAX)};
  }
};

// Multiplies some rows of the directions by blocks of the token embeddings.
class BlockProduct {
 public:
  BlockProduct(const Problem& problem, int64_t first, int64_t rows) : problem_(problem) {
    packed_.resize(packed_bytes(rows, problem.rank()) + kCacheLine);
    product_ = product_of_rows(problem.product_type, rows, problem.rank(), line_of(packed_.data()));
    product_.is_out_float = true;
    const int64_t stride = problem.directions.stride(0);
    const auto bytes = static_cast<int64_t>(problem.directions.element_size());
    const auto* const from = static_cast<const char*>(problem.directions.const_data_ptr()) + first * stride * bytes;
    TQ_SELECT_ISA(pack_rows)(product_, from, stride, line_of(packed_.data()), 0, packing_parts(product_));
  }

  // to [rows, block_size(b)]. `widened` is the thread's room for embeddings.
  void multiply(int64_t b, std::vector<float>& widened, float* to) const {
    FewRowsProduct product = product_;
    const Tensor& embeddings = problem_.embeddings;
    const int64_t rank = problem_.rank();
    const int64_t stride = embeddings.stride(0);
    const auto bytes = static_cast<int64_t>(embeddings.element_size());
    const auto* from = static_cast<const char*>(embeddings.const_data_ptr()) + b * kGuidedBlock * stride * bytes;
    product.size_out = problem_.block_size(b);
    product.weight = from;
    product.weight_stride = stride;
    product.out = to;
    if (problem_.product_type != problem_.embedding_type) {
      widened.resize(kGuidedBlock * rank);
      for (int64_t i = 0; i < product.size_out; ++i) {
        TQ_SELECT_ISA(widen)(from + i * stride * bytes, problem_.embedding_type, rank, widened.data() + i * rank);
      }
      product.weight = widened.data();
      product.weight_stride = rank;
    }
    TQ_SELECT_ISA(multiply_few_rows)(product, 0, product.size_out);
  }

  // Asks for the embeddings of block b, one part of them at each call.
  void prefetch(int64_t b, int64_t part) const {
    const Tensor& embeddings = problem_.embeddings;
    const int64_t row_bytes = embeddings.stride(0) * static_cast<int64_t>(embeddings.element_size());
    const int64_t end = problem_.block_size(b) * row_bytes;
    const auto* const from = static_cast<const char*>(embeddings.const_data_ptr()) + b * kGuidedBlock * row_bytes;
    const int64_t begin = part * kPrefetchedBytes;
    tq::prefetch(from + begin, std::min(end - begin, kPrefetchedBytes));
  }

 private:
  // What memory delivers while one row of a block is reduced.
  static constexpr int64_t kPrefetchedBytes = 4096;

  const Problem& problem_;
  std::vector<char> packed_;
  FewRowsProduct product_;
};

// The blocks of one row, merged in order, in double.
class RowLaw {
 public:
  RowLaw(const GuidedBlock* blocks, int64_t count, double inverse_temperature) : prior_masses(count), masses(count) {
    bool is_finite = true;
    for (int64_t b = 0; b < count; ++b) {
      prior_peak = std::max(prior_peak, blocks[b].prior.peak);
      peak = std::max(peak, blocks[b].guided.peak);
      is_finite = is_finite && blocks[b].is_finite;
    }
    is_valid = is_finite && prior_peak < kInfinity && peak > -kInfinity && peak < kInfinity;
    if (!is_valid) return;
    const auto exp_in_place = TQ_SELECT_ISA(exp_in_place);
    for (int64_t b = 0; b < count; ++b) {
      prior_masses[b] = static_cast<double>(blocks[b].prior.peak) - prior_peak;
      masses[b] = (static_cast<double>(blocks[b].guided.peak) - peak) * inverse_temperature;
    }
    exp_in_place(prior_masses.data(), count);
    exp_in_place(masses.data(), count);
    for (int64_t b = 0; b < count; ++b) {
      prior_total += blocks[b].prior.sum * prior_masses[b];
      const double share = masses[b];
      masses[b] *= blocks[b].guided.sum;
      total += masses[b];
      if (!(masses[b] > 0.0)) continue;
      // The differences of a block are relative to its own peaks.
      const double apart = (static_cast<double>(blocks[b].guided.peak) - peak) * inverse_temperature -
                           (static_cast<double>(blocks[b].prior.peak) - prior_peak);
      moment += share * blocks[b].moment + masses[b] * apart;
    }
  }

  // The divergence of a law of this total mass and moment from the prior.
  double divergence(double law_moment, double law_mass) const {
    return law_moment / law_mass - std::log(law_mass) + std::log(prior_total);
  }
  float prior_logprob(float x) const {
    const double shifted = static_cast<double>(x) - prior_peak;
    return std::min(static_cast<float>(shifted - std::log(prior_total)), 0.0f);
  }

  std::vector<double> prior_masses;
  std::vector<double> masses;
  float prior_peak = -kInfinity;
  float peak = -kInfinity;
  double prior_total = 0.0;
  double total = 0.0;
  double moment = 0.0;
  bool is_valid = false;
};

// Some rows at once: their products are in cache together with a block of embeddings.
class RowsTogether {
 public:
  RowsTogether(const Problem& problem, int64_t first, int64_t rows, bool keeps_rows)
      : problem_(problem),
        first_(first),
        rows_(rows),
        blocks_(rows * problem.blocks()),
        whole_rows_(keeps_rows ? rows * padded_size() : 0) {}

  void reduce() {
    const int64_t blocks = problem_.blocks();
    // Cut the rows into groups, too, where there are fewer blocks than keep the threads busy.
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t groups = std::clamp<int64_t>(blocks < 2 * threads ? 2 * threads / blocks : 1, 1, rows_);
    std::vector<BlockProduct> products;
    products.reserve(groups);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = rows_ * group / groups;
      products.emplace_back(problem_, first_ + begin, rows_ * (group + 1) / groups - begin);
    }
    const int64_t grain = std::max<int64_t>(1, kLeastRowBlocksPerThread * groups / rows_);
    torch::stable::parallel_for(0, groups * blocks, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> values((rows_ + groups - 1) / groups * kGuidedBlock + kGroup);
      std::vector<float> widened;
      alignas(64) float guided[kGuidedBlock];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t group = i / blocks, b = i % blocks;
        products[group].multiply(b, widened, values.data());
        const int64_t row_end = rows_ * (group + 1) / groups;
        const float* row_values = values.data();
        for (int64_t row = rows_ * group / groups; row < row_end; ++row, row_values += problem_.block_size(b)) {
          if (i + 1 < end) prefetch_for_next(products[group], row, (i + 1) % blocks, row - rows_ * group / groups);
          float* const to = whole_rows_.empty() ? guided : whole_row(row) + b * kGuidedBlock;
          blocks_[row * blocks + b] = TQ_SELECT_ISA(guide_block)(
              problem_.block_at(first_ + row, b), row_values, problem_.scale(first_ + row), to);
        }
      }
    });
  }

  void draw(const Output& out) {
    torch::stable::parallel_for(0, rows_, 1, [&](int64_t begin, int64_t end) {
      RowSampler sampler;
      for (int64_t row = begin; row < end; ++row) {
        const float inverse_temperature = problem_.scale(first_ + row).inverse_temperature;
        const RowLaw law(&blocks_[row * problem_.blocks()], problem_.blocks(), inverse_temperature);
        if (!law.is_valid) {
          out.write(first_ + row, {0, -kInfinity, -kInfinity, false}, 0.0);
        } else if (problem_.is_cut(first_ + row)) {
          draw_cut(row, law, sampler, out);
        } else {
          draw_whole(row, law, out);
        }
      }
    });
  }

 private:
  // With fewer pairs of a row and a block than this, another thread does not pay.
  static constexpr int64_t kLeastRowBlocksPerThread = 8;

  // Asks for what the next block b reads of this row, and for a part of its embeddings: memory would idle
  // while rows are reduced, and the processor foresees no row's next block.
  void prefetch_for_next(const BlockProduct& product, int64_t row, int64_t b, int64_t part) const {
    const LogitsRow logits = problem_.block_at(first_ + row, b);
    prefetch(logits.data, logits.size * static_cast<int64_t>(problem_.arguments.logits.element_size()));
    product.prefetch(b, part);
  }

  // guide_block writes whole groups.
  int64_t padded_size() const { return problem_.blocks() * kGuidedBlock; }
  float* whole_row(int64_t row) { return whole_rows_.data() + row * padded_size(); }

  // Draws by inverse CDF of the blocks' masses, or takes the arg max; either way from one block.
  void draw_whole(int64_t row, const RowLaw& law, const Output& out) const {
    const float temperature = problem_.parameters(first_ + row).temperature;
    const MassScale scale{law.peak, problem_.scale(first_ + row).inverse_temperature};
    const bool is_arg_max = temperature == 0.0f;
    double target = problem_.arguments.uniform(first_ + row) * law.total;
    const int64_t b = is_arg_max ? block_of_peak(row, law.peak) : block_of_target(law.masses, &target);

    alignas(64) float values[kGuidedBlock + kGroup] = {};
    alignas(64) float guided[kGuidedBlock];
    std::vector<float> widened;
    BlockProduct(problem_, first_ + row, 1).multiply(b, widened, values);
    const LogitsRow prior = problem_.block_at(first_ + row, b);
    const float peak = TQ_SELECT_ISA(guide_block)(prior, values, problem_.scale(first_ + row), guided).guided.peak;
    const LogitsRow block{guided, ElementType::kFloat32, prior.size};
    const int64_t id = is_arg_max ? TQ_SELECT_ISA(find_in_block)(block, 0, peak)
                                  : TQ_SELECT_ISA(draw_in_block)(block, 0, scale, kEverything, target);
    const float logprob = law.prior_logprob(TQ_SELECT_ISA(value_at)(prior, id));
    const int64_t token = b * kGuidedBlock + id;
    if (is_arg_max) return out.write(first_ + row, {token, logprob, 0.0f, true}, -logprob);
    const double shifted = (static_cast<double>(guided[id]) - law.peak) / temperature;
    const float guided_logprob = std::min(static_cast<float>(shifted - std::log(law.total)), 0.0f);
    out.write(first_ + row, {token, logprob, guided_logprob, true}, law.divergence(law.moment, law.total));
  }

  void draw_cut(int64_t row, const RowLaw& law, RowSampler& sampler, const Output& out) {
    const float* const guided = whole_row(row);
    const LogitsRow prior = problem_.row_at(first_ + row);
    sampler.start({guided, ElementType::kFloat32, prior.size}, problem_.parameters(first_ + row));
    sampler.reduce(0, num_blocks(prior.size));
    DrawnToken token = sampler.draw(problem_.arguments.uniform(first_ + row));
    token.logprob = law.prior_logprob(TQ_SELECT_ISA(value_at)(prior, token.id));
    const MassScale scale{law.peak, problem_.scale(first_ + row).inverse_temperature};
    const KeptMoment kept = TQ_SELECT_ISA(kept_moment)(prior, law.prior_peak, guided, scale, sampler.kept());
    out.write(first_ + row, token, law.divergence(kept.moment, kept.mass));
  }

  int64_t block_of_peak(int64_t row, float peak) const {
    const GuidedBlock* const blocks = &blocks_[row * problem_.blocks()];
    int64_t b = 0;
    while (blocks[b].guided.peak != peak) ++b;
    return b;
  }

  // The block in which the running mass exceeds the target, or the last with any; the target becomes
  // relative to it.
  static int64_t block_of_target(const std::vector<double>& masses, double* target) {
    double before = 0.0, before_last = 0.0;
    size_t last = 0;
    for (size_t b = 0; b < masses.size(); ++b) {
      if (!(masses[b] > 0.0)) continue;
      last = b;
      before_last = before;
      before += masses[b];
      if (before > *target) break;
    }
    *target -= before_last;
    return static_cast<int64_t>(last);
  }

  const Problem& problem_;
  int64_t first_;
  int64_t rows_;
  std::vector<GuidedBlock> blocks_;
  std::vector<float> whole_rows_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> value_sample_tokens_cpu(
    const Tensor& logits, const Tensor& directions, const Tensor& token_embeddings, const Tensor& keys, int64_t step,
    const std::optional<Tensor>& step_tensor, double alpha, const std::optional<Tensor>& alphas, double temperature,
    const std::optional<Tensor>& temperatures, int64_t top_k, const std::optional<Tensor>& top_ks, double top_p,
    const std::optional<Tensor>& top_ps, bool greedy, int64_t vocab_size, int64_t seed,
    const std::optional<Tensor>& seed_tensor) {
  const char* const op = "value_sample_tokens";
  const DrawArguments arguments(
      op, logits, keys, step, step_tensor, temperature, temperatures, top_k, top_ks, top_p, top_ps, vocab_size, seed,
      seed_tensor);
  const int64_t rows = logits.size(0);
  require_contract(
      directions.dim() == 2 && directions.size(0) == rows && token_embeddings.dim() == 2 &&
          token_embeddings.size(1) == directions.size(1) && token_embeddings.size(0) >= vocab_size &&
          is_per_row(alphas, rows, is_float_number(alpha) && alpha >= std::numeric_limits<float>::min()),
      op);
  const ElementType direction_type = element_type_of(directions, op, "directions");
  const ElementType embedding_type = element_type_of(token_embeddings, op, "token_embeddings");
  const bool is_same = direction_type == embedding_type;
  const Problem problem{
      arguments,
      is_same ? with_unit_inner_stride(directions) : dense(directions, ScalarType::Float),
      with_unit_inner_stride(token_embeddings),
      is_same ? embedding_type : ElementType::kFloat32,
      embedding_type,
      PerRow<float>(static_cast<float>(alpha), alphas, ScalarType::Float),
      greedy};

  Tensor ids = new_tensor({rows}, ScalarType::Long);
  Tensor prior_logprobs = new_tensor({rows}, ScalarType::Float);
  Tensor guided_logprobs = new_tensor({rows}, ScalarType::Float);
  Tensor kl = new_tensor({rows}, ScalarType::Float);
  Tensor valid = new_tensor({rows}, ScalarType::Bool);
  const Output out{
      static_cast<int64_t*>(ids.mutable_data_ptr()), static_cast<float*>(prior_logprobs.mutable_data_ptr()),
      static_cast<float*>(guided_logprobs.mutable_data_ptr()), static_cast<float*>(kl.mutable_data_ptr()),
      static_cast<bool*>(valid.mutable_data_ptr())};

  bool any_cut = false;
  for (int64_t row = 0; row < rows; ++row) any_cut = any_cut || problem.is_cut(row);
  const int64_t together = any_cut ? kMostWholeRows : kMostRowsTogether;
  for (int64_t first = 0; first < rows; first += together) {
    RowsTogether some(problem, first, std::min(together, rows - first), any_cut);
    some.reduce();
    some.draw(out);
  }
  return {ids, prior_logprobs, guided_logprobs, kl, valid};
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CPU, m) { m.impl("value_sample_tokens", TORCH_BOX(&value_sample_tokens_cpu)); }

}  // namespace tq
