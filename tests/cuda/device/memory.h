// Device memory and page-locked memory.
//
// Device memory is the host's, in blocks of 512 bytes that are kept by size and stream, as
// c10/cuda/CUDACachingAllocator.cpp does: a freed block may be given out again on its stream at
// once, on whatever other stream it is still in use, unless record_stream said so. The next owner
// is the worst one: memory is NaN (bytes of 0xff) as soon as it is freed, in the order of its stream.
#pragma once
#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <unistd.h>

#include <cstring>
#include <iomanip>
#include <sstream>

#include "races.h"

namespace fakecuda {

struct Block {
  size_t size;
  int device;
  int64_t stream;
  std::set<Stream*> used_by;  // other streams, of record_stream
};

struct Usage {  // of a device, in bytes, as torch.cuda.memory_stats counts it
  int64_t allocated = 0, allocated_peak = 0, reserved = 0, reserved_peak = 0;
  int64_t allocations = 0, retries = 0, ooms = 0;
};

struct Held {  // freed, and other streams may still use it
  void* address;
  std::vector<EventPtr> until;
};

inline std::unordered_map<void*, Block> blocks;
inline std::map<std::tuple<int, int64_t, size_t>, std::vector<void*>> free_blocks;
inline std::vector<Held> held;
inline Usage usage[MOST_DEVICES];

constexpr size_t GRANULE = 512;  // kMinBlockSize of CUDACachingAllocator.cpp

inline void poison(Stream& stream, void* address, size_t size) {
  enqueue(stream, [=] { memset(address, 0xff, size); });
}

inline void to_free_list(void* address) {
  auto& block = blocks[address];
  poison(stream_of(block.device, block.stream), address, block.size);
  free_blocks[{block.device, block.stream, block.size}].push_back(address);
}

inline void free_block(void* address) {
  if (!address) return;
  Lock lock(mutex);
  auto& block = blocks[address];
  usage[block.device].allocated -= block.size;
  if (block.used_by.empty()) return to_free_list(address);
  Held waiting{address, {}};
  for (auto* stream : block.used_by) waiting.until.push_back(record_on(*stream));
  block.used_by.clear();
  held.push_back(waiting);
}

inline void release_held() {
  for (size_t i = 0; i < held.size();) {
    bool done = true;
    for (auto& event : held[i].until) done = done && event->done;
    if (done) {
      to_free_list(held[i].address);
      held.erase(held.begin() + i);
    } else {
      i++;
    }
  }
}

// Gives all free blocks back to the system. As cudaFree, it waits for the device.
inline void empty_cache() {
  for (auto& [key, stream] : streams) drain(*stream);
  release_held();
  for (auto& [key, list] : free_blocks) {
    for (void* address : list) {
      auto& block = blocks[address];
      usage[block.device].reserved -= block.size;
      accesses.erase(address);
      blocks.erase(address);
      free(address);
    }
    list.clear();
  }
}

// As c10::CachingAllocator::format_size.
inline std::string format_size(uint64_t size) {
  std::ostringstream text;
  text.precision(2);
  text << std::fixed;
  if (size <= 1024)
    text << size << " bytes";
  else if (size <= 1048576)
    text << size / 1024.0 << " KiB";
  else if (size <= 1073741824ull)
    text << size / 1048576.0 << " MiB";
  else
    text << size / 1073741824.0 << " GiB";
  return text.str();
}

// The sentences of CUDACachingAllocator.cpp, "CUDA out of memory".
[[noreturn]] inline void out_of_memory(int device, size_t size) {
  auto& u = usage[device];
  u.ooms++;
  std::ostringstream text;
  text << "CUDA out of memory. Tried to allocate " << format_size(size) << ". GPU " << device
       << " has a total capacity of " << format_size(settings.memory) << " of which "
       << format_size(settings.memory - u.reserved)
       << " is free. Including non-PyTorch memory, this process has " << format_size(u.reserved)
       << " memory in use. Of the allocated memory " << format_size(u.allocated)
       << " is allocated by PyTorch, and " << format_size(u.reserved - u.allocated)
       << " is reserved by PyTorch but unallocated. If reserved but unallocated memory is large"
          " try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
          "  See documentation for Memory Management "
          " (https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)";
  TORCH_CHECK_WITH(OutOfMemoryError, false, text.str());
  std::abort();
}

inline void* new_block(int device, int64_t stream, size_t size) {
  auto& u = usage[device];
  if (u.reserved + size > settings.memory) {
    u.retries++;
    empty_cache();
    if (u.reserved + size > settings.memory) out_of_memory(device, size);
  }
  void* address = nullptr;
  TORCH_CHECK(!posix_memalign(&address, GRANULE, size), "fakecuda: the host has no memory left");
  blocks[address] = {size, device, stream, {}};
  u.reserved += size;
  u.reserved_peak = std::max(u.reserved_peak, u.reserved);
  memset(address, 0xff, size);
  return address;
}

inline void* allocate_block(int device, size_t asked) {
  release_held();
  auto& stream = current_stream(device);
  size_t size = (asked + GRANULE - 1) / GRANULE * GRANULE;
  auto& list = free_blocks[{device, stream.id, size}];
  void* address;
  if (list.empty()) {
    address = new_block(device, stream.id, size);
  } else {
    address = list.back();
    list.pop_back();
    poison(stream, address, size);
  }
  auto& u = usage[device];
  u.allocations++;
  u.allocated += size;
  u.allocated_peak = std::max(u.allocated_peak, u.allocated);
  return address;
}

struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t n) override {
    Lock lock(mutex);
    contexts.insert(current_device);
    void* address = n ? allocate_block(current_device, n) : nullptr;
    return {address, address, &free_block, c10::Device(GPU, current_device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* to, const void* from, std::size_t n) const override { memcpy(to, from, n); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {
    Lock lock(mutex);
    empty_cache();
  }
  void recordStream(const c10::DataPtr& data, c10::Stream s) override {
    Lock lock(mutex);
    auto found = blocks.find(data.get());
    if (found == blocks.end() || found->second.stream == s.id()) return;
    found->second.used_by.insert(&stream_of(s.device_index(), s.id()));
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    stats.allocated_bytes[0].current = usage[device].allocated;
    stats.allocated_bytes[0].peak = usage[device].allocated_peak;
    stats.reserved_bytes[0].current = usage[device].reserved;
    stats.reserved_bytes[0].peak = usage[device].reserved_peak;
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex device) override {
    Lock lock(mutex);
    usage[device].allocated_peak = usage[device].allocated;
    usage[device].reserved_peak = usage[device].reserved;
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    return {settings.memory - usage[device].reserved, settings.memory};
  }
};

inline Allocator allocator;

// --- page-locked memory -------------------------------------------------------------------------

inline std::map<char*, size_t> locked;              // ranges: address -> bytes
inline std::map<size_t, std::vector<void*>> free_locked;
inline std::unordered_map<void*, int> copies_to_come;  // by the storage's address

inline bool is_locked(const void* p) {
  Lock lock(mutex);
  auto after = locked.upper_bound((char*)p);
  if (after == locked.begin()) return false;
  auto [begin, size] = *--after;
  return (char*)p < begin + size;
}

inline void free_locked_block(void* address) {
  if (!address) return;
  Lock lock(mutex);
  free_locked[locked[(char*)address]].push_back(address);
}

// As ATen/core/CachingHostAllocator.h: memory is given out again only when the copies that it is in
// are over, and its size is a power of two.
struct PinnedAllocator final : at::HostAllocator {
  c10::DataPtr allocate(size_t n) override {
    Lock lock(mutex);
    void* address = n ? take(n) : nullptr;
    return {address, address, &free_locked_block, c10::Device(c10::kCPU)};
  }
  static void* take(size_t n) {
    size_t size = sysconf(_SC_PAGESIZE);  // pages are locked whole
    while (size < n) size *= 2;
    void* address = reuse(free_locked[size]);
    if (!address) {
      TORCH_CHECK(!posix_memalign(&address, sysconf(_SC_PAGESIZE), size), "fakecuda: no memory left");
      locked[(char*)address] = size;
    }
    memset(address, 0xff, size);
    return address;
  }
  static void* reuse(std::vector<void*>& list) {
    for (size_t i = 0; i < list.size(); i++) {
      void* address = list[i];
      if (copies_to_come[address]) continue;
      list.erase(list.begin() + i);
      return address;
    }
    return nullptr;
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_locked_block; }
  void copy_data(void* to, const void* from, std::size_t n) const override { memcpy(to, from, n); }
  bool record_event(void*, void*, c10::Stream) override { return true; }  // copies_to_come does it
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};

inline PinnedAllocator pinned_allocator;

// cudaHostRegister and cudaHostUnregister: their error codes are of driver_types.h
// (cudaErrorHostMemoryAlreadyRegistered, cudaErrorHostMemoryNotRegistered). A range that shares a
// page with a registered one is refused, as the driver locks whole pages.
inline int register_host_memory(char* address, size_t size) {
  Lock lock(mutex);
  size_t page = sysconf(_SC_PAGESIZE);
  auto first_page = [=](const char* p) { return (size_t)p / page; };
  for (auto& [begin, length] : locked)
    if (first_page(begin) <= first_page(address + size - 1) &&
        first_page(address) <= first_page(begin + length - 1))
      return 712;
  locked[address] = size;
  contexts.insert(current_device);
  return 0;
}

inline int unregister_host_memory(char* address) {
  Lock lock(mutex);
  if (!locked.count(address)) return 713;
  for (auto& [key, stream] : streams) drain(*stream);  // it waits for the device
  locked.erase(address);
  accesses.erase(address);
  return 0;
}

}  // namespace fakecuda
