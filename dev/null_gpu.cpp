// The libraries of a GPU that computes nothing, for dev/null_gpu.py: what torch 2.11 with CUDA 13 calls of the runtime,
// cuBLAS, NCCL and the driver. A function that says nothing else succeeds and does nothing; NOTHING lists these.
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace {

int get_number(const char *name, int otherwise) { return getenv(name) ? atoi(getenv(name)) : otherwise; }

const int NUM_GPUS = get_number("NULL_GPU_COUNT", 1), CAPABILITY = get_number("NULL_GPU_CAPABILITY", 90);
const size_t TOTAL_BYTES = size_t(get_number("NULL_GPU_GIB", 80)) << 30, PAGE = 4096;
const int NUM_PROCESSORS = CAPABILITY == 120 ? 170 : CAPABILITY == 100 ? 148 : CAPABILITY == 90 ? 132 :
                           CAPABILITY == 89 ? 128 : CAPABILITY == 86 ? 82 : CAPABILITY == 80 ? 108 : 40;
const int SHARED_BYTES = CAPABILITY >= 90 && CAPABILITY < 120 ? 232448 : CAPABILITY == 80 ? 166912 : 101376;
const bool IS_VERBOSE = get_number("NULL_GPU_VERBOSE", 0) != 0;

// Memory: the host's, which has a page only once it is written

enum Kind { PAGEABLE, DEVICE, PINNED };
struct Block { size_t num_bytes; Kind kind; };
std::map<uintptr_t, Block> blocks;    // by address
std::mutex mutex;
std::atomic<size_t> used_bytes{0}, next_handle{4096};

template <class T> void make_handle(T *handle) { *handle = reinterpret_cast<T>(next_handle += 16); }

size_t count_pages(size_t num_bytes) { return (num_bytes + PAGE) / PAGE * PAGE; }    // at least one

void *reserve(size_t num_bytes, Kind kind) {
    num_bytes = count_pages(num_bytes);
    void *start = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) {
        fprintf(stderr, "null GPU: this machine's limits refuse %zu bytes of address space\n", num_bytes);
        abort();
    }
    std::lock_guard<std::mutex> lock(mutex);
    blocks[uintptr_t(start)] = {num_bytes, kind};
    return start;
}

void release(void *start) {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = blocks.find(uintptr_t(start));
    if (found == blocks.end()) return;
    if (found->second.kind == DEVICE) used_bytes -= found->second.num_bytes;
    munmap(start, found->second.num_bytes);
    blocks.erase(found);
}

// The block of an address and the bytes from there to its end
Block find_block(const void *address) {
    std::lock_guard<std::mutex> lock(mutex);
    auto next = blocks.upper_bound(uintptr_t(address));
    if (next == blocks.begin()) return {0, PAGEABLE};
    auto [start, block] = *--next;
    size_t offset = uintptr_t(address) - start;
    return offset < block.num_bytes ? Block{block.num_bytes - offset, block.kind} : Block{0, PAGEABLE};
}

// Errors and captures: a thread that captures is refused allocations, waits, questions and copies of pageable memory

thread_local int last_error = 0, device = 0, num_captured = 0;
thread_local cudaStream_t capturing = nullptr;
thread_local bool is_invalid = false;    // the capture
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

template <class T = cudaError_t> T fail(cudaError_t error, const char *what) {
    fprintf(stderr, "null GPU: %s\n", what);
    last_error = error;
    is_invalid |= error == cudaErrorStreamCaptureUnsupported;
    return T(error);
}

bool is_refused() { return capturing && capture_mode != cudaStreamCaptureModeRelaxed; }

cudaError_t refuse_in_capture(const char *what) {
    return is_refused() ? fail(cudaErrorStreamCaptureUnsupported, what) : cudaSuccess;
}

cudaError_t copy(void *target, const void *source, size_t num_bytes, bool is_captured) {
    for (const void *address : {static_cast<const void *>(target), source}) {
        Block block = find_block(address);
        if (block.kind != PAGEABLE && num_bytes > block.num_bytes)
            return fail(cudaErrorInvalidValue, "a copy goes beyond its memory");
        if (is_captured && block.kind == PAGEABLE)
            return fail(cudaErrorStreamCaptureUnsupported, "a copy of pageable memory while a graph is captured");
    }
    if (!is_captured) memmove(target, source, num_bytes);
    return cudaSuccess;
}

cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes) {
    num_captured += capturing != nullptr;
    bool is_grid = grid.x && grid.y && grid.z && grid.y <= 65535 && grid.z <= 65535;
    size_t num_threads = size_t(block.x) * block.y * block.z;
    if (is_grid && num_threads && num_threads <= 1024 && shared_bytes <= size_t(SHARED_BYTES)) return cudaSuccess;
    return fail(cudaErrorInvalidConfiguration, "a kernel whose grid, block or shared memory no GPU takes");
}

int get_attribute(int attribute) {    // by the numbers of CUdevice_attribute
    static const std::map<int, int> values = {
        {4, 64}, {5, 2147483647}, {6, 65535}, {7, 65535}, {8, 49152}, {10, 32}, {12, 65536}, {13, 1980000},
        {16, NUM_PROCESSORS}, {18, 0}, {36, 2619000}, {37, 5120}, {38, 50 << 20}, {39, 2048}, {75, CAPABILITY / 10},
        {76, CAPABILITY % 10}, {81, SHARED_BYTES + 1024}, {82, 65536}, {97, SHARED_BYTES}, {106, 32}, {132, 0}};
    if (attribute >= 1 && attribute <= 3) return 1024;
    auto found = values.find(attribute);
    return found == values.end() ? 1 : found->second;
}

int announce(const char *what, size_t count) {
    if (IS_VERBOSE) fprintf(stderr, "null GPU: %s of %zu\n", what, count);
    return 0;
}

}  // namespace

// By another name to the compiler, since the headers declare it with arguments
#define NOTHING(name) int nothing_##name() asm(#name); int nothing_##name() { return 0; }
#define OK return cudaSuccess

extern "C" {

// The runtime

cudaError_t cudaMalloc(void **start, size_t num_bytes) {
    if (auto error = refuse_in_capture("memory is asked for while a graph is captured")) return error;
    if (used_bytes + count_pages(num_bytes) > TOTAL_BYTES)
        return cudaError_t(last_error = cudaErrorMemoryAllocation);
    used_bytes += count_pages(num_bytes);
    *start = reserve(num_bytes, DEVICE);
    OK;
}
cudaError_t cudaHostAlloc(void **start, size_t num_bytes, unsigned) { *start = reserve(num_bytes, PINNED); OK; }
cudaError_t cudaFree(void *start) { release(start); OK; }
cudaError_t cudaFreeHost(void *start) { release(start); OK; }
cudaError_t cudaHostRegister(void *start, size_t num_bytes, unsigned) {
    std::lock_guard<std::mutex> lock(mutex);
    blocks[uintptr_t(start)] = {num_bytes, PINNED};
    OK;
}
cudaError_t cudaHostUnregister(void *start) {
    std::lock_guard<std::mutex> lock(mutex);
    blocks.erase(uintptr_t(start));
    OK;
}
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    *free_bytes = TOTAL_BYTES - used_bytes;
    *total_bytes = TOTAL_BYTES;
    OK;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *address) {
    Kind kind = find_block(address).kind;
    *attributes = {};
    attributes->type = kind == DEVICE ? cudaMemoryTypeDevice : kind == PINNED ? cudaMemoryTypeHost :
                       cudaMemoryTypeUnregistered;
    attributes->device = device;
    attributes->devicePointer = kind == PAGEABLE ? nullptr : const_cast<void *>(address);
    attributes->hostPointer = kind == PINNED ? const_cast<void *>(address) : nullptr;
    OK;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status) {
    *status = capturing && stream == capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    OK;
}
cudaError_t cudaMemcpyAsync(void *target, const void *source, size_t num_bytes, cudaMemcpyKind, cudaStream_t stream) {
    return copy(target, source, num_bytes, capturing && stream == capturing);
}
cudaError_t cudaMemcpy(void *target, const void *source, size_t num_bytes, cudaMemcpyKind) {
    if (auto error = refuse_in_capture("a copy that waits while a graph is captured")) return error;
    return copy(target, source, num_bytes, false);
}
cudaError_t cudaMemcpyPeerAsync(void *target, int, const void *source, int, size_t num_bytes, cudaStream_t) {
    return copy(target, source, num_bytes, false);
}
cudaError_t cudaMemcpy2DAsync(void *target, size_t target_pitch, const void *source, size_t pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t stream) {
    for (size_t i = 0; i < height; ++i)
        if (auto error = copy(static_cast<char *>(target) + i * target_pitch,
                              static_cast<const char *>(source) + i * pitch, width, capturing && stream == capturing))
            return error;
    OK;
}
cudaError_t cudaMemsetAsync(void *start, int value, size_t num_bytes, cudaStream_t stream) {
    if (capturing && stream == capturing) OK;
    if (num_bytes < 1 << 20) { memset(start, value, num_bytes); OK; }
    uintptr_t first = (uintptr_t(start) + PAGE - 1) / PAGE * PAGE, end = (uintptr_t(start) + num_bytes) / PAGE * PAGE;
    madvise(reinterpret_cast<void *>(first), end - first, MADV_DONTNEED);    // zeros that need no memory
    OK;
}
cudaError_t cudaMemset(void *start, int value, size_t num_bytes) {
    return cudaMemsetAsync(start, value, num_bytes, nullptr);
}

