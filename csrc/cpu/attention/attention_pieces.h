// Attention on the torch side: pieces of the work, and the worker that runs them on its thread.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/attention/attention_amx_rows.h"
#include "cpu/attention/attention_rows.h"
#include "cpu/tensors/tensor_access.h"
#include "cpu/threads/team.h"

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

// Queries [first, end) of a piece that are of one row and key-value head. The first is at `first_place` of the
// branch, the last at `last_place`.
struct RowOfPiece {
  int64_t row;
  int64_t head;
  int64_t first;
  int64_t end;
  int64_t first_place;
  int64_t last_place;
};

template <typename Visit>
void for_each_row(const Problem& problem, const Piece& piece, const Visit& visit) {
  const int64_t each = problem.queries_per_row();
  for (int64_t first = 0; first < piece.count();) {
    const int64_t rows_before = (piece.first + first) / each;
    const int64_t in_row = (piece.first + first) % each;
    const int64_t end = std::min(piece.count(), first + each - in_row);
    const int64_t row = piece.tree_row + rows_before % piece.num_rows;
    const int64_t start = problem.branch_len[row] - problem.num_queries;
    visit(
        RowOfPiece{
            row, rows_before / piece.num_rows, first, end, start + in_row / problem.group(),
            start + (in_row + end - first - 1) / problem.group()});
    first = end;
  }
}

// Memory of one thread, sized for its largest piece so far and used again for the next.
struct PieceRoom {
  std::unique_ptr<float[]> storage;
  float* memory = nullptr;  // the storage from its first 64-byte boundary on
  int64_t capacity = -1;
  std::vector<KeySegment> branches;  // of each query
  std::vector<KeySegment> prefixes;  // of each query, where they are short
  std::vector<int32_t> first_seen;   // by each query, of the segment that is read
  std::vector<int32_t> end_seen;

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

  // Adds what run(piece) reads, in that order, where it lies dense.
  void add_runs(const Piece& piece, std::vector<MemoryRun>& runs) {
    read(
        piece, [](const auto&) {},
        [&](const std::vector<KeySegment>& segments, Range seen) {
          for (int64_t j = first_block(seen); j < seen.end; j += kKeysPerBlock) {
            for (size_t m = 0; m < segments.size(); ++m) {
              if (is_another(segments, m)) add_block_runs(segments[m], j, runs);
            }
          }
        },
        [&](int64_t, int64_t, const KeySegment& segment, Range seen) {
          for (int64_t j = first_block(seen); j < seen.end; j += kKeysPerBlock) add_block_runs(segment, j, runs);
        });
  }

