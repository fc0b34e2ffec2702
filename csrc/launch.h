// How this project's CUDA kernels are launched: each may start before the preceding kernel has ended.
//
// A draft step is some hundred short kernels, one after another, so the time between them matters. On Hopper and newer
// a kernel launched here starts early ("programmatic dependent launch"): it lets the next one start, reads data that no
// kernel writes (weights), and only then waits for the preceding kernel. CUDA graphs preserve this.
#pragma once

#include <cuda_runtime.h>

namespace easyspec {

// Lets the next kernel in the stream start. It sees this one's results only after its own `wait_for_previous`.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits until all preceding work in the stream has ended and its writes are visible. Every kernel that `launch` starts
// must call this before it reads what kernels write, and before it writes anything.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

struct DeviceProperties {
  int multiprocessors;
  int most_shared_memory;   // bytes per block
  bool is_hopper_or_newer;  // has clusters of blocks and programmatic dependent launch
};

// Properties of the current device, queried once per device, since the query is slow.
inline const DeviceProperties& device_properties() {
  constexpr int kDevices = 64;
  static DeviceProperties known[kDevices] = {};
  int device = 0;
  cudaGetDevice(&device);
  DeviceProperties& found = known[device % kDevices];
  if (found.multiprocessors == 0) {
    int major = 0, count = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&found.most_shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    found.is_hopper_or_newer = major >= 9;
    found.multiprocessors = count;
  }
  return found;
}

// kernel<<<grid, block, shared_bytes, stream>>>(args...), started early if the device can; cluster: blocks along x per
// cluster. Errors are left to cudaGetLastError.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...),
            dim3 grid,
            dim3 block,
            int shared_bytes,
            void* stream,
            unsigned cluster,
            const Arguments&... args) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (device_properties().is_hopper_or_newer) {
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 1;
    if (cluster > 1) {
      attributes[1].id = cudaLaunchAttributeClusterDimension;
      attributes[1].val.clusterDim.x = cluster;
      attributes[1].val.clusterDim.y = 1;
      attributes[1].val.clusterDim.z = 1;
      config.numAttrs = 2;
    }
  }
  cudaLaunchKernelEx(&config, kernel, Parameters(args)...);
}

}  // namespace easyspec
