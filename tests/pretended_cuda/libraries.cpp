// Pretended cuBLAS, cuDNN and NCCL, and the driver's functions that torch takes the address of.
//
// A product of matrices, a convolution or a collective is one operation of the stream, however
// many kernels the real library would launch for it. Nothing is computed or sent.
//
// Arguments that do not matter are left out of the definitions: by the calling conventions of
// x86-64 and AArch64 they are in registers or on the caller's side of the stack, to be ignored.
#include "pretended.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

using pretended::submit;

struct Handle {  // of cuBLAS and of cuDNN
    cudaStream_t stream;
};

#define SUCCEEDS(name) EXPORTED int name() { return 0; }
#define SUCCEEDS_ZERO(name) \
    EXPORTED int name(void*, int* value) { return *value = 0; }
#define MAKES(name) \
    EXPORTED int name(void** made) { return *made = malloc(1), 0; }
#define FREES(name) \
    EXPORTED int name(void* made) { return free(made), 0; }

constexpr int cublas_failed = 14, cudnn_failed = 5000, nccl_failed = 1;

// One operation of the stream that the handle was given.
static int work(Handle* handle, const char* name, int failed) {
    return submit(handle->stream, "kernel", name) ? failed : 0;
}

static int make_handle(Handle** handle, const char* call, int failed) {
    std::lock_guard<std::recursive_mutex> lock(pretended::mutex);
    if (pretended::potentially_unsafe(call)) return failed;  // it allocates and synchronizes
    *handle = new Handle{nullptr};
    return 0;
}

// ---- cuBLAS ------------------------------------------------------------------------------------

EXPORTED int cublasCreate_v2(Handle** handle) {
    return make_handle(handle, "cublasCreate", cublas_failed);
}

EXPORTED int cublasSetStream_v2(Handle* handle, cudaStream_t stream) {
    handle->stream = stream;
    return 0;
}

SUCCEEDS(cublasDestroy_v2)
SUCCEEDS(cublasSetWorkspace_v2)
SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetPointerMode_v2)
SUCCEEDS(cublasSetSmCountTarget)
SUCCEEDS_ZERO(cublasGetMathMode)
SUCCEEDS_ZERO(cublasGetPointerMode_v2)

#define PRODUCT(name) \
    EXPORTED int name(Handle* handle) { return work(handle, #name, cublas_failed); }
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasGemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDdot_v2)
PRODUCT(cublasDotEx)

MAKES(cublasLtMatmulDescCreate)
FREES(cublasLtMatmulDescDestroy)
SUCCEEDS(cublasLtMatmulDescSetAttribute)
MAKES(cublasLtMatrixLayoutCreate)
FREES(cublasLtMatrixLayoutDestroy)
SUCCEEDS(cublasLtMatrixLayoutSetAttribute)
MAKES(cublasLtMatmulPreferenceCreate)
FREES(cublasLtMatmulPreferenceDestroy)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)

EXPORTED int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int,
                                            void* results, int* number) {
    memset(results, 0, 64);  // the first of them: no workspace, success
    *number = 1;
    return 0;
}

EXPORTED int cublasLtMatmul(void*, void*, void*, void*, void*, void*, void*, void*, void*, void*,
                            void*, void*, void*, void*, size_t, cudaStream_t stream) {
    return submit(stream, "kernel", "cublasLtMatmul") ? cublas_failed : 0;
}

// ---- cuDNN -------------------------------------------------------------------------------------

EXPORTED int cudnnCreate(Handle** handle) {
    return make_handle(handle, "cudnnCreate", cudnn_failed);
}

EXPORTED int cudnnSetStream(Handle* handle, cudaStream_t stream) {
    handle->stream = stream;
    return 0;
}

EXPORTED int cudnnGetStream(Handle* handle, cudaStream_t* stream) {
    *stream = handle->stream;
    return 0;
}

SUCCEEDS(cudnnDestroy)

// Convolutions go by the graph API: descriptors of tensors, of the convolution, of a graph of
// operations, of an engine and of its configuration lead to one of an execution plan. All that
// matters here is which operation a descriptor stands for. The constants are cudnn_graph.h's.
constexpr int convolution_forward = 10, convolution_backward_filter = 11,
              convolution_backward_data = 12;  // cudnnBackendDescriptorType_t
constexpr int type_int64 = 3, type_descriptor = 15;  // cudnnBackendAttributeType_t

struct Descriptor {
    const char* operation;  // null if it is part of none
};

EXPORTED int cudnnBackendCreateDescriptor(int type, Descriptor** made) {
    *made = new Descriptor{
        type == convolution_forward ? "cudnnConvolutionForward"
        : type == convolution_backward_filter ? "cudnnConvolutionBackwardFilter"
        : type == convolution_backward_data ? "cudnnConvolutionBackwardData" : nullptr};
    return 0;
}

EXPORTED int cudnnBackendDestroyDescriptor(Descriptor* descriptor) {
    delete descriptor;
    return 0;
}

EXPORTED int cudnnBackendSetAttribute(Descriptor* descriptor, int, int type, int64_t number,
                                      Descriptor* const* parts) {
    for (int64_t i = 0; type == type_descriptor && i < number; i++)
        if (parts[i]->operation) descriptor->operation = parts[i]->operation;
    return 0;
}

SUCCEEDS(cudnnBackendFinalize)

