// shared_prefix_attention on CPU: one pass over the prefix of a tree for all its rows, and over the
// branch of each row, with one running softmax.
//
// The work is cut by (tree, key-value head, some queries); each query takes the same blocks of keys
// in the same order however it is cut, so its result depends on neither threads nor other rows.
#include <algorithm>
#include <atomic>
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
// A piece has at most about this many queries, which with their output stay in the cache ...
constexpr int64_t kQueriesPerPiece = 256;
// ... and, where there are too few pieces for the threads, not much fewer than these: they share the
// transposing of the keys.
constexpr int64_t kQueriesToShare = 48;
constexpr double kLog2E = 1.4426950408889634;
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

// Some queries of one tree, one key-value head: those from `first` to `end` of [rows, T, group], the
// rows counted from the tree's first.
struct Piece {
  int64_t tree;
  int64_t head;
  int64_t tree_row;
  int64_t first;
  int64_t end;

  int64_t count() const { return end - first; }
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
    const int64_t count = piece.count();
    const int64_t block = kKeysPerBlock * width_;
    const int64_t scores = 12 * kKeysPerBlock;
    const int64_t needed =
        5 * count * width_ / 2 + 3 * padded(count + 16) + count * 16 + 2 * block + scores + 16 * width_;
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
    tile_ = {count, problem_.head_size, q_, q_pairs_, carve<float>(count * width_), carve<float>(count + 16),
             carve<float>(count * 16), first_seen_, end_seen_};
    scratch_ = {carve<float>(block), carve<float>(block), carve<float>(scores), carve<float>(16 * width_)};