  void run(const Piece& piece, ReadAhead& ahead) {
    start(piece);
    bool use_amx = problem_.use_amx && !problem_.is_short(piece.tree);
    use_amx ? start_amx() : TQ_SELECT_ISA(start_queries)(tile_);
    read(
        piece, [&](const auto& seen) { see(piece, seen); },
        [&](const std::vector<KeySegment>& segments, Range seen) {
          if (use_amx) unpack_amx();
          use_amx = false;
          attend_few(segments, seen, ahead);
        },
        [&](int64_t first, int64_t end, const KeySegment& segment, Range seen) {
          use_amx ? attend_amx(first, end, segment, seen, ahead)
                  : attend_vectors(part_of_tile(tile_, first, end), segment, seen, ahead);
        });
    if (use_amx) unpack_amx();
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
    const int64_t scores = kScoreRows * kKeysPerBlock;
    const int64_t vector_numbers = 2 * count * width_ + count * amx_width_ / 2 + padded(count + 16) + count * 16 +
                                   2 * block + scores + 16 * width_;
    const int64_t amx_numbers = padded(count) * (3 * amx_width_ / 2 + 2) + kKeysPerBlock * amx_width_ +
                                3 * kKeysPerBlock * kAmxQueries / 2 + amx_width_ * kAmxQueries;
    const int64_t needed = vector_numbers + (problem_.use_amx ? amx_numbers : 0);
    room_.reserve(needed);
    used_ = 0;
    room_.first_seen.resize(count);
    room_.end_seen.resize(count);
    q_ = carve<float>(count * width_);
    q_pairs_ = problem_.use_bf16_dot || problem_.use_amx ? carve<float>(count * amx_width_ / 2) : nullptr;
    tile_ = {
        count,
        problem_.head_size,
        q_,
        problem_.use_bf16_dot ? q_pairs_ : nullptr,
        carve<float>(count * width_),
        carve<float>(count + 16),
        carve<float>(count * 16),
        room_.first_seen.data(),
        room_.end_seen.data()};
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

  // The first position that the window leaves to a query at `position`.
  int64_t first_in_window(int64_t position) const {
    return problem_.window == 0 ? 0 : std::max<int64_t>(0, position - problem_.window + 1);
  }

  // Visits what the piece reads: the prefix, then the branches, either the segments of all queries together, by
  // few(segments, what one of them sees), or one segment of some queries, by segment(first, end, segment, what one of
  // them sees). Before it, see() is given the function from the place of a query to what that one sees.
  template <typename See, typename Few, typename Segment>
  void read(const Piece& piece, const See& see, const Few& few, const Segment& segment) {
    const bool are_few = problem_.queries_per_row() < kFewQueries;
    if (are_few) find_segments(piece);
    int64_t least = std::numeric_limits<int64_t>::max();
    int64_t most = 0;
    for_each_row(problem_, piece, [&](const RowOfPiece& part) {
      least = std::min(least, part.first_place);
      most = std::max(most, part.last_place);
    });
    const int64_t length = problem_.prefix_len[piece.tree];
    const auto of_prefix = [&](int64_t place) { return Range{first_in_window(length + place), length}; };
    const auto of_branch = [&](int64_t place) { return Range{first_in_window(place), place + 1}; };

    see(of_prefix);
    problem_.is_short(piece.tree) ? few(prefixes_, of_prefix(least))
                                  : segment(0, piece.count(), prefix_of(piece.tree, head_of(piece)), of_prefix(least));
    see(of_branch);
    if (are_few) return few(branches_, Range{of_branch(least).begin, of_branch(most).end});
    for_each_row(problem_, piece, [&](const RowOfPiece& part) {
      const Range seen{of_branch(part.first_place).begin, of_branch(part.last_place).end};
      segment(part.first, part.end, branch_of(part.row, part.head), seen);
    });
  }

  template <typename Seen>
  void see(const Piece& piece, const Seen& seen) {
    for_each_query(piece, [&](int64_t m, int64_t row, int64_t, int64_t, int64_t t) {
      const Range range = seen(problem_.branch_len[row] - problem_.num_queries + t);
      room_.first_seen[m] = static_cast<int32_t>(range.begin);
      room_.end_seen[m] = static_cast<int32_t>(range.end);
    });
  }

  // Blocks begin at multiples of their size.
  static int64_t first_block(Range seen) { return seen.begin / kKeysPerBlock * kKeysPerBlock; }

  static bool is_another(const std::vector<KeySegment>& segments, size_t m) {
    return m == 0 || segments[m].keys != segments[m - 1].keys;
  }

  void add_block_runs(const KeySegment& segment, int64_t first, std::vector<MemoryRun>& runs) const {
    const int64_t count = std::min(first + kKeysPerBlock, segment.end) - first;
    if (count <= 0 || !segment.is_dense(problem_.head_size)) return;
    const int64_t bytes = problem_.head_size * problem_.element_size;
    for (const char* const side : {segment.keys, segment.values}) {
      const char* const begin = side + first * bytes;
      runs.push_back({begin, begin + count * bytes});
    }
  }

  KeySegment segment_of(const HeadRows& keys, const HeadRows& values, int64_t i, int64_t head, int64_t end) const {
    return {keys.at(i, head, 0), values.at(i, head, 0), keys.stride(), values.stride(), problem_.type, end};
  }
  KeySegment prefix_of(int64_t tree, int64_t head) const {
    return segment_of(problem_.prefix_k, problem_.prefix_v, tree, head, problem_.prefix_len[tree]);
  }
  KeySegment branch_of(int64_t row, int64_t head) const {
    return segment_of(problem_.branch_k, problem_.branch_v, row, head, problem_.branch_len[row]);
  }

  void find_segments(const Piece& piece) {
    branches_.clear();
    prefixes_.clear();
    for_each_row(problem_, piece, [&](const RowOfPiece& part) {
      branches_.insert(branches_.end(), part.end - part.first, branch_of(part.row, part.head));
      if (!problem_.is_short(piece.tree)) return;
      prefixes_.insert(prefixes_.end(), part.end - part.first, prefix_of(piece.tree, part.head));
    });
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
        room_.first_seen.data(),
        room_.end_seen.data()};
    amx_scratch_ = {
        carve<float>(kKeysPerBlock * width / 2), carve<float>(kKeysPerBlock * width / 2),
        carve<float>(kKeysPerBlock * kAmxQueries), carve<float>(kKeysPerBlock * kAmxQueries / 2),
        carve<float>(width * kAmxQueries)};
    avx512::start_amx_queries(amx_, q_pairs_);
  }
  void attend_amx(int64_t first, int64_t end, const KeySegment& segment, Range seen, ReadAhead& ahead) const {
    avx512::attend_amx_segment(
        amx_, first, end, segment, first_block(seen), seen.end, problem_.transform, amx_scratch_, ahead);
  }
  void unpack_amx() const { avx512::unpack_amx_queries(amx_, tile_); }
#else
  // problem_.use_amx is false, so none of these is called.
  void start_amx() {}
  void attend_amx(int64_t, int64_t, const KeySegment&, Range, ReadAhead&) const {}
  void unpack_amx() const {}
#endif

  // The leading queries whose keys have ended are left out of the blocks that follow.
  void attend_vectors(const QueryTile& tile, const KeySegment& segment, Range seen, ReadAhead& ahead) const {
    const auto attend_block = TQ_SELECT_ISA(attend_block);
    int64_t ended = 0;
    for (int64_t j = first_block(seen); j < seen.end; j += kKeysPerBlock) {
      while (tile.end_seen[ended] <= j) ++ended;
      attend_block(
          part_of_tile(tile, ended, tile.count), segment, j, std::min(j + kKeysPerBlock, segment.end),
          problem_.transform, scratch_, ahead);
    }
  }

  void attend_few(const std::vector<KeySegment>& segments, Range seen, ReadAhead& ahead) const {
    const auto attend_block = TQ_SELECT_ISA(attend_block_of_few);
    for (int64_t j = first_block(seen); j < seen.end; j += kKeysPerBlock) {
      attend_block(tile_, segments.data(), j, problem_.transform, scratch_, ahead);
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
  std::vector<KeySegment>& branches_;
  std::vector<KeySegment>& prefixes_;
  QueryTile tile_{};
  AttentionScratch scratch_{};
  AmxQueries amx_{};
  AmxScratch amx_scratch_{};
};

}  // namespace tq
