// The arguments that sample_tokens and advance_rollouts_ have in common, and the kernel around draw_row.
#pragma once

#include <optional>

#include "cuda/draw_row.h"
#include "cuda/launch.h"

namespace tq {

struct DrawRows {
  const void* logits;
  int64_t stride;
  int vocab_size;
  const int64_t* keys;
  DeviceInt seed;
  DeviceInt step;
  // A number for all rows, or one for each where the pointer is not null.
  DrawParameters parameters;
  const float* temperatures;
  const int64_t* top_ks;
  const double* top_ps;
};

TQ_DEVICE DrawParameters parameters_of(const DrawRows& rows, int64_t row) {
  return {
      rows.temperatures == nullptr ? rows.parameters.temperature : rows.temperatures[row],
      rows.top_ks == nullptr ? rows.parameters.top_k : rows.top_ks[row],
      rows.top_ps == nullptr ? rows.parameters.top_p : rows.top_ps[row]};
}

// `Sink` says which rows want a token, `wants(row)`, and takes it, `take(row, DrawnToken)`.
template <typename Type, typename Sink>
struct DrawJob {
  DrawRows rows;
  Sink sink;
};

template <typename Type, bool kMayCut, typename Sink>
__global__ void __launch_bounds__(kThreads) draw_rows_kernel(const DrawJob<Type, Sink> job) {
  const DrawRows& rows = job.rows;
  const int64_t row = simt::group_idx();
  // All blocks of a group read the row's state here, before the leader writes it after the last barrier.
  if (!job.sink.wants(row)) return;
  draw_row<Type, kMayCut>(
      LogitRow<Type>::at(rows.logits, row, rows.stride, rows.vocab_size, 1.0f),
      [&] { return parameters_of(rows, row); },
      [&] { return philox_uniform(read(rows.seed), kPurposeRollout, rows.keys[row], read(rows.step), 0); },
      kMayCut ? kNearbyRoom : 0, [&](const DrawnToken& token) { job.sink.take(row, token); });
}

// The arguments as dense tensors on the device, which must outlive the launch.
struct DrawArguments {
  const char* op;
  int32_t device;
  Tensor logits;
  Tensor keys;
  std::optional<Tensor> seed, step, temperatures, top_ks, top_ps;
  DrawRows rows;

  DrawArguments(
      const char* op_in, const Tensor& logits_in, const Tensor& keys_in, int64_t step_number,
      const std::optional<Tensor>& step_in, double temperature, const std::optional<Tensor>& temperatures_in,
      int64_t top_k, const std::optional<Tensor>& top_ks_in, double top_p, const std::optional<Tensor>& top_ps_in,
      int64_t vocab_size, int64_t seed_number, const std::optional<Tensor>& seed_in)
      : op(op_in),
        device(device_of(op_in, logits_in)),
        logits(with_unit_inner_stride(logits_in)),
        keys(dense(keys_in, ScalarType::Long)),
        seed(dense(seed_in, ScalarType::Long)),
        step(dense(step_in, ScalarType::Long)),
        temperatures(dense(temperatures_in, ScalarType::Float)),
        top_ks(dense(top_ks_in, ScalarType::Long)),
        top_ps(dense(top_ps_in, ScalarType::Double)),
        rows{
            logits.const_data_ptr(),
            logits.stride(0),
            static_cast<int>(vocab_size),
            static_cast<const int64_t*>(keys.const_data_ptr()),
            device_int(seed_number, seed),
            device_int(step_number, step),
            {static_cast<float>(temperature), top_k, top_p},
            data_or_null<float>(temperatures),
            data_or_null<int64_t>(top_ks),
            data_or_null<double>(top_ps)} {
    STD_TORCH_CHECK(vocab_size <= kMostVocab, op, ": vocab_size is ", vocab_size, ", expected at most ", kMostVocab);
  }
};

template <typename Sink>
void draw_rows(const DrawArguments& arguments, const Sink& sink) {
  for_element_type(arguments.logits, arguments.op, [&](auto type) {
    using Type = decltype(type);
    const DrawRows& rows = arguments.rows;
    // Nothing here depends on the values of tensors: reading them would wait for the device.
    const bool may_cut =
        rows.top_ks != nullptr || rows.top_ps != nullptr || rows.parameters.top_p < 1.0 || rows.parameters.top_k > 0;
    launch_rows(
        may_cut ? draw_rows_kernel<Type, true, Sink> : draw_rows_kernel<Type, false, Sink>,
        DrawJob<Type, Sink>{rows, sink}, arguments.logits.size(0), num_tiles(rows.vocab_size),
        draw_shared_bytes(rows.vocab_size, may_cut ? kNearbyRoom : 0), current_stream(arguments.device));
  });
}

}  // namespace tq
