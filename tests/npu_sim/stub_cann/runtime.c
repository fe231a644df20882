// Enough of CANN's runtime, over host memory, for the published torch_npu wheel to import and to own "npu" memory on a
// machine without an NPU. Written from the list of symbols that the wheel leaves undefined and the headers that it
// carries (torch_npu/include/acl). Whatever is not here ends the process and says its name: see wheel.py.
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef int aclError;
enum { OK = 0, NO_CONTEXT = 107002, NO_MEMORY = 207001, KERNEL_NOT_HERE = 361001 };
enum { DEVICES = 8 };

void not_emulated(const char *name) {
    fprintf(stderr, "stub CANN: %s is not emulated\n", name);
    abort();
}

static __thread int device = 0, device_is_set = 0;
static char contexts[DEVICES];

aclError aclInit(const char *config) { return OK; }
aclError aclFinalize(void) { return OK; }
const char *aclGetRecentErrMsg(void) { return ""; }
const char *aclrtGetSocName(void) { return "Ascend910B1"; }

aclError aclrtSetDevice(int id) { device = id; device_is_set = 1; return OK; }
aclError aclrtResetDevice(int id) { return OK; }
aclError aclrtGetDevice(int *id) { *id = device; return device_is_set ? OK : NO_CONTEXT; }
aclError aclrtGetDeviceCount(uint32_t *count) { *count = DEVICES; return OK; }
aclError aclrtGetCurrentContext(void **context) { *context = &contexts[device]; return OK; }
aclError aclrtSetCurrentContext(void *context) { return aclrtSetDevice((int)((char *)context - contexts)); }
aclError aclrtCreateContext(void **context, int id) { *context = &contexts[id]; return OK; }
aclError aclrtGetPrimaryCtxState(int id, uint32_t *flags, int *active) { if (flags) *flags = 0; *active = 1; return OK; }
aclError aclrtDeviceCanAccessPeer(int *can, int a, int b) { *can = 0; return OK; }
aclError aclrtDeviceGetBareTgid(int *pid) { *pid = getpid(); return OK; }
aclError aclGetDeviceCapability(uint32_t id, int what, int64_t *value) { *value = 0; return OK; }

// Memory of the device is memory of the host, at its own address.
aclError aclrtMalloc(void **p, size_t n, int policy) { return posix_memalign(p, 512, n ? n : 512) ? NO_MEMORY : OK; }
aclError aclrtMallocAlign32(void **p, size_t n, int policy) { return aclrtMalloc(p, n, policy); }
aclError aclrtMallocHost(void **p, size_t n) { return aclrtMalloc(p, n, 0); }
aclError aclrtFree(void *p) { free(p); return OK; }
aclError aclrtFreeHost(void *p) { free(p); return OK; }
aclError aclrtGetMemInfo(int kind, size_t *left, size_t *total) { *left = 60ull << 30; *total = 64ull << 30; return OK; }
// What the host waits for, counted for tests/counting.py.
static long waits = 0;
long stub_waits(void) { return waits; }
#define WAIT { __atomic_add_fetch(&waits, 1, __ATOMIC_RELAXED); return OK; }

aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t n, int kind) { memmove(to, from, n); return OK; }
aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t n, int kind, void *stream) { memmove(to, from, n); return OK; }
aclError aclrtMemset(void *p, size_t room, int value, size_t n) { memset(p, value, n); return OK; }
aclError aclrtMemsetAsync(void *p, size_t room, int value, size_t n, void *stream) { memset(p, value, n); return OK; }

