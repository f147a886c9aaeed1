// libcudart of the CUDA device in software: the calls, for one imaginary GPU.
#include "queue.hpp"

#include <cxxabi.h>

#define API extern "C" __attribute__((visibility("default")))

// For Python.

API void device_init(int (*run_)(uint64_t), int mode_, uint64_t seed) {
    gil_check = (int (*)())dlsym(RTLD_DEFAULT, "PyGILState_Check");
    gil_save = (void *(*)())dlsym(RTLD_DEFAULT, "PyEval_SaveThread");
    gil_restore = (void (*)(void *))dlsym(RTLD_DEFAULT, "PyEval_RestoreThread");
    py_run = run_;
    mode = (Mode)mode_;
    rng.seed(seed);
    poison_host = !getenv("SOFTWARE_CUDA_NO_POISON");
    device_pool.map();
    host_pool.map();
}
API void device_stop() {  // Python goes away
    Lock lock;
    py_run = nullptr;
    gil_check = nullptr;
}
API void device_schedule(int mode_, uint64_t seed) {
    Lock lock;
    run_all();
    mode = (Mode)mode_;
    rng.seed(seed);
    weights.clear();
    picks = 0;
    had_choice = false;
}
API int device_had_choice() { return had_choice; }
API int device_enqueue(void *stream, uint64_t id, const char *label) {
    Lock lock;
    Op op;
    op.kind = CALL;
    op.call = std::make_shared<Call>();
    op.call->id = id;
    op.label = label;
    cudaError_t code = push(stream_of((cudaStream_t)stream), op);
    op = Op{};
    now_and_then();
    return fail(code);
}
API int device_fill(void *stream, void *dst, size_t n) {  // garbage, in stream order
    Lock lock;
    Op op;
    op.kind = MEMSET;
    op.dst = (char *)dst;
    op.n = n;
    op.value = 0xA5;
    op.label = "garbage";
    return push(stream_of((cudaStream_t)stream), op);
}
API size_t device_released(uint64_t *out, size_t n) {  // calls that will not be asked for again
    std::lock_guard<std::mutex> lock(released_mutex);
    n = std::min(n, released.size());
    std::copy_n(released.end() - n, n, out);
    released.resize(released.size() - n);
    return n;
}
API uint64_t device_pending() {
    Lock lock;
    return pending.size();
}
API uint64_t device_executed() { return executed; }
API uint64_t device_violations() { return violations; }
API void device_run_all() {
    Lock lock;
    run_all();
}
API void device_reset() {  // after an error: drop what is queued
    Lock lock;
    if (sticky != cudaSuccess) {
        run_all();
        sticky = cudaSuccess;
        sticky_why.clear();
    }
    last_error = cudaSuccess;
}
API int device_unsafe(const char *name) {  // for the driver's calls
    Lock lock;
    return unsafe(name);
}
API uint64_t device_generation() { return generation; }
API size_t device_allocations(uintptr_t *out, size_t n) {  // pairs of address and bytes, both pools
    Lock lock;
    size_t i = 0;
    for (auto *pool : {&device_pool, &host_pool})
        for (auto &[at, size] : pool->live) {
            if (i < n) out[2 * i] = at, out[2 * i + 1] = size;
            ++i;
        }
    return i;
}

// Device.

API cudaError_t cudaGetDeviceCount(int *n) {
    *n = 1;
    return cudaSuccess;
}
API cudaError_t cudaGetDevice(int *d) {
    *d = 0;
    return cudaSuccess;
}
API cudaError_t cudaSetDevice(int d) { return d == 0 ? cudaSuccess : fail(cudaErrorInvalidDevice); }
API cudaError_t cudaDriverGetVersion(int *v) {
    *v = 13000;
    return cudaSuccess;
}
API cudaError_t cudaRuntimeGetVersion(int *v) {
    *v = 13000;
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char *s, int n, int) {
    snprintf(s, n, "0000:01:00.0");
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int *can, int, int) {
    *can = 0;
    return cudaSuccess;
}
API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) {
    return fail(cudaErrorPeerAccessUnsupported);
}
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }

