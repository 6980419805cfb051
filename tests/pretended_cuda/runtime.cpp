// A pretended CUDA runtime: the functions of libcudart that torch calls, without a GPU.
//
// Kernels do nothing. Device memory is a range of addresses that nothing can be stored in: what is
// copied from it to the host is zeros, and host code that touches it gets the segmentation fault
// that it would get with a GPU. Streams execute what is submitted to them at once, but the order
// that events and waits guarantee is followed, so that work whose order is left to chance is seen.
// Stream capture follows section 3.2.8.7.3 of the CUDA Programming Guide, with its errors.
#include "pretended.h"

#include <cxxabi.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>
#include <unordered_map>
#include <utility>
#include <vector>

namespace pretended {

std::recursive_mutex mutex;
using Lock = std::lock_guard<std::recursive_mutex>;

// For each stream, how much of the work submitted to it is known to be done by a certain point.
using Clock = std::map<cudaStream_t, unsigned long long>;

struct Operation {
    std::string kind, name;
    cudaStream_t stream;
    bool ordered;  // begins after all work submitted before it, to whatever stream, has ended
};

struct Graph {
    std::vector<Operation> nodes;
};

struct Capture {
    unsigned long long id;
    cudaStream_t origin;
    cudaStreamCaptureMode mode;
    const void* thread;                    // that began it
    std::map<cudaStream_t, Clock> clocks;  // of the streams that are part of it
    Graph* graph;
    bool broken = false;
};

struct Event {
    bool recorded = false;
    unsigned long long capture = 0;  // the id of the capture it was recorded in
    Clock clock;
    unsigned long long time = 0;     // in recorded events
};

struct Memory {
    size_t size;
    cudaMemoryType type;
};

static std::map<cudaStream_t, Clock> clocks;  // of the streams, outside captures
static Clock host_clock;                      // what the host has waited for
static std::map<cudaStream_t, bool> waits_for_legacy_stream;  // not so with cudaStreamNonBlocking
static std::vector<Capture*> captures;        // under way
static std::map<cudaEvent_t, Event> events;
static std::map<char*, Memory> memory;
static std::unordered_map<const void*, const char*> kernel_names;
static std::vector<Operation> log_;
static std::vector<Graph*> graphs;  // captured, in their order
static std::string problems;
static bool logging = false;
static size_t device_bytes = 0;

static thread_local cudaError_t last_error = cudaSuccess;
static thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static thread_local int current_device = 0;
static const void* this_thread() { return &last_error; }

static double setting(const char* name, double otherwise) {
    const char* value = getenv(name);
    return value ? atof(value) : otherwise;
}

static size_t device_capacity() { return setting("PRETENDED_CUDA_GIB", 80) * (1ull << 30); }
static int device_count() { return setting("PRETENDED_CUDA_DEVICES", 1); }
static int capability() { return setting("PRETENDED_CUDA_CAPABILITY", 90); }
static int driver_version() { return setting("PRETENDED_CUDA_DRIVER", 13000); }
constexpr int oldest_capability = 75;  // that CUDA 13 compiles kernels for

static cudaError_t fail(cudaError_t error) { return last_error = error; }

static void note_problem(const std::string& text) { problems += text + '\n'; }

static void note(const char* kind, const std::string& name, cudaStream_t stream = nullptr,
                 bool ordered = true) {
    if (logging) log_.push_back({kind, name, stream, ordered});
}

static void merge(Clock& clock, const Clock& other) {
    for (const auto& [stream, count] : other) clock[stream] = std::max(clock[stream], count);
}

static Capture* capture_of(cudaStream_t stream) {
    for (Capture* capture : captures)
        if (capture->clocks.count(stream)) return capture;
    return nullptr;
}

static cudaError_t break_capture(Capture* capture, const std::string& what, cudaError_t error) {
    capture->broken = true;
    note_problem(what + " broke a capture");
    return fail(error);
}

// Does work that comes after `clock` come after everything submitted to these streams?
static bool is_after_all(const Clock& clock, const std::map<cudaStream_t, Clock>& streams) {
    for (const auto& [stream, other] : streams) {
        auto submitted = other.find(stream), known = clock.find(stream);
        if (submitted != other.end()
            && (known == clock.end() || known->second < submitted->second)) return false;
    }
    return true;
}

cudaError_t submit(cudaStream_t stream, const char* kind, const std::string& name) {
    Lock lock(mutex);
    Capture* capture = capture_of(stream);
    if (capture && capture->broken) return fail(cudaErrorStreamCaptureInvalidated);
    if (capture) {
        Clock& clock = capture->clocks[stream];
        capture->graph->nodes.push_back({kind, name, stream, is_after_all(clock, capture->clocks)});
        clock[stream]++;
        return cudaSuccess;
    }
    for (Capture* other : captures) {
        if (stream == nullptr && waits_for_legacy_stream[other->origin])
            return break_capture(other, name + " on the legacy stream",
                                 cudaErrorStreamCaptureImplicit);
        note_problem(std::string(kind) + " " + name + " was left out of a capture");
    }
    Clock& clock = clocks[stream];
    merge(clock, host_clock);
    note(kind, name, stream, is_after_all(clock, clocks));
    clock[stream]++;
    return cudaSuccess;
}

cudaError_t potentially_unsafe(const char* call) {
    if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
    cudaError_t error = cudaSuccess;
    for (Capture* capture : captures) {
        bool own = capture->thread == this_thread();
        if ((capture->mode == cudaStreamCaptureModeGlobal
             && thread_mode == cudaStreamCaptureModeGlobal)
            || (capture->mode != cudaStreamCaptureModeRelaxed && own))
            error = break_capture(capture, call, cudaErrorStreamCaptureUnsupported);
    }
    return error;
}

static cudaError_t launch(const void* function, dim3 grid, cudaStream_t stream) {
    Lock lock(mutex);
    if (capability() < oldest_capability) return fail(cudaErrorNoKernelImageForDevice);
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return fail(cudaErrorInvalidConfiguration);
    auto found = kernel_names.find(function);
    return submit(stream, "kernel", found == kernel_names.end() ? "unknown" : found->second);
}

static Memory* memory_at(const void* address) {
    auto next = memory.upper_bound((char*)address);
    if (next == memory.begin()) return nullptr;
    auto& [start, range] = *std::prev(next);
    return (char*)address < start + range.size ? &range : nullptr;
}

static cudaMemoryType type_at(const void* address) {
    Memory* found = memory_at(address);
    return found ? found->type : cudaMemoryTypeUnregistered;
}

static cudaError_t reserve(void** address, size_t size, cudaMemoryType type) {
    int protection = type == cudaMemoryTypeDevice ? PROT_NONE : PROT_READ | PROT_WRITE;
    *address = mmap(nullptr, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*address == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
    memory[(char*)*address] = {size, type};
    return cudaSuccess;
}

static cudaError_t release(void* address) {
    auto found = memory.find((char*)address);
    if (found == memory.end()) return fail(cudaErrorInvalidValue);
    if (found->second.type == cudaMemoryTypeDevice) device_bytes -= found->second.size;
    munmap(address, found->second.size);
    memory.erase(found);
    return cudaSuccess;
}

static cudaError_t copy(void* to, const void* from, size_t size, cudaStream_t stream) {
    static const char* const places[] = {"pageable host", "pinned host", "device"};
    auto place = [](const void* address) { return places[type_at(address)]; };
    Lock lock(mutex);
    std::string name = std::string(place(from)) + " to " + place(to);
    if (Capture* capture = capture_of(stream); capture && name.find("pageable") != name.npos)
        return break_capture(capture, "copy from " + name, cudaErrorStreamCaptureUnsupported);
    bool captured = capture_of(stream);
    if (cudaError_t error = submit(stream, "copy", name)) return error;
    if (captured || type_at(to) == cudaMemoryTypeDevice) return cudaSuccess;
    if (type_at(from) == cudaMemoryTypeDevice)
        memset(to, 0, size);
    else
        memmove(to, from, size);
    return cudaSuccess;
}

// The host waits until the work of `clock` is done.
static cudaError_t synchronize(const char* call, const Clock& clock) {
    note("synchronize", call);
    if (cudaError_t error = potentially_unsafe(call)) return error;
    merge(host_clock, clock);
    return cudaSuccess;
}

static std::string as_lines(const std::vector<Operation>& operations) {
    std::ostringstream lines;
    for (const Operation& operation : operations) {
        int failed;
        char* plain = abi::__cxa_demangle(operation.name.c_str(), nullptr, nullptr, &failed);
        lines << operation.kind << '\t' << operation.stream << '\t' << operation.ordered << '\t'
              << (failed ? operation.name : plain) << '\n';
        free(plain);
    }
    return lines.str();
}

}  // namespace pretended

using namespace pretended;

// ---- for the tests, through ctypes: a line for each operation, valid until the next call ------

EXPORTED void pretended_start_log() {
    Lock lock(mutex);
    log_.clear();
    logging = true;
}

EXPORTED const char* pretended_end_log() {
    static std::string lines;
    Lock lock(mutex);
    logging = false;
    return (lines = as_lines(log_)).c_str();
}

EXPORTED int pretended_graph_count() { return graphs.size(); }

EXPORTED const char* pretended_graph(int number) {
    static std::string lines;
    Lock lock(mutex);
    return (lines = as_lines(graphs.at(number)->nodes)).c_str();
}

EXPORTED const char* pretended_problems() {
    static std::string lines;
    Lock lock(mutex);
    return (lines = std::exchange(problems, "")).c_str();
}

// ---- kernels -----------------------------------------------------------------------------------

struct Configuration {
    dim3 grid, block;
    size_t shared_memory;
    cudaStream_t stream;
};

static thread_local std::vector<Configuration> configurations;

EXPORTED void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}

