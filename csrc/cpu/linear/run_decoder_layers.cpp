// run_decoder_layers on CPU: all layers of a model over a forest of shared prefixes, in one call.
#include <algorithm>
#include <cstring>
#include <deque>
#include <utility>

#include "cpu/attention/shared_prefix_attention.h"
#include "cpu/linear/decoder_layer.h"

namespace tq {

namespace {

constexpr const char* kOp = "run_decoder_layers";

// What a layer multiplies by: norm, q, k, v, o, norm, gate, up, down.
constexpr int64_t kWeights = 9;
// The biases of q, k, v, o, gate, up, down, and the scales of their weights where those are int8.
constexpr int64_t kBiases = 7;

void check_branch(const Tensor& branch, const Tensor& states, int64_t start) {
  STD_TORCH_CHECK(
      branch.dim() == 4 && branch.size(0) == states.size(0) && branch.size(1) == states.size(2) && start >= 0 &&
          branch.size(2) >= start + states.size(1) && branch.size(3) == states.size(3) && branch.stride(3) == 1 &&
          branch.scalar_type() == states.scalar_type(),
      kOp, ": a branch buffer does not hold the new tokens");
}

// The place of new tokens in a branch buffer [N, H, B, d].
struct BranchPlace {
  char* data;  // of the first new token
  int64_t row_bytes, head_bytes, token_bytes;
  int64_t heads, num_tokens, bytes;  // bytes of a head

  BranchPlace(const Tensor& branch, const Tensor& states, int64_t start)
      : heads(states.size(2)), num_tokens(states.size(1)) {
    check_branch(branch, states, start);
    const auto element = static_cast<int64_t>(states.element_size());
    row_bytes = branch.stride(0) * element;
    head_bytes = branch.stride(1) * element;
    token_bytes = branch.stride(2) * element;
    bytes = states.size(3) * element;
    data = static_cast<char*>(const_cast<Tensor&>(branch).mutable_data_ptr()) + start * token_bytes;
  }

  // Copies the rows of states [N * T, H, d], dense.
  void store(const void* states, Range rows) const {
    const auto* from = static_cast<const char*>(states) + rows.begin * heads * bytes;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      char* const to = data + row / num_tokens * row_bytes + row % num_tokens * token_bytes;
      for (int64_t head = 0; head < heads; ++head, from += bytes) std::memcpy(to + head * head_bytes, from, bytes);
    }
  }
};

// With fewer bytes of weights a layer than this, another thread does not pay.
constexpr int64_t kLayerBytesPerThread = int64_t{1} << 18;

// Weights of a layer, checked.
struct LayerWeights {
  QkvWeights qkv;
  FinishWeights finish;
};

// The norm behind the last layer.
struct LastNorm {
  Tensor weight;
  float eps;
};

// What the layers share on their way: rows of the residual stream, of q, k and v, and of attention's output.
struct PassRoom {
  Tensor hidden, q, k, v, attended, lse;
};

// A layer for some rows, on a team.
class LayerRows {
 public:
  LayerRows(
      ElementType type, const LayerWeights& weights, const AttentionArguments& arguments, const Angles& angles,
      int64_t start, const LayerRoom& room, PassRoom& pass)
      : type_(type),
        rows_(pass.q.size(0) * pass.q.size(1)),
        q_heads_(pass.q.size(2)),
        kv_heads_(pass.k.size(2)),
        angles_(angles),
        q_(pass.q.mutable_data_ptr()),
        k_(pass.k.mutable_data_ptr()),
        v_(pass.v.mutable_data_ptr()),
        attended_(pass.attended.const_data_ptr()),
        hidden_(pass.hidden.mutable_data_ptr()),
        key_place_(arguments.branch_k, pass.k, start),
        value_place_(arguments.branch_v, pass.v, start),
        qkv_(type, rows_, weights.qkv, room, q_, k_, v_),
        attention_(arguments, pass.attended, pass.lse),
        finish_(type, rows_, weights.finish, room) {}

  int64_t bytes() const { return qkv_.products().bytes() + finish_.bytes(); }
  int64_t attention_threads() const { return attention_.threads(); }
  void add_runs(const Member& member, std::vector<MemoryRun>& runs) const {
    qkv_.add_runs(member, runs);
    attention_.add_runs(member, runs);
    finish_.add_runs(member, runs);
  }

  // x [rows, D] to the residual stream of the pass.
  void run(LayerThread& thread, const void* x) {
    qkv_.run(thread, x);
    thread.wait();
    const Range own = thread.member.share(rows_);
    rotate(type_, q_, q_heads_, angles_, own);
    rotate(type_, k_, kv_heads_, angles_, own);
    key_place_.store(k_, own);
    value_place_.store(v_, own);
    thread.wait();
    attention_.run(thread.member, thread.ahead);
    thread.wait();
    finish_.run(thread, attended_, x, hidden_);
    thread.wait();
  }