API int device_attribute(int a) {
    switch (a) {
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrTotalConstantMemory: return 65536;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock: return 65536;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrComputeCapabilityMinor: return 0;
    case cudaDevAttrL2CacheSize: return 50 << 20;
    case cudaDevAttrUnifiedAddressing: return 1;
    case cudaDevAttrConcurrentKernels: return 1;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case 36: return 2619000;  // memory clock rate, kHz
    case 13: return 1980000;  // clock rate, kHz
    default: return 0;
    }
}
API cudaError_t cudaDeviceGetAttribute(int *v, cudaDeviceAttr a, int) {
    *v = device_attribute(a);
    return cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "CUDA device in software");
    for (int i = 0; i < 16; ++i) p->uuid.bytes[i] = i;
    p->totalGlobalMem = CLAIMED;
    p->sharedMemPerBlock = 49152;
    p->regsPerBlock = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->major = 9;
    p->multiProcessorCount = 132;
    p->concurrentKernels = 1;
    p->pciBusID = 1;
    p->asyncEngineCount = 3;
    p->unifiedAddressing = 1;
    p->memoryBusWidth = 5120;
    p->l2CacheSize = 50 << 20;
    p->maxThreadsPerMultiProcessor = 2048;
    p->sharedMemPerMultiprocessor = 233472;
    p->sharedMemPerBlockOptin = 232448;
    p->regsPerMultiprocessor = 65536;
    p->streamPrioritiesSupported = 1;
    p->maxBlocksPerMultiProcessor = 32;
    p->canMapHostMemory = 1;
    p->totalConstMem = 65536;
    p->textureAlignment = 512;
    return cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t *free_, size_t *total) {
    Lock lock;
    *total = CLAIMED;
    *free_ = CLAIMED - std::min(CLAIMED, device_pool.used);
    return cudaSuccess;
}

// Errors.

static const std::map<int, std::pair<const char *, const char *>> messages = {
    {0, {"cudaSuccess", "no error"}},
    {1, {"cudaErrorInvalidValue", "invalid argument"}},
    {2, {"cudaErrorMemoryAllocation", "out of memory"}},
    {100, {"cudaErrorNoDevice", "no CUDA-capable device is detected"}},
    {101, {"cudaErrorInvalidDevice", "invalid device ordinal"}},
    {217, {"cudaErrorPeerAccessUnsupported", "peer access is not supported"}},
    {400, {"cudaErrorInvalidResourceHandle", "invalid resource handle"}},
    {401, {"cudaErrorIllegalState", "the operation cannot be performed in the present state"}},
    {600, {"cudaErrorNotReady", "device not ready"}},
    {700, {"cudaErrorIllegalAddress", "an illegal memory access was encountered"}},
    {719, {"cudaErrorLaunchFailure", "unspecified launch failure"}},
    {801, {"cudaErrorNotSupported", "operation not supported by the CUDA device in software"}},
    {900,
     {"cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"}},
    {901,
     {"cudaErrorStreamCaptureInvalidated",
      "operation failed due to a previous error during capture"}},
    {902,
     {"cudaErrorStreamCaptureMerge",
      "operation would result in a merge of separate capture sequences"}},
    {903,
     {"cudaErrorStreamCaptureUnmatched", "capture was not ended in the same stream as it began"}},
    {904, {"cudaErrorStreamCaptureUnjoined", "capturing stream has unjoined work"}},
    {905,
     {"cudaErrorStreamCaptureIsolation",
      "dependency created on uncaptured work in another stream"}},
    {906,
     {"cudaErrorStreamCaptureImplicit",
      "operation would make the legacy stream depend on a capturing blocking stream"}},
    {907,
     {"cudaErrorCapturedEvent",
      "operation not permitted on an event last recorded in a capturing stream"}},
    {908,
     {"cudaErrorStreamCaptureWrongThread",
      "attempt to terminate a thread-local capture sequence from another thread"}},
};
API const char *cudaGetErrorName(cudaError_t e) {
    auto it = messages.find(e);
    return it == messages.end() ? "cudaErrorUnknown" : it->second.first;
}
API const char *cudaGetErrorString(cudaError_t e) {
    auto it = messages.find(e);
    return it == messages.end() ? "unknown error" : it->second.second;
}
API cudaError_t cudaGetLastError() {
    cudaError_t e = last_error;
    last_error = cudaSuccess;
    return sticky != cudaSuccess ? sticky : e;
}
API cudaError_t cudaPeekAtLastError() { return sticky != cudaSuccess ? sticky : last_error; }

