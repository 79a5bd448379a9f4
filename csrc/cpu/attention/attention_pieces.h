// Attention on the torch side: pieces of the work, and the worker that runs them on its thread.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/attention/attention_amx_rows.h"
#include "cpu/attention/attention_rows.h"
#include "cpu/tensors/tensor_access.h"

namespace tq {

// With fewer queries a row than this, a branch is attended to by dot products, one a key.
constexpr int64_t kFewQueries = 8;
// With so few queries, a prefix of up to this many keys is attended to in the same way: transposing its
// keys would cost more than it saves.
constexpr int64_t kShortPrefix = 16;

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
  bool use_amx;
  char* out;   // [N, T, H_q, d]
  float* lse;  // [N, H_q, T]

  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t queries_per_row() const { return group() * num_queries; }
  bool is_short(int64_t tree) const { return prefix_len[tree] <= kShortPrefix && queries_per_row() < kFewQueries; }
};

// Some queries of one tree: the queries from `first` to `end` of [H_kv, num_rows, T, group], in the rows
// from tree_row on. They share one key-value head, unless each row has few queries and the prefix is short.
struct Piece {
  int64_t tree;
  int64_t tree_row;
  int64_t num_rows;
  int64_t first;
  int64_t end;

  int64_t count() const { return end - first; }
};

// Memory of one thread, sized for its largest piece so far and used again for the next.
struct PieceRoom {
  std::unique_ptr<float[]> storage;
  float* memory = nullptr;  // the storage from its first 64-byte boundary on
  int64_t capacity = -1;
  std::vector<KeySegment> branches;  // of each query
  std::vector<KeySegment> prefixes;  // of each query, where they are short

  void reserve(int64_t count) {
    if (count <= capacity) return;
    storage.reset(new float[count + 16]);
    const auto address = reinterpret_cast<uintptr_t>(storage.get());
    memory = storage.get() + (64 - address % 64) % 64 / sizeof(float);
    capacity = count;
  }
};

// Runs pieces, one after the other, in the memory of its thread.
class PieceWorker {
 public:
  PieceWorker(const Problem& problem, PieceRoom& room)
      : problem_(problem),
        room_(room),
        width_(padded(problem.head_size)),
        amx_width_(padded_for_amx(problem.head_size)),
        group_(problem.group()),
        branches_(room.branches),
        prefixes_(room.prefixes) {}

  // `next` is likely to be run after it; null: none is.
  void run(const Piece& piece, const Piece* next) {
    start(piece);
    if (next != nullptr) prefix_to_come_ = prefix_of(next->tree, head_of(*next), nullptr);
    find_branches(piece, next != nullptr ? &prefix_to_come_ : nullptr);
    use_amx_ = problem_.use_amx && !problem_.is_short(piece.tree);
    use_amx_ ? start_amx() : TQ_SELECT_ISA(start_queries)(tile_);
    attend_prefix(piece);
    attend_branches(piece);
    finish(piece);
  }

 private:
  // Room on 64-byte boundaries, carved out of one allocation.
  template <typename Number>
  Number* carve(int64_t count) {
    static_assert(sizeof(Number) == sizeof(float));
    float* const begin = room_.memory + used_;
    used_ += padded(count);
    return reinterpret_cast<Number*>(begin);
  }

  void start(const Piece& piece) {
    const int64_t count = piece.count();
    const int64_t block = kKeysPerBlock * width_;
    const int64_t scores = 12 * kKeysPerBlock;
    const int64_t vector_numbers = 2 * count * width_ + count * amx_width_ / 2 + 3 * padded(count + 16) + count * 16 +
                                   2 * block + scores + 16 * width_;
    const int64_t amx_numbers = padded(count) * (3 * amx_width_ / 2 + 2) + kAmxKeys * amx_width_ +
                                3 * kAmxKeys * kAmxQueries / 2 + amx_width_ * kAmxQueries;
    const int64_t needed = vector_numbers + (problem_.use_amx ? amx_numbers : 0);
    room_.reserve(needed);
    used_ = 0;
    q_ = carve<float>(count * width_);
    first_seen_ = carve<int32_t>(count);
    end_seen_ = carve<int32_t>(count);
    q_pairs_ = problem_.use_bf16_dot || problem_.use_amx ? carve<float>(count * amx_width_ / 2) : nullptr;
    tile_ = {
        count,
        problem_.head_size,
        q_,
        problem_.use_bf16_dot ? q_pairs_ : nullptr,
        carve<float>(count * width_),
        carve<float>(count + 16),
        carve<float>(count * 16),
        first_seen_,
        end_seen_};
    scratch_ = {carve<float>(block), carve<float>(block), carve<float>(scores), carve<float>(16 * width_)};

    const auto widen_padded = TQ_SELECT_ISA(widen_padded);
    for_each_query(piece, [&](int64_t m, int64_t row, int64_t, int64_t head, int64_t t) {
      const char* const query = problem_.q.at(row, head, t);
      widen_padded(query, problem_.type, problem_.head_size, q_ + m * width_);
      if (q_pairs_ != nullptr) copy_pairs(query, q_pairs_ + m * amx_width_ / 2);
    });
  }

