#include "cpu/linear/linear_rows.h"

#include "cpu/linear/linear_amx.h"
#include "cpu/linear/linear_amx_int8.h"
#include "cpu/linear/linear_many.h"

namespace tq {
namespace TQ_ISA {

namespace {

// The most rows of x in a tile, and the weight rows beside so many: the sums, and what one step loads, fill
// the registers. A product of one row is limited by memory, which likes a single stream.
#if defined(__AVX512F__)
constexpr int kMostTileRows = 12;
constexpr int tile_weight_rows(int tile_rows) { return tile_rows == 1 ? 1 : tile_rows <= 6 ? 4 : 2; }
#else
constexpr int kMostTileRows = 3;
constexpr int tile_weight_rows(int tile_rows) { return tile_rows == 1 ? 1 : 2; }
#endif

// Rows of x that stay in the first-level cache while the weights stream by.
constexpr int64_t kGroupRows = 12;
// Bytes of a panel of weights, which groups of rows share from the second-level cache; what is fetched ahead of a
// panel is its beginning.
constexpr int64_t kPanelBytes = 1 << 17;
constexpr int64_t kLeastPanelRows = 16;
constexpr int64_t kMostPanelRows = 64;

// Packs x block by block, and in each block row by row.
template <typename Step>
void pack_typed(const FewRowsProduct& product, const void* x, int64_t x_stride, void* to) {
  const Blocks blocks = blocks_of<Step>(product.size_in);
  auto* out = static_cast<typename Step::Packed*>(to);
  const auto pack_step = [&](const typename Step::Stored* from) {
    for (int part = 0; part < Step::kParts; ++part, out += Step::kPartSize) {
      Step::store_packed(out, Step::load_stored(from, part));
    }
  };
  for (int64_t first = 0; first < blocks.whole; first += blocks.size) {
    const int64_t last = first + blocks.size < blocks.whole ? first + blocks.size : blocks.whole;
    for (int64_t row = 0; row < product.rows; ++row) {
      const auto* const from = static_cast<const typename Step::Stored*>(x) + row * x_stride;
      for (int64_t i = first; i < last; i += Step::kColumns) pack_step(from + i);
    }
  }
  for (int64_t row = 0; blocks.whole < product.size_in && row < product.rows; ++row) {
    const auto* const from = static_cast<const typename Step::Stored*>(x) + row * x_stride;
    pack_step(PaddedStep<Step>(from + blocks.whole, product.size_in - blocks.whole).values);
  }
}

// The operands of add_four: four weight rows and as many rows of x as its template argument says, over one
// block.
template <typename Step>
struct Operands {
  const typename Step::Stored* weights[kWeightRowsPerTile];
  FetchedBeside fetched;
  const typename Step::Packed* x;
  int64_t count;  // columns, and the distance between rows of x
  bool is_first_block;
};

// sums[m * kMostPanelRows + r] (+)= weight row r times row m of x.
template <typename Step, int kRows>
void add_four(const Operands<Step>& operands, float* sums) {
  constexpr int kWeights = tile_weight_rows(kRows);
  for (int64_t w = 0; w < kWeightRowsPerTile; w += kWeights) {
    alignas(64) float found[(kWeights * kRows + 3) / 4 * 4];
    const FetchedBeside fetched{
        operands.fetched.from + w * (operands.count / Step::kColumns) * operands.fetched.step, operands.fetched.step};
    multiply_tile<Step, kWeights, kRows>(
        operands.weights + w, fetched, operands.x, operands.count, operands.count, found);
    for (int m = 0; m < kRows; ++m) {
      float* const to = sums + m * kMostPanelRows + w;
      for (int r = 0; r < kWeights; ++r) {
        to[r] = operands.is_first_block ? found[m * kWeights + r] : to[r] + found[m * kWeights + r];
      }
    }
  }
}

template <typename Step>
using AddFour = void (*)(const Operands<Step>&, float*);

template <typename Step>
AddFour<Step> add_four_for(int64_t rows) {
  static constexpr AddFour<Step> kFunctions[kMostTileRows] = {
      add_four<Step, 1>, add_four<Step, 2>,  add_four<Step, 3>,
#if defined(__AVX512F__)
      add_four<Step, 4>, add_four<Step, 5>,  add_four<Step, 6>,  add_four<Step, 7>,  add_four<Step, 8>,
      add_four<Step, 9>, add_four<Step, 10>, add_four<Step, 11>, add_four<Step, 12>,
#endif
  };
  return kFunctions[rows - 1];
}

// One thread's share of a product, in panels of weight rows. Each panel meets all rows of x, in groups.
template <typename Step>
class Share {
 public:
  Share(const FewRowsProduct& product, int64_t begin, int64_t end)
      : product_(product),
        blocks_(blocks_of<Step>(product.size_in)),
        weight_(static_cast<const typename Step::Stored*>(product.weight)),
        begin_(begin),
        end_(end),
        num_groups_((product.rows + kGroupRows - 1) / kGroupRows),
        panel_rows_(panel_rows_for(product.size_in)) {}

  void multiply() {
    for (int64_t panel = begin_; panel < end_; panel += panel_rows_) {
      for (int64_t group = 0; group < num_groups_; ++group) multiply_panel(panel, group);
    }
  }

 private:
  static int64_t panel_rows_for(int64_t size_in) {
    const int64_t row_bytes = (size_in > 0 ? size_in : 1) * static_cast<int64_t>(sizeof(typename Step::Stored));
    const int64_t fitting = kPanelBytes / row_bytes / kWeightRowsPerTile * kWeightRowsPerTile;
    return fitting < kLeastPanelRows ? kLeastPanelRows : fitting > kMostPanelRows ? kMostPanelRows : fitting;
  }