// Memory.

API cudaError_t cudaMalloc(void **p, size_t n) {
    Lock lock;
    if (auto e = unsafe("cudaMalloc")) return fail(e);
    if (device_pool.used + n > CLAIMED || !(*p = device_pool.alloc(n)))
        return fail(cudaErrorMemoryAllocation);
    ++generation;
    return cudaSuccess;
}
API cudaError_t cudaFree(void *p) {
    Lock lock;
    if (auto e = unsafe("cudaFree")) return fail(e);
    return p ? fail(free_in(device_pool, p)) : cudaSuccess;
}
API cudaError_t cudaHostAlloc(void **p, size_t n, unsigned) {
    Lock lock;
    if (auto e = unsafe("cudaHostAlloc")) return fail(e);
    if (!(*p = host_pool.alloc(n))) return fail(cudaErrorMemoryAllocation);
    ++generation;
    return cudaSuccess;
}
API cudaError_t cudaMallocHost(void **p, size_t n) { return cudaHostAlloc(p, n, 0); }
API cudaError_t cudaFreeHost(void *p) {
    Lock lock;
    if (auto e = unsafe("cudaFreeHost")) return fail(e);
    return p ? fail(free_in(host_pool, p)) : cudaSuccess;
}
API cudaError_t cudaHostRegister(void *p, size_t n, unsigned) {
    Lock lock;
    registered[(uintptr_t)p] = n;
    return cudaSuccess;
}
API cudaError_t cudaHostUnregister(void *p) {
    Lock lock;
    run_all();
    return registered.erase((uintptr_t)p) ? cudaSuccess : fail(cudaErrorInvalidValue);
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *a, const void *p) {
    Lock lock;
    memset(a, 0, sizeof *a);
    a->device = -1;
    if (device_pool.find(p) != device_pool.live.end()) {
        a->type = cudaMemoryTypeDevice;
        a->device = 0;
        a->devicePointer = (void *)p;
    } else if (is_pinned(p)) {
        a->type = cudaMemoryTypeHost;
        a->device = 0;
        a->devicePointer = a->hostPointer = (void *)p;
    } else {
        a->type = cudaMemoryTypeUnregistered;
        a->hostPointer = (void *)p;
    }
    return cudaSuccess;
}

static bool overlaps_pending(const char *p, size_t n) {
    auto hit = [&](const char *q, size_t m) { return q && q < p + n && p < q + m; };
    for (auto &[seq, node] : pending) {
        const Op &op = node->op;
        if (hit(op.dst, op.height * std::max(op.n, op.dpitch)) ||
            (!op.staged && hit(op.src, op.height * std::max(op.n, op.spitch))))
            return true;
        if (op.kind == HOST || op.kind == CALL) continue;
    }
    return false;
}