EXPORTED void __cudaRegisterFatBinaryEnd(void**) {}

EXPORTED void __cudaUnregisterFatBinary(void**) {}

EXPORTED void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int,
                                     void*, void*, void*, void*, int*) {
    Lock lock(mutex);
    kernel_names[function] = name;
}

EXPORTED void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

EXPORTED unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_memory,
                                              cudaStream_t stream) {
    configurations.push_back({grid, block, shared_memory, stream});
    return 0;
}

EXPORTED cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_memory,
                                                void* stream) {
    Configuration last = configurations.back();
    configurations.pop_back();
    *grid = last.grid, *block = last.block, *shared_memory = last.shared_memory;
    *(cudaStream_t*)stream = last.stream;
    return cudaSuccess;
}

EXPORTED cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

EXPORTED cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3, void**, size_t,
                                        cudaStream_t stream) {
    return launch(kernel, grid, stream);
}

EXPORTED cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3, void**, size_t,
                                      cudaStream_t stream) {
    return launch(function, grid, stream);
}

EXPORTED cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                         void**) {
    return launch(function, config->gridDim, config->stream);
}

EXPORTED cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    *attributes = {};
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->ptxVersion = attributes->binaryVersion = capability();
    attributes->maxDynamicSharedSizeBytes = 232448;
    return cudaSuccess;
}