 private:
  ElementType type_;
  int64_t rows_, q_heads_, kv_heads_;
  const Angles& angles_;
  void *q_, *k_, *v_;
  const void* attended_;
  void* hidden_;
  BranchPlace key_place_, value_place_;
  QkvRows qkv_;
  SharedPrefixAttention attention_;
  FinishRows finish_;
};

// Whether all layers have heads of the same number and size.
bool are_alike(const std::vector<LayerWeights>& layers) {
  for (const LayerWeights& layer : layers) {
    if (layer.qkv.q.size_out() != layers[0].qkv.q.size_out()) return false;
    if (layer.qkv.k.size_out() != layers[0].qkv.k.size_out()) return false;
  }
  return true;
}

bool are_for_library(ElementType type, int64_t rows, const std::vector<LayerWeights>& layers) {
  for (const LayerWeights& layer : layers) {
    if (is_for_library(type, rows, layer.qkv) || is_for_library(type, rows, layer.finish)) return true;
  }
  return false;
}

void norm_own_rows(ElementType type, Tensor& hidden, const LastNorm& norm, Range rows) {
  void* const data = hidden.mutable_data_ptr();
  norm_rows(type, data, norm.weight.const_data_ptr(), norm.eps, hidden.size(2), data, rows);
}

// hidden through all layers, and the norm, by one team, which starts once. arguments(i, q) are those of attention in layer i.
template <typename Arguments>
Tensor run_on_team(
    ElementType type, const Tensor& hidden, const std::vector<LayerWeights>& layers, const Angles& angles,
    const Arguments& arguments, int64_t start, const std::optional<LastNorm>& norm) {
  const int64_t batch = hidden.size(0), length = hidden.size(1), size = hidden.size(2), rows = batch * length;
  const ScalarType dtype = hidden.scalar_type();
  const int64_t q_heads = layers[0].qkv.q.size_out() / angles.head_size;
  const int64_t kv_heads = layers[0].qkv.k.size_out() / angles.head_size;
  const auto new_states = [&](int64_t heads) { return new_tensor({batch, length, heads, angles.head_size}, dtype); };
  Tensor q = new_states(q_heads);
  const Tensor queries = torch::stable::transpose(q, 1, 2);
  PassRoom pass{
      new_tensor({batch, length, size}, dtype),
      q,
      new_states(kv_heads),
      new_states(kv_heads),
      new_attention_output(queries),
      new_tensor({batch, q_heads, length}, ScalarType::Float)};
  int64_t most = std::max(size, q_heads * angles.head_size);
  for (const LayerWeights& layer : layers) most = std::max(most, layer.finish.gate.size_out());
  const LayerRoom room(rows, most, static_cast<int64_t>(hidden.element_size()));
  const Tensor attended = torch::stable::view(q, {batch, length, q_heads * angles.head_size});
  std::deque<LayerRows> stack;
  int64_t threads = 1;
  for (size_t i = 0; i < layers.size(); ++i) {
    check_finish(kOp, attended, hidden, layers[i].finish);
    const AttentionArguments attention = arguments(i, queries);
    check_attention(attention);
    LayerRows& layer = stack.emplace_back(type, layers[i], attention, angles, start, room, pass);
    threads = std::max({threads, layer.bytes() / kLayerBytesPerThread, layer.attention_threads()});
  }
  const void* const first = hidden.const_data_ptr();
  const void* const later = pass.hidden.const_data_ptr();
  threads = std::min<int64_t>(threads, torch::stable::get_num_threads());
  const auto add_runs = [&](const Member& member, std::vector<MemoryRun>& runs) {
    for (const LayerRows& layer : stack) layer.add_runs(member, runs);
  };
  run_as_reading_team(threads, add_runs, [&](Member& member, ReadAhead& ahead) {
    LayerThread thread{member, ahead};
    for (LayerRows& layer : stack) layer.run(thread, &layer == &stack.front() ? first : later);
    if (norm.has_value()) norm_own_rows(type, pass.hidden, *norm, member.share(rows));
  });
  return pass.hidden;
}

// The same, each product, or each half of a layer, by itself.
template <typename Arguments>
Tensor run_one_by_one(
    ElementType type, const Tensor& hidden, const std::vector<LayerWeights>& layers, const Tensor& cos,
    const Tensor& sin, const Arguments& arguments, int64_t start, const std::optional<LastNorm>& norm) {
  Tensor now = hidden;
  for (size_t i = 0; i < layers.size(); ++i) {
    const QueriesKeysValues made = project(kOp, now, layers[i].qkv, cos, sin);
    const AttentionArguments x = arguments(i, torch::stable::transpose(made.q, 1, 2));
    const Range rows{0, hidden.size(0) * hidden.size(1)};
    BranchPlace(x.branch_k, made.k, start).store(made.k.const_data_ptr(), rows);
    BranchPlace(x.branch_v, made.v, start).store(made.v.const_data_ptr(), rows);
    const Tensor attended = torch::stable::transpose(std::get<0>(attend(x)), 1, 2);
    now = finish(
        kOp, torch::stable::view(attended, {hidden.size(0), hidden.size(1), made.q.size(2) * made.q.size(3)}), now,
        layers[i].finish);
  }
  if (norm.has_value()) norm_own_rows(type, now, *norm, {0, hidden.size(0) * hidden.size(1)});
  return now;
}

}  // namespace