  void multiply_panel(int64_t panel, int64_t group) {
    const int64_t begin = part_begin(product_.rows, num_groups_, group);
    const int64_t end = part_begin(product_.rows, num_groups_, group + 1);
    const int64_t last = panel + panel_rows_ < end_ ? panel + panel_rows_ : end_;
    alignas(64) float sums[kGroupRows * kMostPanelRows];
    for (int64_t i = 0; blocks_.count == 0 && i < kGroupRows * kMostPanelRows; ++i) sums[i] = 0.0f;
    for (int64_t block = 0; block < blocks_.count; ++block) {
      for (int64_t row = panel; row < last; row += kWeightRowsPerTile) {
        Operands<Step> operands{};
        for (int64_t r = 0; r < kWeightRowsPerTile; ++r) {
          // Rows beyond the last are the last row again; their sums are not used.
          operands.weights[r] = weight_ + (row + r < last ? row + r : last - 1) * product_.weight_stride;
        }
        operands.is_first_block = block == 0;
        // Groups of rows share the fetching, so that memory is never idle.
        const bool fetches = ((row - panel) / kWeightRowsPerTile + group) % num_groups_ == 0;
        multiply_block(operands, block, begin, end, fetches ? product_.ahead : nullptr, sums + (row - panel));
      }
    }
    finish_rows<typename Step::Element>(product_, begin, end, panel, last, sums, kMostPanelRows);
  }

  // Multiplies four weight rows, given by their first column, by the rows [begin, end) of x, and fetches as much.
  void multiply_block(
      Operands<Step>& operands, int64_t block, int64_t begin, int64_t end, ReadAhead* ahead, float* sums) {
    int64_t first = block * blocks_.size;
    operands.count = blocks_.whole - first < blocks_.size ? blocks_.whole - first : blocks_.size;
    if (operands.count > 0) {
      for (auto& weights : operands.weights) weights += first;
      return multiply_rows(operands, first, begin, end, ahead, sums);
    }
    first = blocks_.whole;
    const int64_t rest = product_.size_in - first;
    const auto& rows = operands.weights;
    const PaddedStep<Step> padded[kWeightRowsPerTile] = {
        {rows[0] + first, rest}, {rows[1] + first, rest}, {rows[2] + first, rest}, {rows[3] + first, rest}};
    for (int64_t r = 0; r < kWeightRowsPerTile; ++r) operands.weights[r] = padded[r].values;
    operands.count = Step::kColumns;
    multiply_rows(operands, first, begin, end, nullptr, sums);
  }

  // Multiplies the rows [begin, end) of x, tile by tile.
  void multiply_rows(
      Operands<Step>& operands, int64_t first, int64_t begin, int64_t end, ReadAhead* ahead, float* sums) {
    const auto* const x = static_cast<const typename Step::Packed*>(product_.packed_x) + first * product_.rows;
    const int64_t num_tiles = (end - begin + kMostTileRows - 1) / kMostTileRows;
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t from = part_begin(end - begin, num_tiles, tile);
      const int64_t to = part_begin(end - begin, num_tiles, tile + 1);
      operands.x = x + (begin + from) * operands.count;
      operands.fetched = fetched_beside(operands, tile == 0 ? ahead : nullptr);
      add_four_for<Step>(to - from)(operands, sums + from * kMostPanelRows);
    }
  }

  // What is fetched while four weight rows are multiplied: as many lines of memory as they are made from.
  FetchedBeside fetched_beside(const Operands<Step>& operands, ReadAhead* ahead) const {
    if (ahead != nullptr) {
      const int64_t lines = kWeightRowsPerTile * operands.count / Step::kColumns / product_.ahead_part;
      const char* const from = ahead->take(lines);
      if (from != nullptr) return {from, kCacheLine / product_.ahead_part};
    }
    return {reinterpret_cast<const char*>(operands.weights[0]), 0};
  }

  const FewRowsProduct& product_;
  Blocks blocks_;
  const typename Step::Stored* weight_;
  int64_t begin_;
  int64_t end_;
  int64_t num_groups_;
  int64_t panel_rows_;
};

// Calls run(Step) with the step that multiplies this product.
template <typename Run>
TQ_INLINE void with_step(const FewRowsProduct& product, const Run& run) {
  switch (product.type) {
    case ElementType::kFloat32:
      return run(Float32Step{});
    case ElementType::kFloat16:
      return run(Float16Step{});
    case ElementType::kBFloat16:
#if defined(__AVX512F__)
      if (product.use_bf16_dot) return run(BFloat16DotStep{});
#endif
      return run(BFloat16Step{});
  }
}

}  // namespace

void pack_rows(const FewRowsProduct& product, const void* x, int64_t x_stride, void* to, int64_t first, int64_t last) {
#if defined(__AVX512F__)
  if (product.is_int8) return pack_int8(product, x, x_stride, to, first, last);
  if (product.use_amx) return pack_amx(product, x, x_stride, to, first, last);
#endif
  with_step(product, [&](auto step) {
#if defined(__AVX512F__)
    if (product.is_many) return pack_many<decltype(step)>(product, x, x_stride, to, first, last);
#endif
    if (first < last) pack_typed<decltype(step)>(product, x, x_stride, to);
  });
}

void multiply_few_rows(const FewRowsProduct& product, int64_t begin, int64_t end) {
#if defined(__AVX512F__)
  if (product.is_int8) return AmxInt8Share(product, end).multiply(begin);
  if (product.use_amx) return AmxShare(product, end).multiply(begin);
#endif
  with_step(product, [&](auto step) {
#if defined(__AVX512F__)
    if (product.is_many) return ManyShare<decltype(step)>(product, end).multiply(begin);
#endif
    Share<decltype(step)>(product, begin, end).multiply();
  });
}

}  // namespace TQ_ISA
}  // namespace tq
