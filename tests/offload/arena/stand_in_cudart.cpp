// A CUDA runtime without a device: streams are queues of work on host memory that lags behind until it is run, in any
// order that events allow. Fills and checks of bytes are its kernels, so a block that is given to another stream too
// early is noticed by the one that still works on it.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <typeinfo>

#define API extern "C" __attribute__((visibility("default")))

namespace {

struct Event {
  bool recorded = false, done = false;
};
using EventPointer = std::shared_ptr<Event>;

// What is next on a stream; false: it has to wait.
using Work = std::function<bool()>;

std::recursive_mutex mutex;
std::map<void*, std::deque<Work>> streams;
std::map<void*, EventPointer> events;
std::map<void*, size_t> memory;
int64_t limit = INT64_MAX, used = 0, num_mallocs = 0, num_errors = 0, device = 0;
bool waits_count = true;

bool run_one(void* stream) {
  auto& queue = streams[stream];
  if (queue.empty() || !queue.front()()) return false;
  queue.pop_front();
  return true;
}

void run_all() {
  for (bool moved = true; moved;) {
    moved = false;
    for (auto& [stream, queue] : streams)
      while (run_one(stream)) moved = true;
  }
}

}  // namespace

API int cudaMalloc(void** pointer, size_t bytes) {
  std::lock_guard lock(mutex);
  ++num_mallocs;
  if (bytes > static_cast<size_t>(limit - used)) return 2;
  *pointer = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
  memory[*pointer] = bytes;
  used += static_cast<int64_t>(bytes);
  return 0;
}

API int cudaFree(void* pointer) {
  std::lock_guard lock(mutex);
  run_all();  // as the real one, it waits for the device
  if (!memory.count(pointer)) ++num_errors;
  used -= static_cast<int64_t>(memory[pointer]);
  memory.erase(pointer);
  std::free(pointer);
  return 0;
}

API int cudaGetDevice(int* current) {
  *current = static_cast<int>(device);
  return 0;
}
API int cudaSetDevice(int chosen) {
  device = chosen;
  return 0;
}
API int cudaGetLastError() { return 0; }

API int cudaEventCreateWithFlags(void** event, unsigned) {
  std::lock_guard lock(mutex);
  auto made = std::make_shared<Event>();
  *event = made.get();
  events[*event] = made;
  return 0;
}

API int cudaEventRecord(void* event, void* stream) {
  std::lock_guard lock(mutex);
  EventPointer recorded = events.at(event);
  recorded->recorded = true;
  streams[stream].push_back([recorded] { return recorded->done = true; });
  return 0;
}

API int cudaEventDestroy(void* event) {
  std::lock_guard lock(mutex);
  events.erase(event);
  return 0;
}

API int cudaStreamWaitEvent(void* stream, void* event, unsigned) {
  std::lock_guard lock(mutex);
  EventPointer awaited = events.at(event);
  if (awaited->recorded && waits_count) streams[stream].push_back([awaited] { return awaited->done; });
  return 0;
}

// For tests.

API void stand_in_begin(int64_t limit_bytes) {
  std::lock_guard lock(mutex);
  run_all();
  limit = limit_bytes;
  used = num_mallocs = num_errors = 0;
  waits_count = true;
}
API void stand_in_count_waits(int on) { waits_count = on != 0; }
API int64_t stand_in_mallocs() { return num_mallocs; }
API int64_t stand_in_used() { return used; }
API int64_t stand_in_errors() { return num_errors; }

API void stand_in_fill(void* stream, void* pointer, size_t bytes, int value) {
  std::lock_guard lock(mutex);
  streams[stream].push_back([=] { return std::memset(pointer, value, bytes) != nullptr; });
}

API void stand_in_check(void* stream, void* pointer, size_t bytes, int value) {
  std::lock_guard lock(mutex);
  streams[stream].push_back([=] {
    auto* data = static_cast<unsigned char*>(pointer);
    num_errors += data[0] != value || std::memcmp(data, data + 1, bytes - 1) != 0;
    return true;
  });
}

// `waiting` goes on after what `working` has so far: what a program does before it hands a tensor to another stream.
API void stand_in_order(void* waiting, void* working) {
  std::lock_guard lock(mutex);
  auto event = std::make_shared<Event>();
  streams[working].push_back([event] { return event->done = true; });
  streams[waiting].push_back([event] { return event->done; });
}

API void stand_in_run(void* stream, int most) {
  std::lock_guard lock(mutex);
  for (int i = 0; i < most && run_one(stream); ++i) {
  }
}

API void stand_in_synchronize() {
  std::lock_guard lock(mutex);
  run_all();
}

// The type of the exception that an allocation raises, or "".
API const char* stand_in_raised(void* (*allocate)(ptrdiff_t, int, void*), ptrdiff_t bytes, int number) {
  static std::string name;
  try {
    allocate(bytes, number, nullptr);
    name.clear();
  } catch (const std::exception& error) {
    name = std::string(typeid(error).name()) + ": " + error.what();
  }
  return name.c_str();
}