EXPORTED cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
    return cudaSuccess;
}

EXPORTED cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        int* blocks, const void*, int, size_t, unsigned) {
    *blocks = 2;
    return cudaSuccess;
}

EXPORTED cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
    Lock lock(mutex);
    if (!capture_of(stream)) function(data);
    return cudaSuccess;
}

// ---- devices: the numbers are an H100's -------------------------------------------------------

EXPORTED cudaError_t cudaDriverGetVersion(int* version) {
    *version = driver_version();
    return cudaSuccess;
}

EXPORTED cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

EXPORTED cudaError_t cudaGetDeviceCount(int* count) {
    *count = 0;
    if (driver_version() < CUDART_VERSION / 1000 * 1000) return fail(cudaErrorInsufficientDriver);
    if (device_count() == 0) return fail(cudaErrorNoDevice);
    *count = device_count();
    return cudaSuccess;
}

EXPORTED cudaError_t cudaGetDevice(int* device) {
    *device = current_device;
    return cudaSuccess;
}

EXPORTED cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= device_count()) return fail(cudaErrorInvalidDevice);
    current_device = device;
    return cudaSuccess;
}

EXPORTED cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
    *properties = {};
    strcpy(properties->name, "Pretended GPU");
    properties->major = capability() / 10, properties->minor = capability() % 10;
    properties->totalGlobalMem = device_capacity();
    properties->multiProcessorCount = 132;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = 1024;
    properties->maxThreadsPerMultiProcessor = 2048;
    properties->maxBlocksPerMultiProcessor = 32;
    properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
    properties->maxThreadsDim[2] = 64;
    properties->maxGridSize[0] = 2147483647;
    properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
    properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
    properties->sharedMemPerBlock = 49152;
    properties->sharedMemPerBlockOptin = 232448;
    properties->sharedMemPerMultiprocessor = 233472;
    properties->totalConstMem = 65536;
    properties->l2CacheSize = 50 << 20;
    properties->textureAlignment = 512;
    properties->concurrentKernels = properties->canMapHostMemory = 1;
    properties->unifiedAddressing = 1;
    return cudaSuccess;
}

