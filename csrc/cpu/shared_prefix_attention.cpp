// shared_prefix_attention on CPU: one pass over the prefix of a tree for all its rows, and over the
// branch of each row, with one running softmax.
//
// The work is cut by (tree, key-value head, some rows); each query takes the same blocks of keys in
// the same order however it is cut, so its result depends on neither threads nor other rows.
#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "cpu/attention_rows.h"
#include "cpu/contract.h"
#include "cpu/tensor_access.h"

namespace tq {

namespace {

// Below this many queries of a row its branch is taken with a key in each lane.
constexpr int64_t kFewQueries = 8;
// A piece has about this many queries: enough to pay for widening the keys, and its queries and their
// output stay in the cache.
constexpr int64_t kQueriesPerPiece = 96;
// Products below which one thread is done before another is awake, about 15 us.
constexpr int64_t kProductsPerThread = int64_t{1} << 20;

// Rows of numbers with unit stride: [i, j, k] is where row k of head j of row or tree i begins.
class HeadRows {
 public:
  explicit HeadRows(const Tensor& tensor)
      : tensor_(with_unit_inner_stride(tensor)),
        data_(static_cast<const char*>(tensor_.const_data_ptr())),
        bytes_(static_cast<int64_t>(tensor_.element_size())),
        strides_{tensor_.stride(0), tensor_.stride(1), tensor_.stride(2)} {}
  const char* at(int64_t i, int64_t j, int64_t k) const {
    return data_ + (i * strides_[0] + j * strides_[1] + k * strides_[2]) * bytes_;
  }
  int64_t stride() const { return strides_[2]; }

 private:
  Tensor tensor_;  // keeps the data alive where it is a copy
  const char* data_;
  int64_t bytes_;
  int64_t strides_[3];
};

struct Problem {
  HeadRows q, prefix_k, prefix_v, branch_k, branch_v;
  const int64_t* prefix_len;
  const int64_t* branch_len;
  ElementType type;
  int64_t element_size;
  ScoreTransform transform;
  int64_t window;  // 0: none
  int64_t num_heads, num_kv_heads, num_queries, head_size;
  bool use_bf16_dot;
  char* out;
  float* lse;

  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t queries_per_row() const { return group() * num_queries; }
};

// Some rows of one tree, one key-value head.
struct Piece {
  int64_t tree;
  int64_t head;
  int64_t first_row;
  int64_t end_row;
};

// What one thread needs, sized for its largest piece and used again for the next.
class PieceWorker {
 public:
  explicit PieceWorker(const Problem& problem) : problem_(problem), width_(padded(problem.head_size)) {}

  void run(const Piece& piece) {
    start(piece);
    attend_prefix(piece);
    attend_branches(piece);
    finish(piece);
  }

 private:
  // Room on 64-byte boundaries, carved out of one allocation.
  template <typename Number>
  Number* carve(int64_t count) {
    static_assert(sizeof(Number) == sizeof(float));
    float* const begin = memory_ + used_;
    used_ += padded(count);
    return reinterpret_cast<Number*>(begin);
  }

  void start(const Piece& piece) {
    const int64_t count = (piece.end_row - piece.first_row) * problem_.queries_per_row();
    const int64_t block = kKeysPerBlock * width_;
    const int64_t needed =
        5 * count * width_ / 2 + 3 * padded(count) + count * 16 + 2 * block + 6 * kKeysPerBlock + 16 * width_;
    if (needed > capacity_) {
      storage_.reset(new float[needed + 16]);
      const auto address = reinterpret_cast<uintptr_t>(storage_.get());
      memory_ = storage_.get() + (64 - address % 64) % 64 / sizeof(float);
      capacity_ = needed;
    }
    used_ = 0;
    q_ = carve<float>(count * width_);
    first_seen_ = carve<int32_t>(count);
    end_seen_ = carve<int32_t>(count);
    q_pairs_ = problem_.use_bf16_dot ? carve<float>(count * width_ / 2) : nullptr;
    tile_ = {count, problem_.head_size, q_, q_pairs_, carve<float>(count * width_), carve<float>(count),
             carve<float>(count * 16), first_seen_, end_seen_};
    scratch_ = {carve<float>(block), carve<float>(block), carve<float>(6 * kKeysPerBlock), carve<float>(16 * width_)};

    const auto widen_padded = TQ_SELECT_ISA(widen_padded);
    for_each_query(piece, [&](int64_t m, int64_t row, int64_t head, int64_t t) {
      const char* const query = problem_.q.at(row, head, t);
      widen_padded(query, problem_.type, problem_.head_size, q_ + m * width_);
      if (q_pairs_ != nullptr) std::memcpy(q_pairs_ + m * width_ / 2, query, 2 * width_);
    });
    TQ_SELECT_ISA(start_queries)(tile_);
  }

