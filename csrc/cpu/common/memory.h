// Memory that grows with the batch.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sbert_kernels {

// Workspaces are torch's memory: where there is no more of it, the error is the one that torch raises for a tensor,
// which whoever tries again with a smaller batch waits for (accelerate's find_executable_batch_size, say).
template <class T>
struct TorchMemory {
  using value_type = T;
  TorchMemory() = default;
  template <class U>
  TorchMemory(const TorchMemory<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(c10::alloc_cpu(count * sizeof(T))); }
  void deallocate(T* memory, size_t) { c10::free_cpu(memory); }
  void operator()(T* memory) const { c10::free_cpu(memory); }
  template <class U>
  bool operator==(const TorchMemory<U>&) const {
    return true;
  }
  template <class U>
  bool operator!=(const TorchMemory<U>&) const {
    return false;
  }
};

// A vector whose size depends on the batch or on the embeddings.
template <class T>
using Array = std::vector<T, TorchMemory<T>>;

// The same, not initialised.
template <class T>
using Buffer = std::unique_ptr<T[], TorchMemory<T>>;

// Held by whoever takes memory while others may rely on what they have seen to be free; see multiply().
inline std::mutex& memory_mutex() {
  static std::mutex mutex;
  return mutex;
}

template <class T>
Buffer<T> buffer(int64_t size) {
  const std::lock_guard<std::mutex> lock(memory_mutex());
  return Buffer<T>(TorchMemory<T>().allocate(static_cast<size_t>(size)));
}

// Raises that error for memory that is not torch's.
[[noreturn]] inline void out_of_memory(int64_t bytes) {
  TORCH_CHECK(false, "DefaultCPUAllocator: can't allocate memory: you tried to allocate ", bytes, " bytes.");
}

// An operator, for torch to call. What few bytes a small vector could not get, of which nobody knows how many, is told
// in the same words.
template <auto Function>
struct Operator;
template <class Result, class... Arguments, Result (*Function)(Arguments...)>
struct Operator<Function> {
  static Result call(Arguments... arguments) {
    try {
      return Function(std::forward<Arguments>(arguments)...);
    } catch (const std::bad_alloc&) {
      out_of_memory(0);
    }
  }
};

// Raises that error unless the system has so much memory left, none of which is taken.
inline void require_memory(int64_t bytes) {
#if defined(__linux__)
  // Not malloc, which could give what it keeps for itself.
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) out_of_memory(bytes);
  munmap(memory, bytes);
#else
  TorchMemory<char> memory;
  memory.deallocate(memory.allocate(bytes), bytes);
#endif
}

// Asks for huge pages behind a large tensor that was not written yet. The first write to memory that is fresh from the
// system costs a page fault for each 4 KiB, more than all the arithmetic of a loss that reads its inputs once.
inline void advise_huge_pages(const at::Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + tensor.nbytes()) / kHugePage * kHugePage;
  // Where the system does not offer it, nothing changes.
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace sbert_kernels