static cudaError_t copy(Op op, cudaStream_t stream, bool blocking) {
    Stream *s = stream_of(stream);
    bool capturing = s->capture != nullptr;
    if (op.n == 0 || op.height == 0) return cudaSuccess;
    if (op.height == 1) op.dpitch = op.spitch = op.n;
    bool to_device = is_device(op.dst), from_device = is_device(op.src);
    op.kind = MEMCPY;
    op.label = to_device     ? (from_device ? "memcpy D2D" : "memcpy H2D")
               : from_device ? "memcpy D2H"
                             : "memcpy H2H";
    if (to_device && device_pool.find(op.dst) == device_pool.live.end())
        return cudaErrorInvalidValue;
    if (from_device && device_pool.find(op.src) == device_pool.live.end())
        return cudaErrorInvalidValue;
    if (capturing && ((!to_device && !is_pinned(op.dst)) || (!from_device && !is_pinned(op.src))))
        logf("captured a copy %s pageable memory", to_device ? "from" : "to");
    if (!capturing) {
        if (!from_device && !is_pinned(op.src)) {  // staged before the call returns
            size_t bytes = (op.height - 1) * op.spitch + op.n;
            op.staged = std::make_shared<std::vector<char>>(op.src, op.src + bytes);
        }
        if (!to_device && !is_pinned(op.dst)) blocking = true;
        else if (!to_device && poison_host && op.height == 1 && !blocking &&
                 !overlaps_pending(op.dst, op.n))
            memset(op.dst, 0xA5, op.n);  // what is read too early is garbage
    }
    NodeP node;
    cudaError_t code = push(s, op, &node);
    op = Op{};
    if (code == cudaSuccess) {
        if (blocking && !capturing) run_until(node);
        else now_and_then();
    }
    return sticky != cudaSuccess ? sticky : code;
}
API cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t n, cudaMemcpyKind,
                                cudaStream_t stream) {
    Lock lock;
    Op op;
    op.dst = (char *)dst, op.src = (const char *)src, op.n = n;
    return fail(copy(op, stream, false));
}
API cudaError_t cudaMemcpyPeerAsync(void *dst, int, const void *src, int, size_t n,
                                    cudaStream_t stream) {
    return cudaMemcpyAsync(dst, src, n, cudaMemcpyDefault, stream);
}
API cudaError_t cudaMemcpy2DAsync(void *dst, size_t dp, const void *src, size_t sp, size_t w,
                                  size_t h, cudaMemcpyKind, cudaStream_t stream) {
    Lock lock;
    Op op;
    op.dst = (char *)dst, op.src = (const char *)src, op.n = w, op.height = h, op.dpitch = dp,
    op.spitch = sp;
    return fail(copy(op, stream, false));
}
API cudaError_t cudaMemcpy(void *dst, const void *src, size_t n, cudaMemcpyKind) {
    Lock lock;
    if (auto e = unsafe("cudaMemcpy")) return fail(e);
    Op op;
    op.dst = (char *)dst, op.src = (const char *)src, op.n = n;
    return fail(copy(op, nullptr, true));
}
API cudaError_t cudaMemsetAsync(void *dst, int value, size_t n, cudaStream_t stream) {
    Lock lock;
    Op op;
    op.kind = MEMSET;
    op.dst = (char *)dst, op.value = value, op.n = n, op.label = "memset";
    cudaError_t code = push(stream_of(stream), op);
    now_and_then();
    return fail(code);
}
API cudaError_t cudaMemset(void *dst, int value, size_t n) {
    return cudaMemsetAsync(dst, value, n, nullptr);
}

// Streams.

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned flags, int priority) {
    Lock lock;
    auto *s = new Stream;
    s->id = next_stream++;
    s->flags = flags;
    s->priority = priority;
    streams.insert(s);
    *out = (cudaStream_t)s;
    return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags) {
    return cudaStreamCreateWithPriority(out, flags, 0);
}
API cudaError_t cudaStreamCreate(cudaStream_t *out) {
    return cudaStreamCreateWithPriority(out, 0, 0);
}
API cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    Lock lock;
    auto *s = (Stream *)stream;
    if (!streams.erase(s)) return fail(cudaErrorInvalidResourceHandle);
    delete s;  // its commands stay
    return cudaSuccess;
}
API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = stream_of(stream)->priority;
    return cudaSuccess;
}
API cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned *flags) {
    *flags = stream_of(stream)->flags;
    return cudaSuccess;
}
static NodeP tail(Stream *s) {  // everything that the stream has to do
    if (s->waits.empty() && s != &legacy) return s->last;
    Op op;
    op.label = "tail";
    return push_raw(s, op);
}
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    Lock lock;
    Stream *s = stream_of(stream);
    if (s->capture) {
        invalidate(s->capture, "cudaStreamSynchronize of a captured stream");
        return fail(cudaErrorStreamCaptureUnsupported);
    }
    if (auto e = unsafe("cudaStreamSynchronize")) return fail(e);
    run_until(tail(s));
    return fail(sticky);
}
API cudaError_t cudaStreamQuery(cudaStream_t stream) {
    Lock lock;
    Stream *s = stream_of(stream);
    if (s->capture) {
        invalidate(s->capture, "cudaStreamQuery of a captured stream");
        return fail(cudaErrorStreamCaptureUnsupported);
    }
    if (auto e = unsafe("cudaStreamQuery")) return fail(e);
    NodeP node = tail(s);
    if (sticky != cudaSuccess) return fail(sticky);
    if (!node || node->done) return cudaSuccess;
    run_some(node, 1);
    return fail(cudaErrorNotReady);
}
API cudaError_t cudaDeviceSynchronize() {
    Lock lock;
    if (auto e = unsafe("cudaDeviceSynchronize")) return fail(e);
    run_all();
    return fail(sticky);
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t fn, void *data) {
    Lock lock;
    Op op;
    op.kind = HOST, op.fn = fn, op.data = data, op.label = "host function";
    cudaError_t code = push(stream_of(stream), op);
    now_and_then();
    return fail(code);
}
struct OldCallback {
    cudaStreamCallback_t fn;
    cudaStream_t stream;
    void *data;
};
API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t fn, void *data,
                                      unsigned) {
    auto *old = new OldCallback{fn, stream, data};
    return cudaLaunchHostFunc(
        stream,
        [](void *p) {
            auto *o = (OldCallback *)p;
            o->fn(o->stream, cudaSuccess, o->data);
            delete o;
        },
        old);
}

