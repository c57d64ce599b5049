// The arena as torch's CPU allocator. Only c10's headers, and no Python: loaded with ctypes.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include "arena.h"

namespace {

constexpr uint8_t kPriority = 255;  // the highest: nothing that registers later takes its place unseen

Arena* arena = nullptr;  // for good: tensors keep its deleter
c10::Allocator* previous = nullptr;

void* allocate_beside(void*, size_t bytes) {
  try {
    return previous->raw_allocate(bytes);
  } catch (const c10::Error&) {  // out of memory: see ArenaAllocator::allocate
    return nullptr;
  }
}

void release_beside(void*, void* pointer) { previous->raw_deallocate(pointer); }

void* allocate_slab(void*, size_t bytes) {
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return base == MAP_FAILED ? nullptr : base;
}

void release_slab(void*, void* base, size_t bytes) { munmap(base, bytes); }

// torch's profiler hears of every block, as it does from torch's own allocator; of those beside the plan from that one.
void observe(void*, void* pointer, int64_t bytes) {
  if (bytes > 0) c10::profiledCPUMemoryReporter().New(pointer, static_cast<size_t>(bytes));
  else c10::profiledCPUMemoryReporter().Delete(pointer);
}

// What the arena has not given out is memory of the allocator before it, whose `raw_allocate` tells no deleter.
void free_block(void* pointer) {
  if (arena_free(arena, pointer) == ARENA_UNKNOWN) previous->raw_deallocate(pointer);
}

class ArenaAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* pointer = arena_allocate(arena, bytes, nullptr);
    if (!pointer && bytes) return previous->allocate(bytes);  // raises torch's own error, with its own words
    return {pointer, pointer, &free_block, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* destination, const void* source, std::size_t bytes) const override {
    default_copy_data(destination, source, bytes);
  }
};

ArenaAllocator allocator;

}  // namespace

// The arena that serves torch from now on; null: the allocator in place has no deleter to call.
ARENA_API Arena* arena_cpu_install(int64_t alignment, int64_t least_bytes) {
  c10::Allocator* current = c10::GetAllocator(c10::DeviceType::CPU);
  if (current != &allocator) {
    if (!current->raw_deleter() || (previous && previous != current)) return nullptr;
    previous = current;
  }
  if (!arena) {
    const ArenaRuntime runtime{nullptr, allocate_beside, release_beside, allocate_slab, release_slab, nullptr, observe};
    arena = arena_create(&runtime, alignment, least_bytes, 0);
  }
  c10::SetAllocator(c10::DeviceType::CPU, &allocator, kPriority);
  return arena;
}

// Blocks that are alive stay where they are, and find their way back.
ARENA_API void arena_cpu_uninstall() {
  if (previous) c10::SetAllocator(c10::DeviceType::CPU, previous, kPriority);
}