cudaError_t cudaGetDevice(int *number) { *number = device; OK; }
cudaError_t cudaSetDevice(int number) {
    if (number < 0 || number >= NUM_GPUS) return fail(cudaErrorInvalidDevice, "a GPU that isn't there");
    device = number;
    OK;
}
cudaError_t cudaGetDeviceCount(int *count) { *count = NUM_GPUS; OK; }
cudaError_t cudaGetLastError() { cudaError_t error = cudaError_t(last_error); last_error = 0; return error; }
cudaError_t cudaPeekAtLastError() { return cudaError_t(last_error); }
const char *cudaGetErrorName(cudaError_t) { return "of the null GPU"; }
const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorStreamCaptureUnsupported ? "operation not permitted when stream is capturing" :
           error == cudaErrorMemoryAllocation ? "out of memory" : "refused by the null GPU";
}
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; OK; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; OK; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int) {
    *properties = {};
    strcpy(properties->name, CAPABILITY == 90 ? "NVIDIA H100 80GB HBM3" : CAPABILITY == 80 ? "NVIDIA A100-SXM4-80GB" :
           "null GPU");
    properties->totalGlobalMem = TOTAL_BYTES;
    properties->major = CAPABILITY / 10;
    properties->minor = CAPABILITY % 10;
    properties->multiProcessorCount = NUM_PROCESSORS;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = 1024;
    properties->maxThreadsPerMultiProcessor = 2048;
    properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
    properties->sharedMemPerBlock = 49152;
    properties->sharedMemPerBlockOptin = SHARED_BYTES;
    properties->sharedMemPerMultiprocessor = SHARED_BYTES + 1024;
    properties->l2CacheSize = 50 << 20;
    properties->maxBlocksPerMultiProcessor = 32;
    for (int i = 0; i < 3; ++i) {
        properties->maxThreadsDim[i] = i == 2 ? 64 : 1024;
        properties->maxGridSize[i] = i == 0 ? 2147483647 : 65535;
    }
    OK;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    *value = get_attribute(attribute);
    OK;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *most) { *least = 0; *most = -5; OK; }
cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int) { snprintf(text, size, "0000:00:00.0"); OK; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int, int) { *can = 0; OK; }
cudaError_t cudaDeviceSynchronize() { return refuse_in_capture("a wait for the device in a capture"); }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned, int) { make_handle(stream); OK; }
cudaError_t cudaStreamGetPriority(cudaStream_t, int *priority) { *priority = 0; OK; }
cudaError_t cudaStreamQuery(cudaStream_t) { return refuse_in_capture("a question to a stream in a capture"); }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return refuse_in_capture("a wait for a stream in a capture"); }
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void *data, unsigned) {
    function(stream, cudaSuccess, data);
    OK;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void *data) { function(data); OK; }
