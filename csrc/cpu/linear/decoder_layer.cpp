#include "cpu/linear/decoder_layer.h"

#include "cpu/linear/decoder_layer_rows.h"

namespace tq {

namespace {

// With fewer rows than this, another thread does not pay for the work between the library's products.
constexpr int64_t kRowsPerThread = 32;

const char* at(const void* data, int64_t bytes) { return static_cast<const char*>(data) + bytes; }
char* at(void* data, int64_t bytes) { return static_cast<char*>(data) + bytes; }

// Calls run(rows) on threads.
template <typename Run>
void for_rows(int64_t rows, const Run& run) {
  torch::stable::parallel_for(0, rows, kRowsPerThread, [&](int64_t begin, int64_t end) { run(Range{begin, end}); });
}

Tensor rms_norm(ElementType type, const Tensor& x, const Tensor& weight, double eps) {
  Tensor out = new_tensor({x.size(0), x.size(1)}, x.scalar_type());
  for_rows(x.size(0), [&](Range rows) {
    norm_rows(
        type, x.const_data_ptr(), weight.const_data_ptr(), static_cast<float>(eps), x.size(1), out.mutable_data_ptr(),
        rows);
  });
  return out;
}

Tensor add(ElementType type, const Tensor& a, const Tensor& b) {
  Tensor out = new_tensor({a.size(0), a.size(1)}, a.scalar_type());
  const int64_t row_bytes = a.size(1) * bytes_of(type);
  for_rows(a.size(0), [&](Range rows) {
    const int64_t first = rows.begin * row_bytes;
    TQ_SELECT_ISA(add_row)(
        type, at(a.const_data_ptr(), first), at(b.const_data_ptr(), first), (rows.end - rows.begin) * a.size(1),
        at(out.mutable_data_ptr(), first));
  });
  return out;
}

QueriesKeysValues project_by_library(
    ElementType type, const Tensor& x, const QkvWeights& weights, const Tensor& cos, const Tensor& sin) {
  const int64_t batch = x.size(0), length = x.size(1), head_size = cos.size(2);
  const Tensor normed = rms_norm(type, torch::stable::view(x, {batch * length, x.size(2)}), weights.norm, weights.eps);
  const auto heads_of = [&](const LinearLayer& layer) {
    const Tensor made = multiply_by_library(normed, layer);
    return torch::stable::view(made, {batch, length, layer.size_out() / head_size, head_size});
  };
  QueriesKeysValues result{heads_of(weights.q), heads_of(weights.k), heads_of(weights.v)};
  const Angles angles(cos, sin);
  for (Tensor* const tensor : {&result.q, &result.k}) {
    for_rows(
        batch * length, [&](Range rows) { rotate(type, tensor->mutable_data_ptr(), tensor->size(2), angles, rows); });
  }
  return result;
}

Tensor finish_by_library(
    ElementType type, const Tensor& attended, const Tensor& residual, const FinishWeights& weights) {
  const int64_t rows = residual.size(0) * residual.size(1), size = residual.size(2);
  const Tensor projected = multiply_by_library(torch::stable::view(attended, {rows, attended.size(2)}), weights.o);
  const Tensor middle = add(type, torch::stable::view(residual, {rows, size}), projected);
  const Tensor normed = rms_norm(type, middle, weights.norm, weights.eps);
  Tensor gated = multiply_by_library(normed, weights.gate);
  const Tensor up = multiply_by_library(normed, weights.up);
  const int64_t row_bytes = gated.size(1) * bytes_of(type);
  for_rows(rows, [&](Range range) {
    const int64_t first = range.begin * row_bytes;
    char* const to = at(gated.mutable_data_ptr(), first);
    TQ_SELECT_ISA(silu_mul_row)(
        type, to, at(up.const_data_ptr(), first), (range.end - range.begin) * gated.size(1), to);
  });
  const Tensor out = add(type, middle, multiply_by_library(gated, weights.down));
  return torch::stable::view(out, {residual.size(0), residual.size(1), size});
}

// Calls run(thread) on a team for products of so many bytes of weights. add_runs(member, runs) tells what a
// thread reads.
template <typename AddRuns, typename Run>
void run_on_threads(int64_t bytes, const AddRuns& add_runs, const Run& run) {
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  run_as_reading_team(
      std::clamp<int64_t>(bytes / kLinearBytesPerThread, 1, threads), add_runs, [&](Member& member, ReadAhead& ahead) {
        LayerThread thread{member, ahead};
        run(thread);
      });
}

}  // namespace

LayerRoom::LayerRoom(int64_t rows, int64_t most, int64_t bytes)
    : packed_(packing_room(rows, most)), buffer_bytes_((rows * most * bytes / kCacheLine + 1) * kCacheLine) {
  thread_local std::vector<char> room;
  room.resize(std::max<size_t>(room.size(), kBuffers * buffer_bytes_ + kCacheLine));
  buffers_ = static_cast<char*>(line_of(room.data()));
}

QkvRows::QkvRows(
    ElementType type, int64_t rows, const QkvWeights& weights, const LayerRoom& room, void* q, void* k, void* v)
    : type_(type),
      norm_(weights.norm.const_data_ptr()),
      eps_(static_cast<float>(weights.eps)),
      normed_(room.buffer(0)),
      products_(type, rows, weights.layers(), false, room.packed(), {q, k, v}) {}

void QkvRows::run(LayerThread& thread, const void* x) const {
  products_.pack(thread.member, normed_, products_.size_in(), [&](int64_t begin, int64_t end) {
    norm_rows(type_, x, norm_, eps_, products_.size_in(), normed_, {begin, end});
  });
  thread.wait();
  products_.multiply(thread.member, thread.ahead);
}

FinishRows::FinishRows(ElementType type, int64_t rows, const FinishWeights& weights, const LayerRoom& room)
    : type_(type),
      norm_(weights.norm.const_data_ptr()),
      eps_(static_cast<float>(weights.eps)),
      normed_(room.buffer(0)),
      product_(room.buffer(0)),
      gated_(room.buffer(1)),
      up_(room.buffer(2)),
      o_(type, rows, {&weights.o}, false, room.packed(), {product_}),
      gate_up_(type, rows, {&weights.gate, &weights.up}, true, room.packed(), {gated_, up_}),
      down_(type, rows, {&weights.down}, false, room.packed(), {product_}) {}

void FinishRows::add_runs(const Member& member, std::vector<MemoryRun>& runs) const {
  o_.add_runs(member, runs);
  gate_up_.add_runs(member, runs);
  down_.add_runs(member, runs);
}

// out = residual + what the product made, in the columns that this thread has made.
void FinishRows::add_own_columns(
    const LayerThread& thread, const LinearGroup<1>& product, const void* residual, void* out) const {
  const Range columns = product.outputs(thread.member, 0);
  for (int64_t row = 0; columns.begin < columns.end && row < product.rows(); ++row) {
    const int64_t first = (row * product.size_out(0) + columns.begin) * bytes_of(type_);
    TQ_SELECT_ISA(add_row)(
        type_, at(residual, first), at(product_, first), columns.end - columns.begin, at(out, first));
  }
}

void FinishRows::run(LayerThread& thread, const void* attended, const void* residual, void* out) const {
  const Member& member = thread.member;
  o_.pack(member, attended, o_.size_in());
  thread.wait();
  o_.multiply(member, thread.ahead);
  add_own_columns(thread, o_, residual, out);
  thread.wait();

  gate_up_.pack(member, normed_, gate_up_.size_in(), [&](int64_t begin, int64_t end) {
    norm_rows(type_, out, norm_, eps_, gate_up_.size_in(), normed_, {begin, end});
  });
  thread.wait();
  gate_up_.multiply(member, thread.ahead);
  const Range columns = gate_up_.outputs(member, 0);
  const int64_t inner = gate_up_.size_out(0);
  for (int64_t row = 0; columns.begin < columns.end && row < gate_up_.rows(); ++row) {
    const int64_t first = (row * inner + columns.begin) * bytes_of(type_);
    char* const gated = at(gated_, first);
    TQ_SELECT_ISA(silu_mul_row)(type_, gated, at(up_, first), columns.end - columns.begin, gated);
  }
  thread.wait();

  down_.pack(member, gated_, inner);
  thread.wait();
  down_.multiply(member, thread.ahead);
  add_own_columns(thread, down_, out, out);
}

void norm_rows(ElementType type, const void* x, const void* weight, float eps, int64_t size, void* to, Range rows) {
  const int64_t row_bytes = size * bytes_of(type);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    TQ_SELECT_ISA(rms_norm_row)(type, at(x, row * row_bytes), weight, eps, size, at(to, row * row_bytes));
  }
}