EXPORTED cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp properties;
    cudaGetDeviceProperties(&properties, device);
    const std::map<cudaDeviceAttr, int> values = {
        {cudaDevAttrComputeCapabilityMajor, properties.major},
        {cudaDevAttrComputeCapabilityMinor, properties.minor},
        {cudaDevAttrMultiProcessorCount, properties.multiProcessorCount},
        {cudaDevAttrWarpSize, properties.warpSize},
        {cudaDevAttrMaxThreadsPerBlock, properties.maxThreadsPerBlock},
        {cudaDevAttrMaxThreadsPerMultiProcessor, properties.maxThreadsPerMultiProcessor},
        {cudaDevAttrMaxGridDimX, properties.maxGridSize[0]},
        {cudaDevAttrMaxGridDimY, properties.maxGridSize[1]},
        {cudaDevAttrMaxGridDimZ, properties.maxGridSize[2]},
        {cudaDevAttrMaxSharedMemoryPerBlock, (int)properties.sharedMemPerBlock},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, (int)properties.sharedMemPerBlockOptin}};
    auto found = values.find(attribute);
    *value = found == values.end() ? 0 : found->second;
    return cudaSuccess;
}

EXPORTED cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
    *can = 0;
    return cudaSuccess;
}

EXPORTED cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0, *greatest = -5;
    return cudaSuccess;
}

EXPORTED cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int device) {
    snprintf(id, size, "0000:%02x:00.0", device);
    return cudaSuccess;
}

EXPORTED cudaError_t cudaDeviceSynchronize() {
    Lock lock(mutex);
    Clock all;
    for (const auto& [stream, clock] : clocks) merge(all, clock);
    return synchronize("cudaDeviceSynchronize", all);
}

EXPORTED cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

EXPORTED cudaError_t cudaPeekAtLastError() { return last_error; }

// There is no driver to have entry points; torch then does without what it wants them for.
EXPORTED cudaError_t cudaGetDriverEntryPointByVersion(
        const char*, void** function, unsigned, unsigned long long,
        cudaDriverEntryPointQueryResult* result) {
    *function = nullptr;
    if (result) *result = cudaDriverEntryPointSymbolNotFound;
    return cudaErrorSymbolNotFound;
}

EXPORTED cudaError_t cudaProfilerStart() { return cudaSuccess; }

EXPORTED cudaError_t cudaProfilerStop() { return cudaSuccess; }

// ---- memory ------------------------------------------------------------------------------------

EXPORTED cudaError_t cudaMalloc(void** address, size_t size) {
    Lock lock(mutex);
    note("allocate", "cudaMalloc");
    if (cudaError_t error = potentially_unsafe("cudaMalloc")) return error;
    if (device_bytes + size > device_capacity()) return fail(cudaErrorMemoryAllocation);
    device_bytes += size;
    return reserve(address, size, cudaMemoryTypeDevice);
}

EXPORTED cudaError_t cudaFree(void* address) {
    Lock lock(mutex);
    if (!address) return cudaSuccess;
    if (cudaError_t error = potentially_unsafe("cudaFree")) return error;
    return release(address);
}