cudaError_t cudaEventCreate(cudaEvent_t *event) { make_handle(event); OK; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) { make_handle(event); OK; }
cudaError_t cudaEventQuery(cudaEvent_t) { return refuse_in_capture("a question to an event in a capture"); }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return refuse_in_capture("a wait for an event in a capture"); }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t, cudaEvent_t) { *ms = 1; OK; }

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    if (!stream) return fail(cudaErrorStreamCaptureUnsupported, "a capture of the default stream");
    capturing = stream;
    is_invalid = false;
    num_captured = 0;
    OK;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *graph) {
    capturing = nullptr;
    *graph = nullptr;
    if (is_invalid) return cudaErrorStreamCaptureInvalidated;
    announce("a graph", num_captured);
    make_handle(graph);
    OK;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **, const cudaGraphEdgeData **,
                                     size_t *num_dependencies) {
    cudaStreamIsCapturing(stream, status);
    if (id) *id = *status == cudaStreamCaptureStatusActive ? 1 : 0;
    if (graph) *graph = nullptr;
    if (num_dependencies) *num_dependencies = 0;
    OK;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *mode) { std::swap(*mode, capture_mode); OK; }
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t, unsigned long long) {
    make_handle(exec);
    OK;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t *, size_t *count) { *count = 1; OK; }

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *) {
    *attributes = {};
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->maxDynamicSharedSizeBytes = SHARED_BYTES;
    attributes->ptxVersion = attributes->binaryVersion = CAPABILITY;
    OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, const void *, int, size_t) { *count = 2; OK; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *, int, size_t, unsigned) {
    *count = 2;
    OK;
}
cudaError_t cudaLaunchKernel(const void *, dim3 grid, dim3 block, void **, size_t shared_bytes, cudaStream_t) {
    return launch(grid, block, shared_bytes);
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *) { make_handle(kernel); OK; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3 grid, dim3 block, void **, size_t shared_bytes, cudaStream_t) {
    return launch(grid, block, shared_bytes);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *, void **) {
    return launch(config->gridDim, config->blockDim, config->dynamicSmemBytes);
}
cudaError_t cudaGetSymbolAddress(void **address, const void *) { *address = reserve(1 << 20, DEVICE); OK; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult *result) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    if (*function) OK;
    if (IS_VERBOSE) fprintf(stderr, "null GPU: the driver has no %s\n", name);    // torch can do without some
    return cudaErrorSymbolNotFound;
}
NOTHING(cudaEventDestroy) NOTHING(cudaEventRecord) NOTHING(cudaEventRecordWithFlags) NOTHING(cudaFuncSetAttribute)
NOTHING(cudaGraphDestroy) NOTHING(cudaGraphExecDestroy) NOTHING(cudaGraphLaunch) NOTHING(cudaMemcpyToSymbol)
NOTHING(cudaProfilerStart) NOTHING(cudaProfilerStop) NOTHING(cudaStreamDestroy) NOTHING(cudaStreamWaitEvent)

// cuBLAS

cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) {
    if (is_refused()) return fail<cublasStatus_t>(cudaErrorStreamCaptureUnsupported, "cuBLAS begins in a capture");
    make_handle(handle);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t *mode) {
    *mode = CUBLAS_DEFAULT_MATH;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t *mode) {
    *mode = CUBLAS_POINTER_MODE_HOST;
    return CUBLAS_STATUS_SUCCESS;
}
size_t cublasLtGetVersion() { return CUBLAS_VERSION; }
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *made, cublasComputeType_t, cudaDataType_t) {
    make_handle(made);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *made, cudaDataType, uint64_t, uint64_t, int64_t) {
    make_handle(made);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *made) {
    make_handle(made);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t *result,
                                              int *count) {
    *result = {};
    *count = 1;
    return CUBLAS_STATUS_SUCCESS;
}
NOTHING(cublasDestroy_v2) NOTHING(cublasDotEx) NOTHING(cublasGemmEx) NOTHING(cublasGemmStridedBatchedEx)
NOTHING(cublasSetMathMode) NOTHING(cublasSetPointerMode_v2) NOTHING(cublasSetStream_v2) NOTHING(cublasSetWorkspace_v2)
NOTHING(cublasSgemm_v2) NOTHING(cublasSgemmStridedBatched) NOTHING(cublasSgemv_v2) NOTHING(cublasSgemmEx)
NOTHING(cublasDgemm_v2) NOTHING(cublasDgemmStridedBatched) NOTHING(cublasDgemv_v2) NOTHING(cublasSdot_v2)
NOTHING(cublasLtMatmul) NOTHING(cublasLtMatmulDescDestroy) NOTHING(cublasLtMatmulDescSetAttribute)
NOTHING(cublasLtMatmulPreferenceDestroy) NOTHING(cublasLtMatmulPreferenceSetAttribute)
NOTHING(cublasLtMatrixLayoutDestroy) NOTHING(cublasLtMatrixLayoutSetAttribute)

// NCCL: every rank goes on with what its own memory holds

int ncclGetVersion(int *version) { *version = 22809; return 0; }
int ncclGetUniqueId(char *id) { memset(id, 1, 128); return 0; }
int ncclCommInitRank(void **comm, ...) { make_handle(comm); return 0; }
int ncclCommInitRankConfig(void **comm, ...) { make_handle(comm); return 0; }
int ncclCommInitRankScalable(void **comm, ...) { make_handle(comm); return 0; }
int ncclCommGetAsyncError(void *, int *error) { *error = 0; return 0; }
const char *ncclGetErrorString(int) { return "of the null GPU"; }
const char *ncclGetLastError(void *) { return "of the null GPU"; }
int ncclAllReduce(const void *, void *, size_t count, ...) { return announce("all-reduce", count); }
int ncclAllGather(const void *, void *, size_t count, ...) { return announce("all-gather", count); }
int ncclReduceScatter(const void *, void *, size_t count, ...) { return announce("reduce-scatter", count); }
int ncclBroadcast(const void *, void *, size_t count, ...) { return announce("broadcast", count); }
NOTHING(ncclCommAbort) NOTHING(ncclCommDestroy) NOTHING(ncclCommFinalize) NOTHING(ncclGroupEnd) NOTHING(ncclGroupStart)