// Everything is done when its call returns, so streams and events have nothing to wait for.
aclError aclrtCreateStream(void **stream) { *stream = malloc(16); return OK; }
aclError aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags) { return aclrtCreateStream(stream); }
aclError aclrtDestroyStream(void *stream) { return OK; }
aclError aclrtDestroyStreamForce(void *stream) { return OK; }
aclError aclrtSynchronizeStream(void *stream) WAIT
aclError aclrtSynchronizeStreamWithTimeout(void *stream, int ms) WAIT
aclError aclrtSynchronizeDevice(void) WAIT
aclError aclrtSynchronizeDeviceWithTimeout(int ms) WAIT
aclError aclrtStreamQuery(void *stream, int *status) { *status = 0; return OK; }
aclError aclrtStreamGetId(void *stream, int *id) { *id = 1; return OK; }
aclError aclrtSetStreamFailureMode(void *stream, uint64_t mode) { return OK; }
aclError aclrtSetStreamOverflowSwitch(void *stream, uint32_t flag) { return OK; }
aclError aclrtCreateEventExWithFlag(void **event, uint32_t flag) { *event = malloc(16); return OK; }
aclError aclrtCreateEventWithFlag(void **event, uint32_t flag) { *event = malloc(16); return OK; }
aclError aclrtDestroyEvent(void *event) { return OK; }
aclError aclrtRecordEvent(void *event, void *stream) {
    clock_gettime(CLOCK_MONOTONIC, event);
    return OK;
}
aclError aclrtResetEvent(void *event, void *stream) { return OK; }
aclError aclrtSynchronizeEvent(void *event) WAIT
aclError aclrtStreamWaitEvent(void *stream, void *event) { return OK; }
aclError aclrtQueryEventStatus(void *event, int *status) { *status = 1; return OK; }
aclError aclrtQueryEventWaitStatus(void *event, int *status) { *status = 0; return OK; }
aclError aclrtEventElapsedTime(float *ms, void *a, void *b) {
    struct timespec *start = a, *end = b;
    *ms = (end->tv_sec - start->tv_sec) * 1e3 + (end->tv_nsec - start->tv_nsec) * 1e-6;
    return OK;
}

// The version of CANN decides which branch torch_npu takes, of batch_isend_irecv for one.
static const char VERSION[] = "9.0.0";
typedef struct { char version[128], major[64], minor[64], release[64], patch[64], reserved[128]; } Version;
aclError aclsysGetVersionStr(char *package, char *version) { strcpy(version, VERSION); return OK; }
aclError aclsysGetCANNVersion(int package, Version *out) {
    memset(out, 0, sizeof *out);
    strcpy(out->version, VERSION);
    strcpy(out->major, "9"); strcpy(out->minor, "0"); strcpy(out->release, "0");
    return OK;
}

int halGetAPIVersion(int *version) { *version = 0x071700; return 0; }
int halGetDeviceInfo(uint32_t id, int module, int info, int64_t *value) { *value = 0; return 0; }
int drvGetDevNum(uint32_t *count) { *count = DEVICES; return 0; }
void aclAppLog(int level, const char *function, const char *file, uint32_t line, const char *text, ...) {}

// A recording of the profiler that records nothing.
aclError aclprofInit(const char *path, size_t n) { return OK; }
aclError aclprofFinalize(void) { return OK; }
void *aclprofCreateConfig(void) { return malloc(16); }
aclError aclprofDestroyConfig(void *config) { free(config); return OK; }
aclError aclprofSetConfig(int kind, const char *value, size_t n) { return OK; }
aclError aclprofStart(const void *config) { return OK; }
aclError aclprofStop(const void *config) { return OK; }
aclError aclprofWarmup(const void *config) { return OK; }
aclError aclprofRegisterDeviceCallback(void) { return OK; }
aclError aclprofGetSupportedFeatures(size_t *n, void **data) { *n = 0; *data = 0; return OK; }
void *aclprofCreateStepInfo(void) { return malloc(16); }
void aclprofDestroyStepInfo(void *info) { free(info); }
aclError aclprofGetStepTimestamp(void *info, int tag, void *stream) { return OK; }