  // visit(m, row, key-value head, query head, t) for query m of the piece.
  template <typename Visit>
  void for_each_query(const Piece& piece, const Visit& visit) const {
    const int64_t end_row = piece.tree_row + piece.num_rows;
    const int64_t in_row = piece.first % problem_.queries_per_row();
    int64_t head = head_of(piece);
    int64_t row = piece.tree_row + piece.first / problem_.queries_per_row() % piece.num_rows;
    int64_t t = in_row / group_;
    int64_t in_group = in_row % group_;
    for (int64_t m = 0; m < piece.count(); ++m) {
      visit(m, row, head, head * group_ + in_group, t);
      if (++in_group < group_) continue;
      in_group = 0;
      if (++t < problem_.num_queries) continue;
      t = 0;
      if (++row < end_row) continue;
      row = piece.tree_row;
      ++head;
    }
  }

  // The key-value head of the first query.
  int64_t head_of(const Piece& piece) const { return piece.first / (piece.num_rows * problem_.queries_per_row()); }

  // The place of query t of a row in its own branch.
  int64_t place(int64_t row, int64_t t) const { return problem_.branch_len[row] - problem_.num_queries + t; }

  // The first position that the window leaves to a query at `position`.
  int32_t first_in_window(int64_t position) const {
    return problem_.window == 0 ? 0 : static_cast<int32_t>(std::max<int64_t>(0, position - problem_.window + 1));
  }

  void attend_prefix(const Piece& piece) {
    const int64_t length = problem_.prefix_len[piece.tree];
    prefixes_.clear();
    for_each_query(piece, [&](int64_t m, int64_t row, int64_t head, int64_t, int64_t t) {
      if (problem_.is_short(piece.tree)) prefixes_.push_back(prefix_of(piece.tree, head, branches_.data()));
      first_seen_[m] = first_in_window(length + place(row, t));
      end_seen_[m] = static_cast<int32_t>(length);
    });
    if (!prefixes_.empty()) return attend_few(prefixes_.data());
    attend(0, tile_.count, prefix_of(piece.tree, head_of(piece), branches_.data()));
  }

  KeySegment prefix_of(int64_t tree, int64_t head, const KeySegment* then) const {
    return {
        problem_.prefix_k.at(tree, head, 0),
        problem_.prefix_v.at(tree, head, 0),
        problem_.prefix_k.stride(),
        problem_.prefix_v.stride(),
        problem_.type,
        problem_.prefix_len[tree],
        then};
  }

  void find_branches(const Piece& piece, const KeySegment* then) {
    branches_.clear();
    for_each_query(piece, [&](int64_t, int64_t row, int64_t head, int64_t, int64_t) {
      branches_.push_back(
          {problem_.branch_k.at(row, head, 0), problem_.branch_v.at(row, head, 0), problem_.branch_k.stride(),
           problem_.branch_v.stride(), problem_.type, problem_.branch_len[row], then});
    });
    // Queries of one row are neighbours and share its branch.
    for (size_t m = branches_.size() - 1; m > 0; --m) {
      const bool is_same = branches_[m - 1].keys == branches_[m].keys;
      branches_[m - 1].then = is_same ? branches_[m].then : &branches_[m];
    }
  }