// The driver, which Triton and torch's larger allocations call

int cuDriverGetVersion(int *version) { *version = CUDART_VERSION; return 0; }
int cuDeviceGetCount(int *count) { *count = NUM_GPUS; return 0; }
int cuDeviceGet(int *number, int which) { *number = which; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int) { *value = get_attribute(attribute); return 0; }
int cuDeviceGetUuid(void *uuid, int which) { memset(uuid, which, 16); return 0; }
int cuDevicePrimaryCtxGetState(int, unsigned *flags, int *is_active) { *flags = 0; *is_active = 1; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int) { make_handle(context); return 0; }
int cuCtxGetCurrent(void **context) { make_handle(context); return 0; }
int cuCtxGetLimit(size_t *value, int) { *value = 1 << 20; return 0; }
int cuCtxGetDevice(int *number) { *number = device; return 0; }
int cuGetErrorString(int, const char **text) { *text = "of the null GPU"; return 0; }
int cuGetErrorName(int, const char **text) { *text = "of the null GPU"; return 0; }
int cuPointerGetAttribute(const void **value, int, const void *address) { *value = address; return 0; }
int cuModuleLoad(void **module, const char *) { make_handle(module); return 0; }
int cuModuleLoadData(void **module, const void *) { make_handle(module); return 0; }
int cuModuleGetFunction(void **function, void *, const char *) { make_handle(function); return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *) { *value = attribute == 0 ? 1024 : 0; return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, ...) { *count = 2; return 0; }
int cuLaunchKernel(void *, unsigned x, unsigned y, unsigned z, unsigned a, unsigned b, unsigned c,
                   unsigned shared_bytes, ...) {
    return launch({x, y, z}, {a, b, c}, shared_bytes);
}
int cuLaunchKernelEx(const unsigned *config, ...) {    // grid, block, shared memory
    return launch({config[0], config[1], config[2]}, {config[3], config[4], config[5]}, config[6]);
}
int cuMemGetAllocationGranularity(size_t *num_bytes, ...) { *num_bytes = 2 << 20; return 0; }
int cuMemAddressReserve(void **start, size_t num_bytes, ...) { *start = reserve(num_bytes, DEVICE); return 0; }
int cuMemAddressFree(void *start, size_t num_bytes) {
    used_bytes += count_pages(num_bytes);    // which release takes off; cuMemRelease has taken off what was in use
    release(start);
    return 0;
}
int cuMemCreate(size_t *handle, size_t num_bytes, ...) {
    if (used_bytes + num_bytes > TOTAL_BYTES) return cudaErrorMemoryAllocation;
    used_bytes += *handle = num_bytes;
    return 0;
}
int cuMemRelease(size_t handle) { used_bytes -= handle; return 0; }
int cuMemUnmap(void *start, size_t num_bytes) { return madvise(start, num_bytes, MADV_DONTNEED); }
int cuGetProcAddress_v2(const char *name, void **function, int, size_t, int *result) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (result) *result = *function ? 0 : 1;
    return *function ? 0 : 500;
}
NOTHING(cuInit) NOTHING(cuCtxSetCurrent) NOTHING(cuCtxSetLimit)
NOTHING(cuModuleUnload) NOTHING(cuFuncSetAttribute) NOTHING(cuMemMap)
NOTHING(cuMemSetAccess) NOTHING(cuFuncSetCacheConfig) NOTHING(cuMemExportToShareableHandle)
NOTHING(cuMemImportFromShareableHandle) NOTHING(cuMemsetD32Async) NOTHING(cuStreamWriteValue32)
NOTHING(cuMulticastAddDevice) NOTHING(cuMulticastBindMem) NOTHING(cuMulticastCreate) NOTHING(cuMulticastUnbind)
NOTHING(cuMemRetainAllocationHandle) NOTHING(cuTensorMapEncodeTiled)
NOTHING(cuMemGetAllocationPropertiesFromHandle)

}  // extern "C"