  // Queries in the order (row, head of the group, t).
  template <typename Visit>
  void for_each_query(const Piece& piece, const Visit& visit) const {
    int64_t m = 0;
    for (int64_t row = piece.first_row; row < piece.end_row; ++row) {
      for (int64_t r = 0; r < problem_.group(); ++r) {
        for (int64_t t = 0; t < problem_.num_queries; ++t) visit(m++, row, piece.head * problem_.group() + r, t);
      }
    }
  }

  // The place of query t of a row in its own branch.
  int64_t place(int64_t row, int64_t t) const { return problem_.branch_len[row] - problem_.num_queries + t; }

  // The first position that the window leaves to a query at `position`.
  int32_t first_in_window(int64_t position) const {
    return problem_.window == 0 ? 0 : static_cast<int32_t>(std::max<int64_t>(0, position - problem_.window + 1));
  }

  void attend_prefix(const Piece& piece) {
    const int64_t length = problem_.prefix_len[piece.tree];
    int64_t least = length;
    for_each_query(piece, [&](int64_t m, int64_t row, int64_t, int64_t t) {
      first_seen_[m] = first_in_window(length + place(row, t));
      end_seen_[m] = static_cast<int32_t>(length);
      least = std::min<int64_t>(least, first_seen_[m]);
    });
    const KeySegment segment{
        problem_.prefix_k.at(piece.tree, piece.head, 0), problem_.prefix_v.at(piece.tree, piece.head, 0),
        problem_.prefix_k.stride(), problem_.prefix_v.stride(), problem_.type, length};
    attend(TQ_SELECT_ISA(attend_block), tile_, segment, least);
  }

  void attend_branches(const Piece& piece) {
    const int64_t each = problem_.queries_per_row();
    const auto attend_block = each < kFewQueries ? TQ_SELECT_ISA(attend_block_of_few) : TQ_SELECT_ISA(attend_block);
    for (int64_t row = piece.first_row; row < piece.end_row; ++row) {
      const int64_t first = (row - piece.first_row) * each;
      int64_t least = problem_.branch_len[row];
      for (int64_t m = 0; m < each; ++m) {
        const int64_t position = place(row, m % problem_.num_queries);
        first_seen_[first + m] = first_in_window(position);
        end_seen_[first + m] = static_cast<int32_t>(position + 1);
        least = std::min<int64_t>(least, first_seen_[first + m]);
      }
      QueryTile tile = tile_;
      tile.count = each;
      tile.q += first * width_;
      if (tile.q_pairs != nullptr) tile.q_pairs += first * width_ / 2;
      tile.out += first * width_;
      tile.peaks += first;
      tile.masses += first * 16;
      tile.first_seen += first;
      tile.end_seen += first;
      const KeySegment segment{
          problem_.branch_k.at(row, piece.head, 0), problem_.branch_v.at(row, piece.head, 0),
          problem_.branch_k.stride(), problem_.branch_v.stride(), problem_.type,
          problem_.branch_len[row]};
      attend(attend_block, tile, segment, least);
    }
  }

