// How a kernel's body is written once for both devices.
#pragma once

#ifdef __CUDACC__
#define EASYSPEC_BODY __host__ __device__ inline
#else
#define EASYSPEC_BODY inline
#endif