// Settings.
aclError aclrtSetDeviceSatMode(int mode) { return OK; }
aclError aclrtSetOpExecuteTimeOut(uint32_t seconds) { return OK; }
aclError aclrtSetOpWaitTimeout(uint32_t seconds) { return OK; }
aclError aclrtPeekAtLastError(int level) { return OK; }
aclError aclrtGetLastError(int level) { return OK; }
aclError aclrtGetSysParamOpt(int option, int64_t *value) { *value = 0; return OK; }
aclError aclrtSetSysParamOpt(int option, int64_t value) { return OK; }
aclError aclrtCtxGetSysParamOpt(int option, int64_t *value) { *value = 0; return OK; }
aclError aclrtCtxSetSysParamOpt(int option, int64_t value) { return OK; }
aclError aclSetCompileopt(int option, const char *value) { return OK; }
size_t aclGetCompileoptSize(int option) { return 1024; }
aclError aclGetCompileopt(int option, char *value, size_t n) { if (n) value[0] = 0; return OK; }
aclError aclopSetCompileFlag(int flag) { return OK; }

// Kernels that exist but do not run: torch_npu's host code does all of its checks, allocates the outputs, asks for the
// workspace, and stops there with an error that says the kernel's name (sim/operations.py then computes the result).
#define KERNEL(name)                                                  \
    aclError name##GetWorkspaceSize(void) { return KERNEL_NOT_HERE; } \
    aclError name(void) { return KERNEL_NOT_HERE; }

KERNEL(aclnnAllGatherMatmul)
KERNEL(aclnnAllGatherMatmulV2)
KERNEL(aclnnCast)
KERNEL(aclnnDropoutDoMask)
KERNEL(aclnnDropoutGenMask)
KERNEL(aclnnDropoutGenMaskV2)
KERNEL(aclnnFlashAttentionScore)
KERNEL(aclnnFlashAttentionScoreV2)
KERNEL(aclnnFlashAttentionScoreV3)
KERNEL(aclnnFlashAttentionScoreV4)
KERNEL(aclnnFlashAttentionScoreGrad)
KERNEL(aclnnFlashAttentionScoreGradV2)
KERNEL(aclnnFlashAttentionScoreGradV3)
KERNEL(aclnnFlashAttentionScoreGradV4)
KERNEL(aclnnFlashAttentionVarLenScore)
KERNEL(aclnnFlashAttentionVarLenScoreV2)
KERNEL(aclnnFlashAttentionVarLenScoreV3)
KERNEL(aclnnFlashAttentionVarLenScoreV4)
KERNEL(aclnnFlashAttentionVarLenScoreV5)
KERNEL(aclnnFlashAttentionUnpaddingScoreGrad)
KERNEL(aclnnFlashAttentionUnpaddingScoreGradV2)
KERNEL(aclnnFlashAttentionUnpaddingScoreGradV3)
KERNEL(aclnnFlashAttentionUnpaddingScoreGradV4)
KERNEL(aclnnFlashAttentionUnpaddingScoreGradV5)
KERNEL(aclnnFusedInferAttentionScoreV2)
KERNEL(aclnnFusedInferAttentionScoreV3)
KERNEL(aclnnFusedInferAttentionScoreV4)
KERNEL(aclnnFusedInferAttentionScoreV5)
KERNEL(aclnnAddRmsNorm)
KERNEL(aclnnRmsNorm)
KERNEL(aclnnRmsNormGrad)
KERNEL(aclnnRotaryPositionEmbedding)
KERNEL(aclnnRotaryPositionEmbeddingGrad)
KERNEL(aclnnSwiGlu)
KERNEL(aclnnSwiGluGrad)
KERNEL(aclnnGroupedMatmulAdd)
KERNEL(aclnnGroupedMatmulV4)
KERNEL(aclnnGroupedMatmulV5)
KERNEL(aclnnMatmulReduceScatter)
KERNEL(aclnnMatmulReduceScatterV2)
KERNEL(aclnnMoeTokenPermuteWithRoutingMap)
KERNEL(aclnnMoeTokenPermuteWithRoutingMapGrad)
KERNEL(aclnnMoeTokenUnpermuteWithRoutingMap)
KERNEL(aclnnMoeTokenUnpermuteWithRoutingMapGrad)