// Events.

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags) {
    auto *e = new Event;
    e->flags = flags;
    *out = (cudaEvent_t)e;
    return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t *out) { return cudaEventCreateWithFlags(out, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t event) {
    Lock lock;
    delete (Event *)event;
    return cudaSuccess;
}
static cudaError_t record(cudaEvent_t event, cudaStream_t stream, unsigned flags, void *caller) {
    Lock lock;
    auto *e = (Event *)event;
    Stream *s = stream_of(stream);
    if (sticky != cudaSuccess) return fail(sticky);
    if (s->capture && !(flags & cudaEventRecordExternal)) {
        if (s->capture->invalid) return fail(cudaErrorStreamCaptureInvalidated);
        e->capture = s->capture;
        e->at = s->at;
        e->node = nullptr;
        e->recorded = true;
        return cudaSuccess;
    }
    Op op;
    op.label = "event";
    NodeP node;
    cudaError_t code = push(s, op, &node);
    if (code != cudaSuccess) return fail(code);
    e->capture = nullptr;
    e->at.clear();
    e->node = node;
    e->recorded = true;
    e->queries = 0;
    if (mode == EAGER && !from_an_allocator(caller)) run_all();
    return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return record(event, stream, flags, __builtin_return_address(0));
}
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return record(event, stream, 0, __builtin_return_address(0));
}
static cudaError_t captured(Event *e) {
    if (!e->capture) return cudaSuccess;
    if (!e->capture->over)
        invalidate(e->capture, "query or synchronisation of an event of a capture");
    return cudaErrorCapturedEvent;
}
API cudaError_t cudaEventQuery(cudaEvent_t event) {
    Lock lock;
    auto *e = (Event *)event;
    if (auto c = captured(e)) return fail(c);
    if (auto c = unsafe("cudaEventQuery")) return fail(c);
    if (sticky != cudaSuccess) return fail(sticky);
    if (!e->node || e->node->done) return cudaSuccess;
    if (from_an_allocator(__builtin_return_address(0))) return fail(cudaErrorNotReady);
    // A loop that polls gets there in the end.
    if (++e->queries > 3) {
        NodeP node = e->node;
        run_some(node, e->queries - 3);
    } else now_and_then();
    return fail(cudaErrorNotReady);
}
API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    Lock lock;
    auto *e = (Event *)event;
    if (auto c = captured(e)) return fail(c);
    if (auto c = unsafe("cudaEventSynchronize")) return fail(c);
    NodeP node = e->node;
    run_until(node);
    return fail(sticky);
}
API cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
    Lock lock;
    auto *x = (Event *)a, *y = (Event *)b;
    if (!x->node || !y->node) return fail(cudaErrorInvalidResourceHandle);
    if (!x->node->done || !y->node->done) return fail(cudaErrorNotReady);
    *ms = (float)std::max(1e-3, 1e3 * (y->node->finished - x->node->finished));
    return cudaSuccess;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    Lock lock;
    auto *e = (Event *)event;
    Stream *s = stream_of(stream);
    if (!e->recorded) return cudaSuccess;
    if (e->capture) {
        if (e->capture->over) return fail(cudaErrorCapturedEvent);
        if (e->capture->invalid) return fail(cudaErrorStreamCaptureInvalidated);
        if (s == &legacy) {
            invalidate(e->capture, "the legacy stream waits for a captured event");
            return fail(cudaErrorStreamCaptureImplicit);
        }
        if (!s->capture) {
            s->capture = e->capture;
            s->at.clear();
        } else if (s->capture != e->capture) {
            invalidate(s->capture, "merge of two captures");
            invalidate(e->capture, "merge of two captures");
            return fail(cudaErrorStreamCaptureMerge);
        }
        for (GraphNode *n : e->at)
            if (std::find(s->at.begin(), s->at.end(), n) == s->at.end()) s->at.push_back(n);
        return cudaSuccess;
    }
    if (s->capture) {
        invalidate(s->capture,
                   "a captured stream waits for an event recorded outside of the capture");
        return fail(cudaErrorStreamCaptureIsolation);
    }
    if (e->node && !e->node->done) s->waits.push_back(e->node);
    if (mode == RANDOM) now_and_then();
    return cudaSuccess;
}