void rotate(ElementType type, void* x, int64_t heads, const Angles& angles, Range rows) {
  const int64_t angle_bytes = angles.head_size * bytes_of(type);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t angle = row % angles.rows * angle_bytes;
    TQ_SELECT_ISA(rotate_row)(
        type, at(x, row * heads * angle_bytes), at(angles.cos, angle), at(angles.sin, angle), heads, angles.head_size);
  }
}

void check_qkv(const char* op, const Tensor& x, const QkvWeights& weights, const Tensor& cos, const Tensor& sin) {
  STD_TORCH_CHECK(cos.dim() == 3 && sin.dim() == 3, op, ": cos and sin must have 3 axes");
  const int64_t batch = x.size(0), length = x.size(1), size = x.size(2), head_size = cos.size(2);
  STD_TORCH_CHECK(weights.norm.numel() == size, op, ": norm_weight must have a number for each column of x");
  STD_TORCH_CHECK(
      head_size > 0 && head_size % 2 == 0 && weights.q.size_out() % head_size == 0 &&
          weights.k.size_out() % head_size == 0 && weights.v.size_out() == weights.k.size_out(),
      op, ": the weights must have whole heads of the size of cos");
  STD_TORCH_CHECK(
      cos.size(1) == length && (cos.size(0) == batch || cos.size(0) == 1) && sin.size(0) == cos.size(0) &&
          sin.size(1) == length && sin.size(2) == head_size,
      op, ": cos and sin must be [N, T, d] or [1, T, d]");
}