  // The block of the first key that any query sees is the first; blocks begin at multiples of their size.
  template <typename AttendBlock>
  void attend(AttendBlock attend_block, const QueryTile& tile, const KeySegment& segment, int64_t least) const {
    for (int64_t j = least / kKeysPerBlock * kKeysPerBlock; j < segment.end; j += kKeysPerBlock) {
      attend_block(tile, segment, j, std::min(j + kKeysPerBlock, segment.end), problem_.transform, scratch_);
    }
  }

  void finish(const Piece& piece) {
    const auto finish_query = TQ_SELECT_ISA(finish_query);
    for_each_query(piece, [&](int64_t m, int64_t row, int64_t head, int64_t t) {
      const int64_t at = (row * problem_.num_heads + head) * problem_.num_queries + t;
      finish_query(
          tile_, m, problem_.type, problem_.out + at * problem_.head_size * problem_.element_size,
          problem_.lse + at);
    });
  }

  const Problem& problem_;
  int64_t width_;
  std::unique_ptr<float[]> storage_;
  float* memory_ = nullptr;
  int64_t capacity_ = -1;
  int64_t used_ = 0;
  float* q_ = nullptr;
  float* q_pairs_ = nullptr;
  int32_t* first_seen_ = nullptr;
  int32_t* end_seen_ = nullptr;
  QueryTile tile_{};
  AttentionScratch scratch_{};
};

// The rows of each tree are neighbours: by `tree`, ascending, or equally many of each.
std::vector<Piece> cut_into_pieces(
    const Problem& problem, int64_t rows, int64_t trees, const std::optional<Tensor>& tree) {
  const int64_t rows_each = std::max<int64_t>(1, kQueriesPerPiece / std::max<int64_t>(1, problem.queries_per_row()));
  const int64_t* const tree_of_row = data_or_null<int64_t>(tree);
  std::vector<Piece> pieces;
  for (int64_t row = 0; row < rows;) {
    const int64_t g = tree_of_row == nullptr ? row / (rows / trees) : tree_of_row[row];
    STD_TORCH_CHECK(
        g >= 0 && g < trees, "shared_prefix_attention: tree[", row, "] is ", g, ", expected 0 to ", trees - 1);
    int64_t end = row;
    while (end < rows && (tree_of_row == nullptr ? end / (rows / trees) : tree_of_row[end]) == g) ++end;
    for (int64_t head = 0; head < problem.num_kv_heads; ++head) {
      for (int64_t first = row; first < end; first += rows_each) {
        pieces.push_back({g, head, first, std::min(first + rows_each, end)});
      }
    }
    row = end;
  }
  return pieces;
}

// q [N, H_q, T, d] beside the prefixes [G, H_kv, P, d] and the branches [N, H_kv, S, d], of one type.
bool are_in_shape(
    const Tensor& q, const Tensor& prefix_k, const Tensor& prefix_v, const Tensor& branch_k, const Tensor& branch_v) {
  if (q.dim() != 4 || prefix_k.dim() != 4 || branch_k.dim() != 4) return false;
  const int64_t heads = prefix_k.size(1);
  const int64_t size = q.size(3);
  const ScalarType type = q.scalar_type();
  return heads > 0 && q.size(1) % heads == 0 && prefix_k.size(3) == size &&
         has_shape(prefix_v, {prefix_k.size(0), heads, prefix_k.size(2), size}) &&
         has_shape(branch_k, {q.size(0), heads, branch_k.size(2), size}) &&
         has_shape(branch_v, {q.size(0), heads, branch_k.size(2), size}) && prefix_k.scalar_type() == type &&
         prefix_v.scalar_type() == type && branch_k.scalar_type() == type && branch_v.scalar_type() == type;
}

// A length beyond its buffer would be read beyond it.
void check_lengths(const char* name, const Tensor& lengths, int64_t low, int64_t high) {
  const auto* const data = static_cast<const int64_t*>(lengths.const_data_ptr());
  for (int64_t i = 0; i < lengths.size(0); ++i) {
    STD_TORCH_CHECK(
        data[i] >= low && data[i] <= high, "shared_prefix_attention: ", name, "[", i, "] is ", data[i], ", expected ",
        low, " to ", high);
  }
}

// Pairs of bf16 numbers, sixteen at a time, as they lie in memory.
bool can_multiply_pairs(ElementType type, int64_t head_size) {
  static const bool has_bf16_dot = cpu_has(CpuTrait::kBf16Dot);
  return has_bf16_dot && current_isa() == Isa::kAvx512 && type == ElementType::kBFloat16 && head_size % 32 == 0;
}

bool splits_evenly(int64_t rows, int64_t trees) { return trees == 0 ? rows == 0 : rows % trees == 0; }

}  // namespace

std::tuple<Tensor, Tensor> shared_prefix_attention_cpu(
    const Tensor& q, const Tensor& prefix_k, const Tensor& prefix_v, const Tensor& prefix_len,
    const Tensor& branch_k, const Tensor& branch_v, const Tensor& branch_len, double scale,
    std::optional<double> softcap, std::optional<int64_t> window, const std::optional<Tensor>& tree_in) {
  const char* const op = "shared_prefix_attention";
  require_contract(
      are_in_shape(q, prefix_k, prefix_v, branch_k, branch_v) && is_integers(prefix_len, {prefix_k.size(0)}) &&
          is_integers(branch_len, {q.size(0)}) && !(softcap.has_value() && !(*softcap > 0.0)) &&
          !(window.has_value() && *window < 1) &&
          (tree_in.has_value() ? is_integers(*tree_in, {q.size(0)}) : splits_evenly(q.size(0), prefix_k.size(0))),
      op);
  const Tensor prefix_lens = dense(prefix_len, ScalarType::Long);
  const Tensor branch_lens = dense(branch_len, ScalarType::Long);
  const std::optional<Tensor> tree = dense(tree_in, ScalarType::Long);
  const int64_t rows = q.size(0);
  Tensor out = new_tensor({rows, q.size(1), q.size(2), q.size(3)}, q.scalar_type());
  Tensor lse = new_tensor({rows, q.size(1), q.size(2)}, ScalarType::Float);
  const Problem problem{
      HeadRows(q),
      HeadRows(prefix_k),
      HeadRows(prefix_v),
      HeadRows(branch_k),
      HeadRows(branch_v),
      static_cast<const int64_t*>(prefix_lens.const_data_ptr()),
      static_cast<const int64_t*>(branch_lens.const_data_ptr()),
      element_type_of(q, op, "q"),
      static_cast<int64_t>(q.element_size()),
      {static_cast<float>(scale), static_cast<float>(softcap.value_or(0.0))},
      window.value_or(0),
      q.size(1),
      prefix_k.size(1),
      q.size(2),
      q.size(3),
      can_multiply_pairs(element_type_of(q, op, "q"), q.size(3)),
      static_cast<char*>(out.mutable_data_ptr()),
      static_cast<float*>(lse.mutable_data_ptr())};
  if (lse.numel() == 0) return {out, lse};
  check_lengths("prefix_len", prefix_lens, 0, prefix_k.size(2));
  check_lengths("branch_len", branch_lens, 0, branch_k.size(2));
  const std::vector<Piece> pieces = cut_into_pieces(problem, rows, prefix_k.size(0), tree);
  const int64_t num_pieces = static_cast<int64_t>(pieces.size());
  const int64_t products = 2 * lse.numel() * q.size(3) * (prefix_k.size(2) + branch_k.size(2));
  const int64_t grain = std::max<int64_t>(1, num_pieces * kProductsPerThread / std::max<int64_t>(products, 1));
  torch::stable::parallel_for(0, num_pieces, grain, [&](int64_t begin, int64_t end) {
    PieceWorker worker(problem);
    for (int64_t i = begin; i < end; ++i) worker.run(pieces[i]);
  });
  return {out, lse};
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CPU, m) {
  m.impl("shared_prefix_attention", TORCH_BOX(&shared_prefix_attention_cpu));
}

}  // namespace tq
