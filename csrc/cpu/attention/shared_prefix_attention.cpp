// shared_prefix_attention on CPU: one pass over the prefix of a tree for all its rows, and over the
// branch of each row, with one running softmax.
//
// The work is cut by (tree, key-value head, some queries), or by (tree, some queries of all heads) where
// the prefix is short; each query takes the same blocks of keys in the same order however it is cut, so
// its result depends on neither threads nor other rows.
#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "cpu/attention/shared_prefix_attention.h"

#include "cpu/tensors/contract.h"
#include "cpu/tensors/tensor_access.h"

namespace tq {

namespace {

constexpr const char* kOp = "shared_prefix_attention";

// A piece has at most about this many queries, which with their output stay in the cache. Where there are
// too few pieces for the threads it has fewer, but not much fewer than kQueriesToShare, which share the
// transposing of the keys.
constexpr int64_t kQueriesPerPiece = 256;
constexpr int64_t kQueriesToShare = 48;
// With a short prefix, queries share only the softmax, so fewer together are enough.
constexpr int64_t kQueriesTogether = 12;
constexpr double kLog2E = 1.4426950408889634;
// Products, or bytes of keys and values, below which one thread is done before another is awake, about 15 us.
constexpr int64_t kProductsPerThread = int64_t{1} << 20;
constexpr int64_t kBytesPerThread = int64_t{1} << 17;

// Cuts the forest into pieces. The rows of each tree are neighbours: `tree` ascends, or every tree has
// equally many.
std::vector<Piece> cut_into_pieces(
    const Problem& problem, int64_t rows, int64_t trees, const std::optional<Tensor>& tree, int64_t threads) {
  const int64_t share = rows * problem.queries_per_row() * problem.num_kv_heads / (2 * threads);
  const int64_t* const tree_of_row = data_or_null<int64_t>(tree);
  std::vector<Piece> pieces;
  for (int64_t row = 0; row < rows;) {
    const int64_t g = tree_of_row == nullptr ? row / (rows / trees) : tree_of_row[row];
    STD_TORCH_CHECK(
        g >= 0 && g < trees, "shared_prefix_attention: tree[", row, "] is ", g, ", expected 0 to ", trees - 1);
    int64_t end = row;
    while (end < rows && (tree_of_row == nullptr ? end / (rows / trees) : tree_of_row[end]) == g) ++end;
    const bool is_short = problem.is_short(g);
    const int64_t parts = is_short ? 1 : problem.num_kv_heads;
    const int64_t count = (end - row) * problem.queries_per_row() * problem.num_kv_heads / parts;
    const int64_t most = std::min(std::max(share, is_short ? kQueriesTogether : kQueriesToShare), kQueriesPerPiece);
    const int64_t cuts = std::max<int64_t>((count + most - 1) / most, 1);
    for (int64_t first = 0; first < parts * count; first += count) {
      for (int64_t cut = 0; cut < cuts; ++cut) {
        pieces.push_back({g, row, end - row, first + count * cut / cuts, first + count * (cut + 1) / cuts});
      }
    }
    row = end;
  }
  return pieces;
}

// How long a piece takes, in units of a key that is multiplied by one query; more than 0. Keys must be read, too,
// which takes as long as some queries.
double work_of(const Problem& problem, const Piece& piece) {
  constexpr int64_t kQueriesOfReading = 16;
  // A query that stands before its branch sees none of its keys.
  const auto seen = [&](int64_t keys) {
    return std::clamp<int64_t>(keys, 0, problem.window == 0 ? std::numeric_limits<int64_t>::max() : problem.window);
  };
  int64_t work = piece.count() + seen(problem.prefix_len[piece.tree]) * (kQueriesOfReading + piece.count());
  for_each_row(problem, piece, [&](const RowOfPiece& part) {
    const int64_t keys_of_each = (seen(part.first_place + 1) + seen(part.last_place + 1)) / 2;
    work += keys_of_each * (part.end - part.first) + seen(part.last_place + 1) * kQueriesOfReading;
  });
  return static_cast<double>(work);
}

PieceRoom& room_of_thread() {
  // It is made once a thread: allocating it takes as long as a small piece.
  static thread_local PieceRoom room;
  return room;
}

// Whether q [N, H_q, T, d], the prefixes [G, H_kv, P, d] and the branches [N, H_kv, S, d] fit and are of
// one type.
bool are_in_shape(
    const Tensor& q, const Tensor& prefix_k, const Tensor& prefix_v, const Tensor& branch_k, const Tensor& branch_v) {
  if (q.dim() != 4 || prefix_k.dim() != 4 || branch_k.dim() != 4) return false;
  const int64_t heads = prefix_k.size(1);
  const int64_t size = q.size(3);
  const ScalarType type = q.scalar_type();
  return heads > 0 && size > 0 && q.size(1) % heads == 0 && prefix_k.size(3) == size &&
         has_shape(prefix_v, {prefix_k.size(0), heads, prefix_k.size(2), size}) &&
         has_shape(branch_k, {q.size(0), heads, branch_k.size(2), size}) &&
         has_shape(branch_v, {q.size(0), heads, branch_k.size(2), size}) && prefix_k.scalar_type() == type &&
         prefix_v.scalar_type() == type && branch_k.scalar_type() == type && branch_v.scalar_type() == type;
}

// Returns the largest length. A length beyond its buffer is an error: memory beyond the buffer would be
// read.
int64_t check_lengths(const char* name, const Tensor& lengths, int64_t low, int64_t high) {
  const auto* const data = static_cast<const int64_t*>(lengths.const_data_ptr());
  int64_t most = 0;
  for (int64_t i = 0; i < lengths.size(0); ++i) {
    STD_TORCH_CHECK(
        data[i] >= low && data[i] <= high, "shared_prefix_attention: ", name, "[", i, "] is ", data[i], ", expected ",
        low, " to ", high);
    most = std::max(most, data[i]);
  }
  return most;
}

// Whether this run multiplies pairs of bf16 numbers, sixteen pairs at a time, as they lie in memory.
bool can_multiply_pairs(ElementType type, int64_t head_size) {
  static const bool has_bf16_dot = cpu_has(CpuTrait::kBf16Dot);
  return has_bf16_dot && current_isa() == Isa::kAvx512 && type == ElementType::kBFloat16 && head_size % 32 == 0;
}

// Whether this run multiplies them in the tiles of AMX.
bool can_multiply_tiles(ElementType type) {
  static const bool has_bf16_dot = cpu_has(CpuTrait::kBf16Dot);
  return has_bf16_dot && can_use_amx() && type == ElementType::kBFloat16;
}

ScoreTransform transform_of(double scale, std::optional<double> softcap) {
  if (!softcap.has_value()) return {static_cast<float>(scale * kLog2E), 0.0f};
  return {static_cast<float>(scale / *softcap), static_cast<float>(*softcap * kLog2E)};
}

bool splits_evenly(int64_t rows, int64_t trees) { return trees == 0 ? rows == 0 : rows % trees == 0; }

bool fits(const AttentionArguments& x) {
  return are_in_shape(x.q, x.prefix_k, x.prefix_v, x.branch_k, x.branch_v) &&
         is_integers(x.prefix_len, {x.prefix_k.size(0)}) && is_integers(x.branch_len, {x.q.size(0)}) &&
         is_float_number(x.scale.value_or(1.0)) && is_softcap(x.softcap) && !(x.window.has_value() && *x.window < 1) &&
         (x.tree.has_value() ? is_integers(*x.tree, {x.q.size(0)}) : splits_evenly(x.q.size(0), x.prefix_k.size(0)));
}

}  // namespace

void check_attention(const AttentionArguments& arguments) { require_contract(fits(arguments), kOp); }

Tensor new_attention_output(const Tensor& q) {
  const int64_t size = q.size(3);
  const int64_t token = std::max<int64_t>(q.size(1), 1) * size;
  const int64_t strides[] = {std::max<int64_t>(q.size(2), 1) * token, size, token, 1};
  return new_strided_tensor_on(
      aoti_torch_device_type_cpu(), 0, {q.size(0), q.size(1), q.size(2), size}, strides, q.scalar_type());
}

SharedPrefixAttention::SharedPrefixAttention(const AttentionArguments& x, Tensor& out, Tensor& lse)
    : prefix_lens_(dense(x.prefix_len, ScalarType::Long)),
      branch_lens_(dense(x.branch_len, ScalarType::Long)),
      problem_{
          HeadRows(x.q),
          HeadRows(x.prefix_k),
          HeadRows(x.prefix_v),
          HeadRows(x.branch_k),
          HeadRows(x.branch_v),
          static_cast<const int64_t*>(prefix_lens_.const_data_ptr()),
          static_cast<const int64_t*>(branch_lens_.const_data_ptr()),
          element_type_of(x.q, kOp, "q"),
          static_cast<int64_t>(x.q.element_size()),
          transform_of(x.scale.value_or(std::pow(x.q.size(3), -0.5)), x.softcap),
          x.window.value_or(0),
          x.q.size(1),
          x.prefix_k.size(1),
          x.q.size(2),
          x.q.size(3),
          can_multiply_pairs(element_type_of(x.q, kOp, "q"), x.q.size(3)),
          can_multiply_tiles(element_type_of(x.q, kOp, "q")),
          static_cast<char*>(out.mutable_data_ptr()),
          static_cast<float*>(lse.mutable_data_ptr())} {
  if (lse.numel() == 0) return;
  const int64_t rows = x.q.size(0), trees = x.prefix_k.size(0), size = x.q.size(3);
  const int64_t prefix = check_lengths("prefix_len", prefix_lens_, 0, x.prefix_k.size(2));
  const int64_t branch = check_lengths("branch_len", branch_lens_, 0, x.branch_k.size(2));
  const int64_t products = 2 * lse.numel() * size * (prefix + branch);
  const int64_t positions = trees * prefix + rows * branch;
  const int64_t bytes = 2 * positions * problem_.num_kv_heads * size * problem_.element_size;
  threads_ = std::clamp<int64_t>(
      std::max(products / kProductsPerThread, bytes / kBytesPerThread), 1, torch::stable::get_num_threads());
  pieces_ = cut_into_pieces(problem_, rows, trees, dense(x.tree, ScalarType::Long), threads_);
  for (const Piece& piece : pieces_) {
    const double work = work_of(problem_, piece);
    middles_.push_back(work_ + work / 2);
    work_ += work;
  }
}

Range SharedPrefixAttention::pieces_of(const Member& member) const {
  // A piece belongs to the thread in whose share of the work its middle lies.
  const auto first_of = [&](int64_t number) -> int64_t {
    if (number == member.size()) return static_cast<int64_t>(pieces_.size());
    const double before = work_ * static_cast<double>(number) / static_cast<double>(member.size());
    return std::lower_bound(middles_.begin(), middles_.end(), before) - middles_.begin();
  };
  return {first_of(member.number()), first_of(member.number() + 1)};
}

void SharedPrefixAttention::add_runs(const Member& member, std::vector<MemoryRun>& runs) const {
  PieceWorker worker(problem_, room_of_thread());
  const Range own = pieces_of(member);
  for (int64_t i = own.begin; i < own.end; ++i) worker.add_runs(pieces_[i], runs);
}

void SharedPrefixAttention::run(const Member& member, ReadAhead& ahead) const {
  PieceWorker worker(problem_, room_of_thread());
  const Range own = pieces_of(member);
  for (int64_t i = own.begin; i < own.end; ++i) worker.run(pieces_[i], ahead);
}

std::tuple<Tensor, Tensor> attend(const AttentionArguments& arguments) {
  check_attention(arguments);
  const Tensor& q = arguments.q;
  Tensor out = new_attention_output(q);
  Tensor lse = new_tensor({q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  SharedPrefixAttention attention(arguments, out, lse);
  run_as_reading_team(
      attention.threads(), [&](const Member& member, auto& runs) { attention.add_runs(member, runs); },
      [&](const Member& member, ReadAhead& ahead) { attention.run(member, ahead); });
  return {out, lse};
}

std::tuple<Tensor, Tensor> shared_prefix_attention_cpu(
    const Tensor& q, const Tensor& prefix_k, const Tensor& prefix_v, const Tensor& prefix_len, const Tensor& branch_k,
    const Tensor& branch_v, const Tensor& branch_len, std::optional<double> scale, std::optional<double> softcap,
    std::optional<int64_t> window, const std::optional<Tensor>& tree) {
  return attend({q, prefix_k, prefix_v, prefix_len, branch_k, branch_v, branch_len, scale, softcap, window, tree});
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CPU, m) {
  m.impl("shared_prefix_attention", TORCH_BOX(&shared_prefix_attention_cpu));
}

}  // namespace tq
