// The two halves of a decoder layer of Llama's formula, before and after its attention, rounded where the modules
// of transformers round.
#pragma once

#include "cpu/linear/linear_layers.h"

namespace tq {

// What project_qkv multiplies by. q, k and v read the same normed rows.
struct QkvWeights {
  Tensor norm;
  double eps;
  LinearLayer q, k, v;

  QkvWeights(
      const Tensor& norm_in, double eps_in, const LinearLayer& q_in, const LinearLayer& k_in, const LinearLayer& v_in)
      : norm(dense(norm_in, q_in.dtype)), eps(eps_in), q(q_in), k(k_in), v(v_in) {}

  std::array<const LinearLayer*, 3> layers() const { return {&q, &k, &v}; }
};

// What finish_decoder_layer multiplies by.
struct FinishWeights {
  LinearLayer o;
  Tensor norm;
  double eps;
  LinearLayer gate, up, down;

  FinishWeights(
      const LinearLayer& o_in, const Tensor& norm_in, double eps_in, const LinearLayer& gate_in,
      const LinearLayer& up_in, const LinearLayer& down_in)
      : o(o_in), norm(dense(norm_in, o_in.dtype)), eps(eps_in), gate(gate_in), up(up_in), down(down_in) {}
};

// The angles of rows [N, T]: cos and sin, [N, T, d] or [1, T, d], dense.
struct Angles {
  const void* cos;
  const void* sin;
  int64_t rows;  // of cos and sin, which all rows take again and again
  int64_t head_size;

  Angles(const Tensor& cos_in, const Tensor& sin_in)
      : cos(cos_in.const_data_ptr()),
        sin(sin_in.const_data_ptr()),
        rows(cos_in.size(0) * cos_in.size(1)),
        head_size(cos_in.size(2)) {}
};

// A thread of a team that runs through layers together, and what it will read.
struct LayerThread {
  Member& member;
  ReadAhead& ahead;

  void wait() {
    member.wait([this] { return ahead.fetch(kLinesWhileWaiting); });
  }
};

// Memory that the products of a layer share; each call of its kind needs it anew. One caller at a time has it.
class LayerRoom {
 public:
  // For `rows` rows of up to `most` numbers of `bytes` each, of which up to kBuffers are held at once.
  LayerRoom(int64_t rows, int64_t most, int64_t bytes);

  void* packed() const { return packed_; }
  void* buffer(int64_t i) const { return buffers_ + i * buffer_bytes_; }

  static constexpr int64_t kBuffers = 3;

 private:
  void* packed_;
  char* buffers_;
  int64_t buffer_bytes_;
};

// The first half for some rows: norm and three products, on a team. `room` must have the columns of x.
class QkvRows {
 public:
  QkvRows(ElementType type, int64_t rows, const QkvWeights& weights, const LayerRoom& room, void* q, void* k, void* v);

  const LinearGroup<3>& products() const { return products_; }
  void add_runs(const Member& member, std::vector<MemoryRun>& runs) const { products_.add_runs(member, runs); }

  // x [rows, D], dense. When all threads have returned from it, q, k and v are there; they are not rotated.
  void run(LayerThread& thread, const void* x) const;

 private:
  ElementType type_;
  const void* norm_;
  float eps_;
  void* normed_;
  LinearGroup<3> products_;
};

// The second half for some rows. `room` must have the columns of everything in it.
class FinishRows {
 public:
  FinishRows(ElementType type, int64_t rows, const FinishWeights& weights, const LayerRoom& room);

  int64_t bytes() const { return o_.bytes() + gate_up_.bytes() + down_.bytes(); }
  void add_runs(const Member& member, std::vector<MemoryRun>& runs) const;

  // attended [rows, A] and residual [rows, D], dense, to out [rows, D], which may be the residual itself. It is
  // there when all threads have returned.
  void run(LayerThread& thread, const void* attended, const void* residual, void* out) const;

 private:
  void add_own_columns(const LayerThread& thread, const LinearGroup<1>& product, const void* residual, void* out) const;

  ElementType type_;
  const void* norm_;
  float eps_;
  void* normed_;
  void* product_;
  void* gated_;
  void* up_;
  LinearGroup<1> o_;
  LinearGroup<2> gate_up_;
  LinearGroup<1> down_;
};

// to = weight * x / sqrt(mean(x^2) + eps) for rows of x [rows, size], dense; `to` may be x.
void norm_rows(ElementType type, const void* x, const void* weight, float eps, int64_t size, void* to, Range rows);

// Rotates the heads of rows [begin, end) of x [rows, heads, d] in place.
void rotate(ElementType type, void* x, int64_t heads, const Angles& angles, Range rows);

// Raises where the weights and angles do not fit x [N, T, D] or one another, in the name of `op`.
void check_qkv(const char* op, const Tensor& x, const QkvWeights& weights, const Tensor& cos, const Tensor& sin);
void check_finish(const char* op, const Tensor& attended, const Tensor& residual, const FinishWeights& weights);

struct QueriesKeysValues {
  Tensor q, k, v;  // [N, T, heads, d]
};

// x [N, T, D], dense, through the norm and three products, q and k rotated by cos and sin, [N, T, d] or
// [1, T, d], dense.
QueriesKeysValues project(
    const char* op, const Tensor& x, const QkvWeights& weights, const Tensor& cos, const Tensor& sin);

// attended [N, T, A] and residual [N, T, D], dense, to the next residual stream [N, T, D].
Tensor finish(const char* op, const Tensor& attended, const Tensor& residual, const FinishWeights& weights);

// Whether so many rows of x go through one of the products of a half by the library's product.
bool is_for_library(ElementType type, int64_t rows, const QkvWeights& weights);
bool is_for_library(ElementType type, int64_t rows, const FinishWeights& weights);

}  // namespace tq
