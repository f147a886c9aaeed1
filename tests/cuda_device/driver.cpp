// libcuda of the CUDA device in software: what Triton's launcher and PyTorch's lazy loader call.
#include <cuda.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>

#define API extern "C" __attribute__((visibility("default")))

extern "C" {
int device_attribute(int);
int device_unsafe(const char *);
const char *cudaGetErrorString(int);
const char *cudaGetErrorName(int);
}

static int context;
static thread_local CUcontext current = (CUcontext)&context;

static uint64_t (*py_module)(const char *) = nullptr;
static uint64_t (*py_function)(uint64_t, const char *) = nullptr;
static int (*py_launch)(uint64_t, void *, const unsigned *, void **) = nullptr;

API void driver_init(uint64_t (*module)(const char *), uint64_t (*function)(uint64_t, const char *),
                     int (*launch)(uint64_t, void *, const unsigned *, void **)) {
    py_module = module;
    py_function = function;
    py_launch = launch;
}

API CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
API CUresult cuDriverGetVersion(int *v) {
    *v = 13000;
    return CUDA_SUCCESS;
}
API CUresult cuDeviceGetCount(int *n) {
    *n = 1;
    return CUDA_SUCCESS;
}
API CUresult cuDeviceGet(CUdevice *d, int) {
    *d = 0;
    return CUDA_SUCCESS;
}
API CUresult cuDeviceGetName(char *s, int n, CUdevice) {
    snprintf(s, n, "CUDA device in software");
    return CUDA_SUCCESS;
}
API CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice) {
    *v = device_attribute((int)a);
    return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned *flags, int *active) {
    if (flags) *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice) {
    *c = (CUcontext)&context;
    return CUDA_SUCCESS;
}
API CUresult cuCtxGetCurrent(CUcontext *c) {
    *c = current;
    return CUDA_SUCCESS;
}
API CUresult cuCtxSetCurrent(CUcontext c) {
    current = c;
    return CUDA_SUCCESS;
}
API CUresult cuCtxGetDevice(CUdevice *d) {
    *d = 0;
    return CUDA_SUCCESS;
}
API CUresult cuCtxGetLimit(size_t *v, CUlimit) {
    *v = 1 << 20;
    return CUDA_SUCCESS;
}
API CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
API CUresult cuGetErrorString(CUresult e, const char **s) {
    *s = cudaGetErrorString((int)e);
    return CUDA_SUCCESS;
}
API CUresult cuGetErrorName(CUresult e, const char **s) {
    *s = cudaGetErrorName((int)e);
    return CUDA_SUCCESS;
}

API CUresult cuModuleLoadData(CUmodule *m, const void *image) {
    if (int code = device_unsafe("cuModuleLoadData")) return (CUresult)code;
    uint64_t id = py_module ? py_module((const char *)image) : 0;
    *m = (CUmodule)id;
    return id ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE;
}
API CUresult cuModuleLoadDataEx(CUmodule *m, const void *image, unsigned, CUjit_option *, void **) {
    return cuModuleLoadData(m, image);
}
API CUresult cuModuleLoad(CUmodule *m, const char *path) {
    std::ifstream file(path, std::ios::binary);
    std::string image((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    return file ? cuModuleLoadData(m, image.c_str()) : CUDA_ERROR_FILE_NOT_FOUND;
}
API CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) {
    uint64_t id = py_function ? py_function((uint64_t)m, name) : 0;
    *f = (CUfunction)id;
    return id ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
API CUresult cuLogsRegisterCallback(CUlogsCallback, void *, CUlogsCallbackHandle *handle) {
    if (handle) *handle = nullptr;
    return CUDA_SUCCESS;
}
API CUresult cuLogsUnregisterCallback(CUlogsCallbackHandle) { return CUDA_SUCCESS; }
API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
API CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction) {
    *v = a == CU_FUNC_ATTRIBUTE_NUM_REGS                ? 32
         : a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
                                                        : 0;
    return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
API CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
API CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **params, void **) {
    unsigned shape[7] = {c->gridDimX,  c->gridDimY,  c->gridDimZ,      c->blockDimX,
                         c->blockDimY, c->blockDimZ, c->sharedMemBytes};
    return (CUresult)(py_launch ? py_launch((uint64_t)f, c->hStream, shape, params)
                                : CUDA_ERROR_NOT_SUPPORTED);
}
API CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                            unsigned by, unsigned bz, unsigned shared, CUstream stream,
                            void **params, void **) {
    unsigned shape[7] = {gx, gy, gz, bx, by, bz, shared};
    return (CUresult)(py_launch ? py_launch((uint64_t)f, stream, shape, params)
                                : CUDA_ERROR_NOT_SUPPORTED);
}
API CUresult cuPointerGetAttribute(void *out, CUpointer_attribute a, CUdeviceptr p) {
    // Triton asks for the address by which the device knows memory.
    bool known = (p >= 0x100000000000 && p < 0x100000000000 + (64ull << 30)) ||
                 (p >= 0x200000000000 && p < 0x200000000000 + (32ull << 30));
    if (!known) return CUDA_ERROR_INVALID_VALUE;
    if (a == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)out = p;
    else if (a == CU_POINTER_ATTRIBUTE_MEMORY_TYPE)
        *(unsigned *)out = p < 0x200000000000 ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
    else if (a == CU_POINTER_ATTRIBUTE_CONTEXT) *(CUcontext *)out = (CUcontext)&context;
    else return CUDA_ERROR_NOT_SUPPORTED;
    return CUDA_SUCCESS;
}