// An engine or a configuration (one of each is all there is), a size of 0, or an empty list.
EXPORTED int cudnnBackendGetAttribute(Descriptor* descriptor, int, int type, int64_t,
                                      int64_t* number, void* values) {
    if (number) *number = type == type_descriptor || type == type_int64;
    if (values && type == type_descriptor)
        (*(Descriptor**)values)->operation = descriptor->operation;
    if (values && type == type_int64) *(int64_t*)values = 0;
    return 0;
}

EXPORTED int cudnnBackendExecute(Handle* handle, Descriptor* plan, Descriptor*) {
    return work(handle, plan->operation ? plan->operation : "cuDNN", cudnn_failed);
}

MAKES(cudnnCreateTensorDescriptor)
FREES(cudnnDestroyTensorDescriptor)
SUCCEEDS(cudnnSetTensorNdDescriptor)
MAKES(cudnnCreateActivationDescriptor)
FREES(cudnnDestroyActivationDescriptor)
SUCCEEDS(cudnnSetActivationDescriptor)

#define OPERATION(name) \
    EXPORTED int name(Handle* handle) { return work(handle, #name, cudnn_failed); }
OPERATION(cudnnBatchNormalizationForwardTrainingEx)
OPERATION(cudnnBatchNormalizationForwardInference)
OPERATION(cudnnBatchNormalizationBackwardEx)

EXPORTED int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
        void*, int, int, void*, void*, void*, void*, void*, size_t* size) {
    return *size = 0;
}

EXPORTED int cudnnGetBatchNormalizationBackwardExWorkspaceSize(
        void*, int, int, void*, void*, void*, void*, void*, void*, void*, size_t* size) {
    return *size = 0;
}

EXPORTED int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(
        void*, int, int, void*, void*, size_t* size) {
    return *size = 0;
}

// ---- NCCL --------------------------------------------------------------------------------------

struct Communicator {
    int size, rank;
};

struct UniqueId {  // passed by value
    char bytes[128];
};

EXPORTED int ncclGetUniqueId(UniqueId* id) {
    *id = {};
    return 0;
}

EXPORTED int ncclCommInitRank(Communicator** made, int size, UniqueId, int rank) {
    *made = new Communicator{size, rank};
    return 0;
}

EXPORTED int ncclCommInitRankConfig(Communicator** made, int size, UniqueId id, int rank, void*) {
    return ncclCommInitRank(made, size, id, rank);
}

EXPORTED int ncclCommCount(Communicator* communicator, int* size) {
    *size = communicator->size;
    return 0;
}

EXPORTED int ncclCommUserRank(Communicator* communicator, int* rank) {
    *rank = communicator->rank;
    return 0;
}

SUCCEEDS_ZERO(ncclCommGetAsyncError)
SUCCEEDS(ncclCommDestroy)
SUCCEEDS(ncclCommAbort)
SUCCEEDS(ncclCommFinalize)
SUCCEEDS(ncclCommRegister)
SUCCEEDS(ncclCommDeregister)
SUCCEEDS(ncclGroupStart)
SUCCEEDS(ncclGroupEnd)

static int collective(const char* name, cudaStream_t stream) {
    return submit(stream, "collective", name) ? nccl_failed : 0;
}

EXPORTED int ncclAllReduce(void*, void*, size_t, int, int, void*, cudaStream_t stream) {
    return collective("ncclAllReduce", stream);
}

EXPORTED int ncclBroadcast(void*, void*, size_t, int, int, void*, cudaStream_t stream) {
    return collective("ncclBroadcast", stream);
}

EXPORTED int ncclBcast(void*, size_t, int, int, void*, cudaStream_t stream) {
    return collective("ncclBcast", stream);
}

EXPORTED int ncclAllGather(void*, void*, size_t, int, void*, cudaStream_t stream) {
    return collective("ncclAllGather", stream);
}

EXPORTED int ncclReduceScatter(void*, void*, size_t, int, int, void*, cudaStream_t stream) {
    return collective("ncclReduceScatter", stream);
}

// ---- the driver, libcuda.so.1: for libcaffe2_nvrtc.so, which needs all of these to be there ----

SUCCEEDS(cuInit)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuDeviceGet)
SUCCEEDS(cuDeviceGetAttribute)
SUCCEEDS(cuDevicePrimaryCtxRetain)
SUCCEEDS(cuFuncGetAttribute)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuLaunchCooperativeKernel)
SUCCEEDS(cuLaunchKernel)
SUCCEEDS(cuLinkAddData_v2)
SUCCEEDS(cuLinkComplete)
SUCCEEDS(cuLinkCreate_v2)
SUCCEEDS(cuModuleGetFunction)
SUCCEEDS(cuModuleLoad)
SUCCEEDS(cuModuleLoadData)
SUCCEEDS(cuModuleLoadDataEx)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuOccupancyMaxActiveBlocksPerMultiprocessor)
SUCCEEDS(cuPointerGetAttribute)
SUCCEEDS(cuTensorMapEncodeTiled)

EXPORTED int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
    *flags = 0, *active = 1;
    return 0;
}

EXPORTED int cuCtxGetCurrent(void** context) {
    *context = (void*)1;
    return 0;
}

EXPORTED int cuGetErrorString(int, const char** text) {
    *text = "pretended";
    return 0;
}
