// The arena as torch's pluggable CUDA allocator: one for each device. The CUDA runtime is the one that torch has loaded,
// found at run time, so that no CUDA toolkit is needed to compile this.
#include <c10/util/Exception.h>
#include <dlfcn.h>
#include <sys/types.h>

#include <array>
#include <atomic>
#include <mutex>

#include "arena.h"

namespace {

constexpr int kMostDevices = 64;
constexpr int kSuccess = 0;                 // cudaSuccess
constexpr unsigned kEventWithoutTiming = 2; // cudaEventDisableTiming

struct Cudart {
  int (*malloc)(void**, size_t);
  int (*free)(void*);
  int (*get_device)(int*);
  int (*set_device)(int);
  int (*last_error)();
  int (*event_create)(void**, unsigned);
  int (*event_record)(void*, void*);
  int (*event_destroy)(void*);
  int (*stream_wait)(void*, void*, unsigned);
} cudart;

int64_t alignment, least_bytes;
std::array<std::atomic<Arena*>, kMostDevices> arenas;
std::mutex creating;

// Calls are for the arena's device, whichever the thread has chosen.
class OnDevice {
 public:
  explicit OnDevice(void* context) : device_(static_cast<int>(reinterpret_cast<intptr_t>(context))) {
    cudart.get_device(&before_);
    if (before_ != device_) cudart.set_device(device_);
  }
  ~OnDevice() {
    if (before_ != device_) cudart.set_device(before_);
  }

 private:
  int device_, before_ = 0;
};

void* allocate(void* context, size_t bytes) {
  OnDevice device(context);
  void* pointer = nullptr;
  if (cudart.malloc(&pointer, bytes) == kSuccess) return pointer;
  cudart.last_error();  // out of memory is no error of the next kernel
  return nullptr;
}

void release(void* context, void* pointer) {
  OnDevice device(context);
  cudart.free(pointer);
}

void release_slab(void* context, void* pointer, size_t) { release(context, pointer); }

int order(void* context, void* waiting, void* working) {
  OnDevice device(context);
  void* event = nullptr;
  int status = cudart.event_create(&event, kEventWithoutTiming);
  if (status != kSuccess) return status;
  status = cudart.event_record(event, working);
  if (status == kSuccess) status = cudart.stream_wait(waiting, event, 0);
  cudart.event_destroy(event);  // the runtime keeps it until it is over
  return status;
}

Arena* arena_of(int device) {
  if (device < 0 || device >= kMostDevices) return nullptr;
  if (Arena* arena = arenas[device].load(std::memory_order_acquire)) return arena;
  std::lock_guard lock(creating);
  if (!arenas[device]) {
    const ArenaRuntime runtime{reinterpret_cast<void*>(static_cast<intptr_t>(device)), allocate, release, allocate,
                               release_slab, order, nullptr};
    arenas[device] = arena_create(&runtime, alignment, least_bytes, 1);
  }
  return arenas[device];
}

template <typename Function>
bool find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  return *function != nullptr;
}

}  // namespace

// 0; 1: no such library is loaded; 2: it has not all functions that are needed.
ARENA_API int arena_cuda_load(const char* cudart_name, int64_t its_alignment, int64_t its_least_bytes) {
  void* library = dlopen(cudart_name, RTLD_NOW | RTLD_NOLOAD);
  if (!library) return 1;
  alignment = its_alignment;
  least_bytes = its_least_bytes;
  const bool complete =
      find(library, "cudaMalloc", &cudart.malloc) && find(library, "cudaFree", &cudart.free) &&
      find(library, "cudaGetDevice", &cudart.get_device) && find(library, "cudaSetDevice", &cudart.set_device) &&
      find(library, "cudaGetLastError", &cudart.last_error) &&
      find(library, "cudaEventCreateWithFlags", &cudart.event_create) &&
      find(library, "cudaEventRecord", &cudart.event_record) &&
      find(library, "cudaEventDestroy", &cudart.event_destroy) &&
      find(library, "cudaStreamWaitEvent", &cudart.stream_wait);
  return complete ? 0 : 2;
}

ARENA_API Arena* arena_cuda_of(int device) { return arena_of(device); }

// For torch.cuda.memory.CUDAPluggableAllocator.
ARENA_API void* arena_cuda_allocate(ssize_t bytes, int device, void* stream) {
  if (bytes <= 0) return nullptr;
  Arena* arena = arena_of(device);
  void* pointer = arena ? arena_allocate(arena, static_cast<size_t>(bytes), stream) : nullptr;
  if (pointer) return pointer;
  ArenaStats stats{};
  if (arena) arena_stats(arena, &stats);
  TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes, " bytes on device ", device,
                   ". stowplan's arena has ", stats.reserved_bytes, " bytes there, of which ",
                   stats.planned_bytes + stats.fallback_bytes, " are in use (its slab for planned addresses: ",
                   stats.slab_bytes, " bytes).");
}

ARENA_API void arena_cuda_free(void* pointer, ssize_t, int device, void*) {
  if (Arena* arena = pointer ? arena_of(device) : nullptr) arena_free(arena, pointer);
}

// For its set_record_stream_fn and set_reset_fn: record_stream, and empty_cache.
ARENA_API void arena_cuda_record_stream(void* pointer, void* stream) {
  for (auto& slot : arenas)  // only the arena whose block it is does anything
    if (Arena* arena = slot.load()) arena_record_stream(arena, pointer, stream);
}

ARENA_API void arena_cuda_empty_cache() {
  for (auto& slot : arenas)
    if (Arena* arena = slot.load()) arena_trim(arena);
}
