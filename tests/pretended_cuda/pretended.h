// What the pretended CUDA runtime (runtime.cpp) offers the pretended libraries (libraries.cpp).
#pragma once
#include <cuda_runtime_api.h>

#include <mutex>
#include <string>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace pretended {

// Held by every function that reads or changes what is pretended.
extern std::recursive_mutex mutex;

// Work is submitted to a stream: noted in the log or, during a capture, as a node of the graph.
// `kind` is kernel, memset, copy, collective or graph.
cudaError_t submit(cudaStream_t stream, const char* kind, const std::string& name);

// A call that may make the host wait, such as cudaMalloc: it breaks the captures that forbid this
// thread such calls, and then fails.
cudaError_t potentially_unsafe(const char* call);

}  // namespace pretended