  void attend_branches(const Piece& piece) {
    const int64_t each = problem_.queries_per_row();
    for_each_query(piece, [&](int64_t m, int64_t row, int64_t, int64_t, int64_t t) {
      first_seen_[m] = first_in_window(place(row, t));
      end_seen_[m] = static_cast<int32_t>(place(row, t) + 1);
    });
    if (each < kFewQueries) {
      if (use_amx_) unpack_amx();
      return attend_few(branches_.data());
    }
    for (int64_t first = 0; first < piece.count();) {
      const int64_t end = std::min(piece.count(), first + each - (piece.first + first) % each);
      attend(first, end, branches_[first]);
      first = end;
    }
    if (use_amx_) unpack_amx();
  }

  // Takes the keys that they see of a segment into the queries [first, end).
  void attend(int64_t first, int64_t end, const KeySegment& segment) const {
    if (use_amx_) return attend_amx(first, end, segment);
    attend_vectors(part_of_tile(tile_, first, end), segment);
  }

  void copy_pairs(const char* from, float* to) const {
    std::memcpy(to, from, 2 * problem_.head_size);
    std::memset(reinterpret_cast<char*>(to) + 2 * problem_.head_size, 0, 2 * (amx_width_ - problem_.head_size));
  }

#if TQ_HAS_X86_VARIANTS
  void start_amx() {
    const int64_t count = padded(tile_.count);
    const int64_t width = amx_width_;
    amx_ = {
        tile_.count,
        problem_.head_size,
        width,
        carve<float>(count * width / 2),
        carve<float>(count * width),
        carve<float>(count),
        carve<float>(count),
        first_seen_,
        end_seen_};
    amx_scratch_ = {
        carve<float>(kAmxKeys * width / 2), carve<float>(kAmxKeys * width / 2), carve<float>(kAmxKeys * kAmxQueries),
        carve<float>(kAmxKeys * kAmxQueries / 2), carve<float>(width * kAmxQueries)};
    avx512::start_amx_queries(amx_, q_pairs_);
  }
  void attend_amx(int64_t first, int64_t end, const KeySegment& segment) const {
    avx512::attend_amx_segment(amx_, first, end, segment, problem_.transform, amx_scratch_);
  }
  void unpack_amx() const { avx512::unpack_amx_queries(amx_, tile_); }
#else
  // problem_.use_amx is false, so none of these is called.
  void start_amx() {}
  void attend_amx(int64_t, int64_t, const KeySegment&) const {}
  void unpack_amx() const {}
#endif

  // Blocks begin at multiples of their size. The leading queries whose keys have ended are left out of the
  // blocks that follow.
  void attend_vectors(const QueryTile& tile, const KeySegment& segment) const {
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

  void attend_few(const KeySegment* segments) const {
    const auto attend_block = TQ_SELECT_ISA(attend_block_of_few);
    const int64_t least = *std::min_element(tile_.first_seen, tile_.first_seen + tile_.count);
    const int64_t most = *std::max_element(tile_.end_seen, tile_.end_seen + tile_.count);
    for (int64_t j = least / kKeysPerBlock * kKeysPerBlock; j < most; j += kKeysPerBlock) {
      attend_block(tile_, segments, j, problem_.transform, scratch_);
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
    for_each_query(piece, [&](int64_t m, int64_t row, int64_t, int64_t head, int64_t t) {
      const int64_t at = (row * problem_.num_queries + t) * problem_.num_heads + head;
      finish_query(
          tile_, m, problem_.type, problem_.out + at * problem_.head_size * problem_.element_size,
          problem_.lse + (row * problem_.num_heads + head) * problem_.num_queries + t);
    });
  }

  const Problem& problem_;
  PieceRoom& room_;
  int64_t width_;
  int64_t amx_width_;
  int64_t group_;
  int64_t used_ = 0;
  float* q_ = nullptr;
  float* q_pairs_ = nullptr;
  int32_t* first_seen_ = nullptr;
  int32_t* end_seen_ = nullptr;
  std::vector<KeySegment>& branches_;
  std::vector<KeySegment>& prefixes_;
  KeySegment prefix_to_come_{};
  QueryTile tile_{};
  AttentionScratch scratch_{};
  bool use_amx_ = false;
  AmxQueries amx_{};
  AmxScratch amx_scratch_{};
};

}  // namespace tq