EXPORTED cudaError_t cudaHostAlloc(void** address, size_t size, unsigned) {
    Lock lock(mutex);
    if (cudaError_t error = potentially_unsafe("cudaHostAlloc")) return error;
    return reserve(address, size, cudaMemoryTypeHost);
}

EXPORTED cudaError_t cudaFreeHost(void* address) {
    Lock lock(mutex);
    return release(address);
}

EXPORTED cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
    Lock lock(mutex);
    *total = device_capacity();
    *free_bytes = *total - device_bytes;
    return cudaSuccess;
}

EXPORTED cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes,
                                              const void* address) {
    Lock lock(mutex);
    *attributes = {};
    attributes->type = type_at(address);
    attributes->device = current_device;
    attributes->devicePointer = attributes->hostPointer = (void*)address;
    return cudaSuccess;
}

EXPORTED cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind,
                                     cudaStream_t stream) {
    return copy(to, from, size, stream);
}

EXPORTED cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
    Lock lock(mutex);
    if (cudaError_t error = synchronize("cudaMemcpy", clocks[nullptr])) return error;
    return copy(to, from, size, nullptr);
}

EXPORTED cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t stream) {
    return submit(stream, "memset", "");
}

EXPORTED cudaError_t cudaMemset(void*, int, size_t) {
    Lock lock(mutex);
    if (cudaError_t error = potentially_unsafe("cudaMemset")) return error;
    return submit(nullptr, "memset", "");
}

EXPORTED cudaError_t cudaGetSymbolAddress(void** address, const void*) {
    static char symbol[1 << 16];
    *address = symbol;
    return cudaSuccess;
}

EXPORTED cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) {
    return cudaSuccess;
}

// ---- streams and events ------------------------------------------------------------------------

EXPORTED cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
    static size_t last = 0x1000;  // streams 1 and 2 have a meaning of their own
    Lock lock(mutex);
    *stream = (cudaStream_t)(last += 0x10);
    waits_for_legacy_stream[*stream] = flags != cudaStreamNonBlocking;
    return cudaSuccess;
}

EXPORTED cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}

EXPORTED cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    return cudaStreamCreateWithPriority(stream, cudaStreamDefault, 0);
}

EXPORTED cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

EXPORTED cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
    *priority = 0;
    return cudaSuccess;
}

EXPORTED cudaError_t cudaStreamQuery(cudaStream_t stream) {
    Lock lock(mutex);
    if (Capture* capture = capture_of(stream))
        return break_capture(capture, "cudaStreamQuery", cudaErrorStreamCaptureUnsupported);
    return cudaSuccess;
}

EXPORTED cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    Lock lock(mutex);
    if (Capture* capture = capture_of(stream))
        return break_capture(capture, "cudaStreamSynchronize", cudaErrorStreamCaptureUnsupported);
    return synchronize("cudaStreamSynchronize", clocks[stream]);
}

EXPORTED cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event_handle, unsigned) {
    Lock lock(mutex);
    const Event& event = events[event_handle];
    if (!event.recorded) return cudaSuccess;
    Capture* capture = capture_of(stream);
    if (!event.capture) {
        if (capture)
            return break_capture(capture, "waiting for an event of outside",
                                 cudaErrorStreamCaptureIsolation);
        merge(clocks[stream], event.clock);
        return cudaSuccess;
    }
    auto recorded_in = std::find_if(captures.begin(), captures.end(), [&](Capture* other) {
        return other->id == event.capture;
    });
    if (recorded_in == captures.end()) return fail(cudaErrorCapturedEvent);
    if (capture && capture != *recorded_in)
        return break_capture(capture, "waiting for an event of another capture",
                             cudaErrorStreamCaptureMerge);
    Clock& clock = (*recorded_in)->clocks[stream];  // the stream becomes part of the capture
    merge(clock, event.clock);
    if (!capture) clock[stream]++;  // and has to be joined, even if nothing is submitted to it
    return cudaSuccess;
}

EXPORTED cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    static size_t last = 0x9000000;
    Lock lock(mutex);
    *event = (cudaEvent_t)(last += 0x10);
    events[*event] = {};
    return cudaSuccess;
}

EXPORTED cudaError_t cudaEventCreate(cudaEvent_t* event) {
    return cudaEventCreateWithFlags(event, 0);
}