Tensor run_decoder_layers_cpu(
    const Tensor& hidden_in, const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
    const std::vector<std::optional<Tensor>>& weight_scales, const std::vector<double>& eps,
    const std::optional<Tensor>& last_norm, double last_eps, const Tensor& cos_in, const Tensor& sin_in,
    const std::vector<Tensor>& prefix_k, const std::vector<Tensor>& prefix_v, const std::vector<Tensor>& branch_k,
    const std::vector<Tensor>& branch_v, const Tensor& prefix_len, const Tensor& branch_len, const Tensor& tree,
    int64_t start, const std::vector<double>& scales, const std::vector<int64_t>& windows) {
  const auto count = static_cast<int64_t>(prefix_k.size());
  const auto has = [count](const auto& list, int64_t each) {
    return static_cast<int64_t>(list.size()) == each * count;
  };
  STD_TORCH_CHECK(
      count > 0 && has(weights, kWeights) && (biases.empty() || has(biases, kBiases)) &&
          (weight_scales.empty() || has(weight_scales, kBiases)) && has(eps, 2) && has(prefix_v, 1) &&
          has(branch_k, 1) && has(branch_v, 1) && has(scales, 1) && has(windows, 1) && hidden_in.dim() == 3,
      kOp, ": the lists must have the parts of as many layers");
  const Tensor hidden = torch::stable::contiguous(hidden_in);
  const ScalarType dtype = hidden.scalar_type();
  const ElementType type = element_type_of(hidden, kOp, "hidden");
  const Tensor cos = dense(cos_in, dtype);
  const Tensor sin = dense(sin_in, dtype);
  const int64_t batch = hidden.size(0), length = hidden.size(1), size = hidden.size(2);
  std::vector<LayerWeights> layers;
  layers.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    const Tensor* const weight = &weights[i * kWeights];
    const auto layer = [&](int64_t w, int64_t b, int64_t size_in) {
      const std::optional<Tensor> none;
      const auto& bias = biases.empty() ? none : biases[i * kBiases + b];
      const auto& scale = weight_scales.empty() ? none : weight_scales[i * kBiases + b];
      return LinearLayer(weight[w], bias, scale, size_in, dtype, kOp);
    };
    QkvWeights qkv(weight[0], eps[2 * i], layer(1, 0, size), layer(2, 1, size), layer(3, 2, size));
    const LinearLayer gate = layer(6, 4, size);
    FinishWeights finish(
        layer(4, 3, qkv.q.size_out()), weight[5], eps[2 * i + 1], gate, layer(7, 5, size),
        layer(8, 6, gate.size_out()));
    check_qkv(kOp, hidden, qkv, cos, sin);
    layers.push_back({std::move(qkv), std::move(finish)});
  }
  const auto arguments = [&](int64_t i, const Tensor& q) {
    return AttentionArguments{q,
                              prefix_k[i],
                              prefix_v[i],
                              prefix_len,
                              branch_k[i],
                              branch_v[i],
                              branch_len,
                              scales[i],
                              std::nullopt,
                              windows[i] > 0 ? std::optional<int64_t>(windows[i]) : std::nullopt,
                              tree};
  };
  std::optional<LastNorm> norm;
  if (last_norm.has_value()) norm = {dense(*last_norm, dtype), static_cast<float>(last_eps)};
  STD_TORCH_CHECK(
      !norm.has_value() || norm->weight.numel() == size, kOp,
      ": last_norm must have a number for each column of hidden");
  if (hidden.numel() == 0) return hidden;
  return are_alike(layers) && !are_for_library(type, batch * length, layers)
             ? run_on_team(type, hidden, layers, Angles(cos, sin), arguments, start, norm)
             : run_one_by_one(type, hidden, layers, cos, sin, arguments, start, norm);
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CPU, m) { m.impl("run_decoder_layers", TORCH_BOX(&run_decoder_layers_cpu)); }

}  // namespace tq