void check_finish(const char* op, const Tensor& attended, const Tensor& residual, const FinishWeights& weights) {
  const int64_t size = residual.size(2);
  STD_TORCH_CHECK(
      attended.size(0) == residual.size(0) && attended.size(1) == residual.size(1), op,
      ": attended must have the rows of residual");
  STD_TORCH_CHECK(
      weights.norm.numel() == size && weights.o.size_out() == size && weights.down.size_out() == size &&
          weights.up.size_out() == weights.gate.size_out(),
      op, ": the weights must lead from the columns of residual back to them");
}

bool is_for_library(ElementType type, int64_t rows, const QkvWeights& weights) {
  return is_for_library(type, rows, weights.layers());
}

bool is_for_library(ElementType type, int64_t rows, const FinishWeights& weights) {
  return is_for_library<4>(type, rows, {&weights.o, &weights.gate, &weights.up, &weights.down});
}

QueriesKeysValues project(
    const char* op, const Tensor& x, const QkvWeights& weights, const Tensor& cos, const Tensor& sin) {
  const ElementType type = element_type_of(x, op, "x");
  check_qkv(op, x, weights, cos, sin);
  const int64_t batch = x.size(0), length = x.size(1), rows = batch * length, head_size = cos.size(2);
  if (is_for_library(type, rows, weights)) return project_by_library(type, x, weights, cos, sin);
  const int64_t q_heads = weights.q.size_out() / head_size, kv_heads = weights.k.size_out() / head_size;
  QueriesKeysValues result{
      new_tensor({batch, length, q_heads, head_size}, x.scalar_type()),
      new_tensor({batch, length, kv_heads, head_size}, x.scalar_type()),
      new_tensor({batch, length, kv_heads, head_size}, x.scalar_type())};
  void* const q = result.q.mutable_data_ptr();
  void* const k = result.k.mutable_data_ptr();
  const LayerRoom room(rows, x.size(2), bytes_of(type));
  const QkvRows half(type, rows, weights, room, q, k, result.v.mutable_data_ptr());
  const Angles angles(cos, sin);
  const void* const from = x.const_data_ptr();
  run_on_threads(
      half.products().bytes(), [&](const Member& member, auto& runs) { half.add_runs(member, runs); },
      [&](LayerThread& thread) {
        half.run(thread, from);
        thread.wait();
        rotate(type, q, q_heads, angles, thread.member.share(rows));
        rotate(type, k, kv_heads, angles, thread.member.share(rows));
      });
  return result;
}

Tensor finish(const char* op, const Tensor& attended, const Tensor& residual, const FinishWeights& weights) {
  const ElementType type = element_type_of(residual, op, "residual");
  check_finish(op, attended, residual, weights);
  const int64_t rows = residual.size(0) * residual.size(1), size = residual.size(2);
  if (is_for_library(type, rows, weights)) return finish_by_library(type, attended, residual, weights);
  Tensor out = new_tensor({residual.size(0), residual.size(1), size}, residual.scalar_type());
  const LayerRoom room(rows, std::max({size, attended.size(2), weights.gate.size_out()}), bytes_of(type));
  const FinishRows half(type, rows, weights, room);
  const void* const attended_data = attended.const_data_ptr();
  const void* const residual_data = residual.const_data_ptr();
  void* const to = out.mutable_data_ptr();
  run_on_threads(
      half.bytes(), [&](const Member& member, auto& runs) { half.add_runs(member, runs); },
      [&](LayerThread& thread) { half.run(thread, attended_data, residual_data, to); });
  return out;
}

}  // namespace tq