EXPORTED cudaError_t cudaEventDestroy(cudaEvent_t event) {
    Lock lock(mutex);
    events.erase(event);
    return cudaSuccess;
}

EXPORTED cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    static unsigned long long time = 0;
    Lock lock(mutex);
    if (Capture* capture = capture_of(stream)) {
        events[event] = {true, capture->id, capture->clocks[stream], ++time};
        return cudaSuccess;
    }
    merge(clocks[stream], host_clock);
    events[event] = {true, 0, clocks[stream], ++time};
    return cudaSuccess;
}

EXPORTED cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, 0);
}

static cudaError_t refuse_captured(const Event& event) {
    for (Capture* capture : captures)
        if (capture->id == event.capture)
            return break_capture(capture, "asking for an event of the capture",
                                 cudaErrorCapturedEvent);
    return event.capture ? fail(cudaErrorCapturedEvent) : cudaSuccess;
}

EXPORTED cudaError_t cudaEventQuery(cudaEvent_t event) {
    Lock lock(mutex);
    if (cudaError_t error = refuse_captured(events[event])) return error;
    return potentially_unsafe("cudaEventQuery");
}

EXPORTED cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    Lock lock(mutex);
    if (cudaError_t error = refuse_captured(events[event])) return error;
    return synchronize("cudaEventSynchronize", events[event].clock);
}

EXPORTED cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
    Lock lock(mutex);
    if (!events[from].recorded || !events[to].recorded)
        return fail(cudaErrorInvalidResourceHandle);
    *milliseconds = (double)events[to].time - events[from].time;
    return cudaSuccess;
}

// ---- graphs ------------------------------------------------------------------------------------

EXPORTED cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    std::swap(*mode, thread_mode);
    return cudaSuccess;
}

EXPORTED cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    static unsigned long long last_id = 0;
    Lock lock(mutex);
    if (stream == nullptr) return fail(cudaErrorStreamCaptureUnsupported);
    if (capture_of(stream)) return fail(cudaErrorIllegalState);
    captures.push_back(new Capture{++last_id, stream, mode, this_thread(), {{stream, {}}},
                                   new Graph});
    return cudaSuccess;
}

EXPORTED cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    Lock lock(mutex);
    *graph = nullptr;
    Capture* capture = capture_of(stream);
    if (!capture) return fail(cudaErrorIllegalState);
    captures.erase(std::find(captures.begin(), captures.end(), capture));
    if (capture->broken) return fail(cudaErrorStreamCaptureInvalidated);
    if (stream != capture->origin) return fail(cudaErrorStreamCaptureUnmatched);
    if (!is_after_all(capture->clocks[stream], capture->clocks))
        return fail(cudaErrorStreamCaptureUnjoined);
    graphs.push_back(capture->graph);
    *graph = (cudaGraph_t)capture->graph;
    return cudaSuccess;
}

EXPORTED cudaError_t cudaStreamGetCaptureInfo(
        cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
        cudaGraph_t* graph, const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges,
        size_t* number) {
    Lock lock(mutex);
    Capture* capture = capture_of(stream);
    *status = !capture ? cudaStreamCaptureStatusNone
        : capture->broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
    if (id) *id = capture ? capture->id : 0;
    if (graph) *graph = capture ? (cudaGraph_t)capture->graph : nullptr;
    if (dependencies) *dependencies = nullptr;
    if (edges) *edges = nullptr;
    if (number) *number = 0;
    return cudaSuccess;
}

EXPORTED cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    return cudaStreamGetCaptureInfo(stream, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}

EXPORTED cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* number) {
    *number = ((Graph*)graph)->nodes.size();
    return cudaSuccess;
}

EXPORTED cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                                   unsigned long long) {
    *executable = (cudaGraphExec_t)graph;
    return cudaSuccess;
}

EXPORTED cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    Lock lock(mutex);
    auto found = std::find(graphs.begin(), graphs.end(), (Graph*)executable);
    return submit(stream, "graph", std::to_string(found - graphs.begin()));
}

EXPORTED cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) {
    return cudaSuccess;
}

EXPORTED cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }

EXPORTED cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }
