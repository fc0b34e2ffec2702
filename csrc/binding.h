// What the operators' bindings share: checks, memory and threads, over torch's stable ABI, so that one build serves
// several torch versions. The schemas, and a reference of each operator in plain torch, are in vllm_easyspec/ops/.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "lanes.h"

#ifdef EASYSPEC_CUDA
#include <cuda_runtime.h>
#endif

// Registers easyspec::name as the operator of that name, on a CPU or wherever this build has kernels.
#define EASYSPEC_REGISTER_ON(device, name) \
  STABLE_TORCH_LIBRARY_IMPL(vllm_easyspec, device, library) { library.impl(#name, TORCH_BOX(&easyspec::name)); }
#ifdef EASYSPEC_CUDA
#define EASYSPEC_REGISTER(name)   \
  EASYSPEC_REGISTER_ON(CPU, name) \
  EASYSPEC_REGISTER_ON(CUDA, name)
#else
#define EASYSPEC_REGISTER(name) EASYSPEC_REGISTER_ON(CPU, name)
#endif

namespace easyspec {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " is neither float32 nor bfloat16 nor float16");
  }
}

inline void check(const Tensor& tensor, const char* name, ScalarType dtype, int64_t numel) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has another dtype than the schema's docstring asks for");
  STD_TORCH_CHECK(tensor.numel() == numel, name, " has ", tensor.numel(), " elements, not ", numel);
}

inline void check_contiguous(const Tensor& tensor, const char* name, ScalarType dtype, int64_t numel) {
  check(tensor, name, dtype, numel);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous");
}

inline void check_block_table(const Tensor& table, int64_t rows) {
  STD_TORCH_CHECK(table.dim() == 2 && table.size(0) >= rows && table.stride(1) == 1,
                  "block_table is not [rows, width] with contiguous rows");
  check(table, "block_table", ScalarType::Int, table.size(0) * table.size(1));
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Where the rows from `first` on begin.
inline void* rows_from(const Tensor& tensor, int64_t first) {
  return static_cast<char*>(tensor.data_ptr()) + first * tensor.stride(0) * tensor.element_size();
}

inline void* rows_from(const std::optional<Tensor>& tensor, int64_t first) {
  return tensor ? rows_from(*tensor, first) : nullptr;
}

// A stacked weight of all layers, of which a call takes `count` from `first` on.
inline void check_stacked(const std::optional<Tensor>& tensor,
                          const char* name,
                          ScalarType dtype,
                          int64_t first,
                          int64_t count,
                          int64_t numel_of_layer) {
  if (!tensor) return;
  STD_TORCH_CHECK(first >= 0 && first + count <= tensor->size(0), name, " has ", tensor->size(0), " layers");
  check_contiguous(*tensor, name, dtype, tensor->size(0) * numel_of_layer);
}

// Memory for the intermediate results of one call on the host.
inline float* scratch(int64_t numbers) {
  static thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < numbers) memory.resize(numbers);
  return memory.data();
}

// Run a phase's tasks, of `work` multiplications each, on torch's threads; few multiplications on this one alone.
template <class Args>
void run_phase(void (*phase)(const Args&, int64_t, int64_t), const Args& args, int64_t tasks, int64_t work) {
  constexpr int64_t kWorkOfAThread = 1 << 16;
  const int64_t grain = std::max<int64_t>(1, kWorkOfAThread / std::max<int64_t>(1, work));
  if (tasks <= grain) return phase(args, 0, tasks);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { phase(args, begin, end); });
}

#ifdef EASYSPEC_CUDA
// The device of `tensor` and its current stream; raises for a kernel that could not be launched.
template <class Launch>
void on_device_of(const Tensor& tensor, Launch launch) {
  const auto index = tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  launch(stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}
#endif

}  // namespace easyspec
