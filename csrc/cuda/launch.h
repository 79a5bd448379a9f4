// How a CUDA op reaches the device: its stream, parameters in device memory, groups of blocks for rows.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "cuda/device_int.h"
#include "cuda/tile.h"
#include "stable_tensor.h"

namespace tq {

inline DeviceInt device_int(int64_t number, const std::optional<Tensor>& tensor) {
  return {number, data_or_null<int64_t>(tensor)};
}

// The device of an op's first tensor, which may be on the CPU: the dispatcher comes here if any tensor is
// on a device.
inline int32_t device_of(const char* op, const Tensor& first) {
  STD_TORCH_CHECK(first.is_cuda(), op, ": its first tensor is not on a CUDA device, but others are");
  return first.get_device_index();
}

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline Tensor new_cuda_tensor(int32_t device, std::initializer_list<int64_t> sizes, ScalarType type) {
  return new_tensor_on(aoti_torch_device_type_cuda(), device, sizes, type);
}

constexpr int kThreads = 256;
constexpr int kMostBlocksOfGroup = 8;  // what every device with clusters can place
constexpr int64_t kRowsOfLaunch = int64_t{1} << 27;

// The number of blocks that share a row: enough for a warp a tile, fewer where rows alone fill the device,
// and one where the code that runs was not compiled for clusters. Only speed depends on it.
inline int blocks_of_group(const void* kernel, int64_t rows, int64_t tiles) {
  cudaFuncAttributes attributes;
  STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  if (attributes.ptxVersion < 90) return 1;
  int device = 0;
  int processors = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  constexpr int64_t kWarps = kThreads / 32;
  int blocks = 1;
  while (blocks < kMostBlocksOfGroup && blocks * kWarps < tiles && 2 * blocks * rows <= 8 * processors) blocks *= 2;
  return blocks;
}

// Launches a group of blocks for each row: `kernel` takes one argument, by value.
template <typename Argument>
void launch_rows(
    void (*kernel)(Argument), const Argument& argument, int64_t rows, int64_t tiles, int64_t shared_bytes,
    cudaStream_t stream) {
  if (rows == 0) return;
  STD_TORCH_CHECK(rows <= kRowsOfLaunch, "a launch takes ", kRowsOfLaunch, " rows, not ", rows);
  const auto* const place = reinterpret_cast<const void*>(kernel);
  constexpr int64_t kAlwaysThere = 48 << 10;
  if (shared_bytes > kAlwaysThere) {
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(place, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  const int blocks = blocks_of_group(place, rows, tiles);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(blocks);
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(rows * blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = blocks > 1 ? 1 : 0;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, argument));
}

// Calls `run` with the tag of the element type of `logits`.
template <typename Run>
void for_element_type(const Tensor& logits, const char* op, const Run& run) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return run(Float32{});
    case ScalarType::BFloat16:
      return run(BFloat16{});
    case ScalarType::Half:
      return run(Float16{});
    default:
      STD_TORCH_CHECK(false, op, ": logits must be float32, bfloat16 or float16");
  }
}

}  // namespace tq