// Capture and graphs.

API cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph,
                                              const cudaGraphNode_t *deps,
                                              const cudaGraphEdgeData *, size_t n,
                                              cudaStreamCaptureMode m) {
    Lock lock;
    Stream *s = stream_of(stream);
    if (s == &legacy) return fail(cudaErrorStreamCaptureUnsupported);
    if (s->capture) return fail(cudaErrorIllegalState);
    auto c = std::make_shared<Capture>();
    c->id = next_capture++;
    c->graph = graphs.at(graph);
    c->origin = s;
    c->mode = m;
    c->thread = std::this_thread::get_id();
    captures.insert(c);
    s->capture = c;
    s->at.clear();
    for (size_t i = 0; i < n; ++i) s->at.push_back((GraphNode *)deps[i]);
    return cudaSuccess;
}
API cudaError_t cudaGraphCreate(cudaGraph_t *out, unsigned) {
    Lock lock;
    auto g = std::make_shared<Graph>();
    *out = (cudaGraph_t)g.get();
    graphs[*out] = g;
    return cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode m) {
    cudaGraph_t graph;
    cudaGraphCreate(&graph, 0);
    return cudaStreamBeginCaptureToGraph(stream, graph, nullptr, nullptr, 0, m);
}
API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out) {
    Lock lock;
    Stream *s = stream_of(stream);
    *out = nullptr;
    CaptureP c = s->capture;
    if (!c) return fail(cudaErrorIllegalState);
    if (c->origin != s) {
        invalidate(c, "capture ended on another stream");
        return fail(cudaErrorStreamCaptureUnmatched);
    }
    if (c->mode != cudaStreamCaptureModeRelaxed && c->thread != std::this_thread::get_id())
        return fail(cudaErrorStreamCaptureWrongThread);
    cudaError_t code = cudaSuccess;
    if (c->invalid) code = cudaErrorStreamCaptureInvalidated;
    else {
        std::unordered_set<GraphNode *> seen(s->at.begin(), s->at.end());
        std::vector<GraphNode *> todo(s->at.begin(), s->at.end());
        while (!todo.empty()) {
            GraphNode *n = todo.back();
            todo.pop_back();
            for (GraphNode *d : n->deps)
                if (seen.insert(d).second) todo.push_back(d);
        }
        for (auto &n : c->graph->nodes)
            if (!seen.count(n.get())) {
                logf("capture has unjoined work: %s", n->op.label.c_str());
                ++violations;
                code = cudaErrorStreamCaptureUnjoined;
                break;
            }
    }
    c->over = true;
    captures.erase(c);
    for (Stream *other : streams)
        if (other->capture == c) other->capture = nullptr, other->at.clear();
    if (code == cudaSuccess) *out = (cudaGraph_t)c->graph.get();
    else graphs.erase((cudaGraph_t)c->graph.get());
    return fail(code);
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status) {
    Lock lock;
    Stream *s = stream_of(stream);
    if (s == &legacy)
        for (auto &c : captures)
            if (c->mode != cudaStreamCaptureModeRelaxed &&
                !(c->origin->flags & cudaStreamNonBlocking)) {
                *status = cudaStreamCaptureStatusNone;
                return fail(cudaErrorStreamCaptureImplicit);
            }
    *status = !s->capture           ? cudaStreamCaptureStatusNone
              : s->capture->invalid ? cudaStreamCaptureStatusInvalidated
                                    : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus *status,
                                         unsigned long long *id, cudaGraph_t *graph,
                                         const cudaGraphNode_t **deps,
                                         const cudaGraphEdgeData **edges, size_t *n) {
    Lock lock;
    cudaError_t code = cudaStreamIsCapturing(stream, status);
    if (code != cudaSuccess) return code;
    Stream *s = stream_of(stream);
    if (*status != cudaStreamCaptureStatusActive) return cudaSuccess;
    if (id) *id = s->capture->id;
    if (graph) *graph = (cudaGraph_t)s->capture->graph.get();
    if (deps) *deps = (const cudaGraphNode_t *)s->at.data();
    if (edges) *edges = nullptr;
    if (n) *n = s->at.size();
    return cudaSuccess;
}
API cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t stream, cudaGraphNode_t *deps,
                                                    const cudaGraphEdgeData *, size_t n,
                                                    unsigned flags) {
    Lock lock;
    Stream *s = stream_of(stream);
    if (!s->capture) return fail(cudaErrorIllegalState);
    if (flags == cudaStreamSetCaptureDependencies) s->at.clear();
    for (size_t i = 0; i < n; ++i) s->at.push_back((GraphNode *)deps[i]);
    return cudaSuccess;
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *m) {
    std::swap(*m, thread_mode);
    return cudaSuccess;
}
API cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    Lock lock;
    graphs.erase(graph);
    return cudaSuccess;
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *out, size_t *n) {
    Lock lock;
    auto &g = *graphs.at(graph);
    if (out)
        for (size_t i = 0; i < std::min(*n, g.nodes.size()); ++i)
            out[i] = (cudaGraphNode_t)g.nodes[i].get();
    *n = g.nodes.size();
    return cudaSuccess;
}
API cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t node, cudaGraphNode_t *out,
                                             cudaGraphEdgeData *, size_t *n) {
    Lock lock;
    auto &deps = ((GraphNode *)node)->deps;
    if (out)
        for (size_t i = 0; i < std::min(*n, deps.size()); ++i) out[i] = (cudaGraphNode_t)deps[i];
    *n = deps.size();
    return cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *out, cudaGraph_t graph,
                                              unsigned long long) {
    Lock lock;
    auto g = graphs.at(graph);
    auto *x = new Exec;
    std::unordered_map<GraphNode *, int> index;
    for (auto &n : g->nodes) {
        index[n.get()] = (int)x->ops.size();
        x->ops.push_back(n->op);
        std::vector<int> deps;
        for (GraphNode *d : n->deps) deps.push_back(index.at(d));
        x->deps.push_back(deps);
        x->streams.push_back(n->stream);
    }
    x->keep = g;
    *out = (cudaGraphExec_t)x;
    return cudaSuccess;
}
API cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph,
                                     unsigned long long flags) {
    return cudaGraphInstantiateWithFlags(out, graph, flags);
}
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    Lock lock;
    delete (Exec *)exec;
    return cudaSuccess;
}
API cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    Lock lock;
    auto *x = (Exec *)exec;
    Stream *s = stream_of(stream);
    if (sticky != cudaSuccess) return fail(sticky);
    if (s->capture) {
        logf("UNSUPPORTED: a graph launched into a capture");
        return fail(cudaErrorNotSupported);
    }
    if (x->last) s->waits.push_back(x->last);  // launches of one graph follow each other
    Op op;
    op.label = "graph begins";
    NodeP begin = push_raw(s, op);
    std::vector<NodeP> nodes, ends{begin};
    for (size_t i = 0; i < x->ops.size(); ++i) {
        std::vector<NodeP> deps{begin};
        for (int d : x->deps[i]) deps.push_back(nodes[d]);
        nodes.push_back(add_node(x->ops[i], -x->streams[i], deps));
        ends.push_back(nodes.back());
    }
    op.label = "graph ends";
    for (auto &n : ends) s->waits.push_back(n);
    x->last = push_raw(s, op);
    now_and_then();
    return cudaSuccess;
}
API cudaError_t cudaUserObjectCreate(cudaUserObject_t *out, void *ptr, cudaHostFn_t destroy,
                                     unsigned refs, unsigned) {
    *out = (cudaUserObject_t) new UserObject{ptr, destroy, refs};
    return cudaSuccess;
}
API cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned n) {
    Lock lock;
    auto *o = (UserObject *)object;
    if ((o->refs -= n) <= 0) {
        if (o->destroy) o->destroy(o->ptr);
        delete o;
    }
    return cudaSuccess;
}
API cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned n,
                                          unsigned flags) {
    Lock lock;
    auto *o = (UserObject *)object;
    graphs.at(graph)->objects[o] += n;
    if (!(flags & cudaGraphUserObjectMove)) o->refs += n;
    return cudaSuccess;
}