    const auto widen_padded = TQ_SELECT_ISA(widen_padded);
    for_each_query(piece, [&](int64_t m, int64_t row, int64_t head, int64_t t) {
      const char* const query = problem_.q.at(row, head, t);
      widen_padded(query, problem_.type, problem_.head_size, q_ + m * width_);
      if (q_pairs_ != nullptr) std::memcpy(q_pairs_ + m * width_ / 2, query, 2 * width_);
    });
    TQ_SELECT_ISA(start_queries)(tile_);
  }

  // Places of a row's queries ascend: [T, group].
  template <typename Visit>
  void for_each_query(const Piece& piece, const Visit& visit) const {
    const int64_t each = problem_.queries_per_row();
    for (int64_t i = piece.first; i < piece.end; ++i) {
      const int64_t in_row = i % each;
      visit(i - piece.first, piece.tree_row + i / each, piece.head * problem_.group() + in_row % problem_.group(),
            in_row / problem_.group());
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
    for_each_query(piece, [&](int64_t m, int64_t row, int64_t, int64_t t) {
      first_seen_[m] = first_in_window(length + place(row, t));
      end_seen_[m] = static_cast<int32_t>(length);
    });
    const KeySegment segment{
        problem_.prefix_k.at(piece.tree, piece.head, 0), problem_.prefix_v.at(piece.tree, piece.head, 0),
        problem_.prefix_k.stride(), problem_.prefix_v.stride(), problem_.type, length};
    attend(tile_, segment);
  }

  void attend_branches(const Piece& piece) {
    const int64_t each = problem_.queries_per_row();
    segments_.clear();
    for_each_query(piece, [&](int64_t m, int64_t row, int64_t, int64_t t) {
      first_seen_[m] = first_in_window(place(row, t));
      end_seen_[m] = static_cast<int32_t>(place(row, t) + 1);
      segments_.push_back(
          {problem_.branch_k.at(row, piece.head, 0), problem_.branch_v.at(row, piece.head, 0),
           problem_.branch_k.stride(), problem_.branch_v.stride(), problem_.type, problem_.branch_len[row]});
    });
    if (each < kFewQueries) return attend_few();
    for (int64_t first = 0; first < piece.count();) {
      const int64_t end = std::min(piece.count(), first + each - (piece.first + first) % each);
      attend(part_of_tile(tile_, first, end), segments_[first]);
      first = end;
    }
  }

  // Blocks begin at multiples of their size. A query that sees nothing of a block may be left out of it;
  // those whose keys have ended are, where they come first.
  void attend(const QueryTile& tile, const KeySegment& segment) const {
    const auto attend_block = TQ_SELECT_ISA(attend_block);
    const int64_t least = *std::min_element(tile.first_seen, tile.first_seen + tile.count);
    const int64_t most = *std::max_element(tile.end_seen, tile.end_seen + tile.count);
    int64_t ended = 0;
    for (int64_t j = least / kKeysPerBlock * kKeysPerBlock; j < most; j += kKeysPerBlock) {
      while (tile.end_seen[ended] <= j) ++ended;
      attend_block(
          part_of_tile(tile, ended, tile.count), segment, j, std::min(j + kKeysPerBlock, segment.end),
          problem_.transform, scratch_);
    }
  }

  void attend_few() const {
    const auto attend_block = TQ_SELECT_ISA(attend_block_of_few);
    const int64_t least = *std::min_element(tile_.first_seen, tile_.first_seen + tile_.count);
    const int64_t most = *std::max_element(tile_.end_seen, tile_.end_seen + tile_.count);
    for (int64_t j = least / kKeysPerBlock * kKeysPerBlock; j < most; j += kKeysPerBlock) {
      attend_block(tile_, segments_.data(), j, problem_.transform, scratch_);
    }
  }

  // The queries [first, end) of a tile.
  QueryTile part_of_tile(const QueryTile& whole, int64_t first, int64_t end) const {
    QueryTile tile = whole;
    tile.count = end - first;
    tile.q += first * width_;
    if (tile.q_pairs != nullptr) tile.q_pairs += first * width_ / 2;
    tile.out += first * width_;
    tile.peaks += first;
    tile.masses += first * 16;
    tile.first_seen += first;
    tile.end_seen += first;
    return tile;
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
  std::vector<KeySegment> segments_;  // the branch of each query
  QueryTile tile_{};
  AttentionScratch scratch_{};
};

// The rows of each tree are neighbours: by `tree`, ascending, or equally many of each.
std::vector<Piece> cut_into_pieces(
    const Problem& problem, int64_t rows, int64_t trees, const std::optional<Tensor>& tree, int64_t threads) {
  const int64_t share = rows * problem.queries_per_row() * problem.num_kv_heads / (2 * threads);
  const int64_t most = std::min(std::max(share, kQueriesToShare), kQueriesPerPiece);
  const int64_t* const tree_of_row = data_or_null<int64_t>(tree);
  std::vector<Piece> pieces;
  for (int64_t row = 0; row < rows;) {
    const int64_t g = tree_of_row == nullptr ? row / (rows / trees) : tree_of_row[row];
    STD_TORCH_CHECK(
        g >= 0 && g < trees, "shared_prefix_attention: tree[", row, "] is ", g, ", expected 0 to ", trees - 1);
    int64_t end = row;
    while (end < rows && (tree_of_row == nullptr ? end / (rows / trees) : tree_of_row[end]) == g) ++end;
    const int64_t count = (end - row) * problem.queries_per_row();
    const int64_t cuts = std::max<int64_t>((count + most - 1) / most, 1);
    for (int64_t head = 0; head < problem.num_kv_heads; ++head) {
      for (int64_t cut = 0; cut < cuts; ++cut) {
        pieces.push_back({g, head, row, count * cut / cuts, count * (cut + 1) / cuts});
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

ScoreTransform transform_of(double scale, std::optional<double> softcap) {
  if (!softcap.has_value()) return {static_cast<float>(scale * kLog2E), 0.0f};
  return {static_cast<float>(scale / *softcap), static_cast<float>(*softcap * kLog2E)};
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
      transform_of(scale, softcap),
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
  const int64_t products = 2 * lse.numel() * q.size(3) * (prefix_k.size(2) + branch_k.size(2));
  const int64_t threads = std::clamp<int64_t>(products / kProductsPerThread, 1, torch::stable::get_num_threads());
  const std::vector<Piece> pieces = cut_into_pieces(problem, rows, prefix_k.size(0), tree, threads);
  // Whoever is free takes the next one: they differ in size.
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    PieceWorker worker(problem);
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < pieces.size();) worker.run(pieces[i]);
  });
  return {out, lse};
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CPU, m) {
  m.impl("shared_prefix_attention", TORCH_BOX(&shared_prefix_attention_cpu));
}

}  // namespace tq