// Native kernels: names only.

namespace {

std::unordered_map<const void *, const char *> kernels;

std::string demangle(const char *name) {
    int status;
    char *text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
    std::string result = text ? text : name;
    free(text);
    return result;
}

cudaError_t native_launch(const void *function, cudaStream_t stream) {
    auto it = kernels.find(function);
    std::string name = it == kernels.end() ? "?" : demangle(it->second);
    Lock lock;
    if (name.find("spin_kernel") != std::string::npos) {
        Op op;
        op.label = "sleep";
        cudaError_t code = push(stream_of(stream), op);
        now_and_then();
        return fail(code);
    }
    if (name.size() > 400) name = name.substr(0, 400) + "...";
    logf("UNSUPPORTED native kernel: %s", name.c_str());
    return fail(cudaErrorNotSupported);
}

struct Config {
    dim3 grid, block;
    size_t shared;
    void *stream;
};
thread_local std::vector<Config> configs;

}  // namespace

API void **__cudaRegisterFatBinary(void *) {
    static void *handle[1];
    return handle;
}
API void __cudaRegisterFatBinaryEnd(void **) {}
API void __cudaUnregisterFatBinary(void **) {}
API char __cudaInitModule(void **) { return 1; }
API void __cudaRegisterFunction(void **, const char *host, char *, const char *name, int, void *,
                                void *, dim3 *, dim3 *, int *) {
    kernels[host] = name;
}
API void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    configs.push_back({grid, block, shared, stream});
    return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    if (configs.empty()) return cudaErrorInvalidValue;
    auto c = configs.back();
    configs.pop_back();
    *grid = c.grid, *block = c.block, *shared = c.shared, *(void **)stream = c.stream;
    return cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t *out, const void *host) {
    *out = (cudaKernel_t)host;
    return cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void **, size_t,
                                   cudaStream_t stream) {
    return native_launch((const void *)kernel, stream);
}
API cudaError_t cudaLaunchKernel(const void *f, dim3, dim3, void **, size_t, cudaStream_t stream) {
    return native_launch(f, stream);
}
API cudaError_t cudaLaunchCooperativeKernel(const void *f, dim3, dim3, void **, size_t,
                                            cudaStream_t stream) {
    return native_launch(f, stream);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *f, void **) {
    return native_launch(f, config->stream);
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, const void *) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->binaryVersion = a->ptxVersion = 90;
    return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) { return cudaSuccess; }
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *, int,
                                                                       size_t, unsigned) {
    *n = 1;
    return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *, int, size_t) {
    *n = 1;
    return cudaSuccess;
}

API cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **out, unsigned,
                                                 unsigned long long,
                                                 cudaDriverEntryPointQueryResult *status) {
    static void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    *out = driver ? dlsym(driver, symbol) : nullptr;
    if (!*out) logf("no driver function %s", symbol);
    if (status) *status = *out ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
API cudaError_t cudaGetDriverEntryPoint(const char *symbol, void **out, unsigned long long flags,
                                        cudaDriverEntryPointQueryResult *status) {
    return cudaGetDriverEntryPointByVersion(symbol, out, 13000, flags, status);
}

API int device_unsupported(const char *name) {
    logf("UNSUPPORTED call: %s", name);
    return name[2] == 'd' ? fail(cudaErrorNotSupported) : cudaErrorNotSupported;  // cuda..., cu...
}
