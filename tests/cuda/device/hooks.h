// What torch asks a CUDA build for: the device guard, events, generators, CUDAHooks.
#pragma once
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "memory.h"

namespace fakecuda {

inline int index_of(c10::Device d) { return d.has_index() ? d.index() : current_device; }

// --- streams and events: c10::impl::DeviceGuardImplInterface, as c10/cuda/impl/CUDAGuardImpl.h ---

struct EventHandle {
  EventPtr event;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Device = c10::Device;
  using CStream = c10::Stream;

  c10::DeviceType type() const override { return GPU; }
  c10::DeviceIndex deviceCount() const noexcept override { return device_count(); }
  Device getDevice() const override { return {GPU, (c10::DeviceIndex)current_device}; }
  Device exchangeDevice(Device d) const override {
    Device before = getDevice();
    current_device = index_of(d);
    return before;
  }
  void setDevice(Device d) const override {
    TORCH_CHECK(index_of(d) < device_count(), "CUDA error: invalid device ordinal");
    current_device = index_of(d);
  }
  void uncheckedSetDevice(Device d) const noexcept override { current_device = index_of(d); }

  static CStream stream(int device, int64_t id) {
    return CStream(CStream::UNSAFE, Device(GPU, device), id);
  }
  CStream getStream(Device d) const override {
    Lock lock(mutex);
    return stream(index_of(d), current_stream(index_of(d)).id);
  }
  CStream getDefaultStream(Device d) const override { return stream(index_of(d), 0); }
  CStream getStreamFromGlobalPool(Device d, bool) const override { return getNewStream(d, 0); }
  CStream getNewStream(Device d, int) const override {
    Lock lock(mutex);
    return stream(index_of(d), stream_of(index_of(d), next_stream_id++).id);
  }
  CStream exchangeStream(CStream s) const override {
    auto before = getStream(s.device());
    current_stream_ids[s.device_index()] = s.id();
    return before;
  }
  void* getStreamNativeHandle(const CStream s) const override { return (void*)s.id(); }

  void record(void** handle, const CStream& s, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    Lock lock(mutex);
    if (!*handle) *handle = new EventHandle;
    ((EventHandle*)*handle)->event = record_on(stream_of(s.device_index(), s.id()));
  }
  void block(void* handle, const CStream& s) const override {
    if (!handle) return;
    Lock lock(mutex);
    auto event = ((EventHandle*)handle)->event;
    if (!event) return;
    auto& waiting = stream_of(s.device_index(), s.id());
    join(waiting.clock, event->clock);
    if (!event->done) waiting.queue.push_back({nullptr, event, nullptr});
  }
  bool queryEvent(void* handle) const override {
    if (!handle) return true;
    Lock lock(mutex);
    maybe_work();
    auto event = ((EventHandle*)handle)->event;
    if (!event) return true;
    // Whoever asks in a loop must come to an end.
    if (!event->done && settings.copies == "late") complete(*event);
    if (event->done) join(host_clock, event->clock);
    return event->done;
  }
  void synchronizeEvent(void* handle) const override {
    if (!handle) return;
    {
      Lock lock(mutex);
      auto event = ((EventHandle*)handle)->event;
      if (!event) return;
      complete(*event);
      join(host_clock, event->clock);
    }
    tell_host_wait("event.synchronize");
  }
  void destroyEvent(void* handle, const c10::DeviceIndex) const noexcept override {
    delete (EventHandle*)handle;
  }
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 1.0; }

  bool queryStream(const CStream& s) const override {
    Lock lock(mutex);
    maybe_work();
    return stream_of(s.device_index(), s.id()).queue.empty();
  }
  void synchronizeStream(const CStream& s) const override {
    {
      Lock lock(mutex);
      host_waits_for(stream_of(s.device_index(), s.id()));
    }
    tell_host_wait("stream.synchronize");
  }
  void synchronizeDevice(const c10::DeviceIndex device) const override {
    {
      Lock lock(mutex);
      contexts.insert(device < 0 ? current_device : device);
      for (auto& [key, stream] : streams)
        if (key.first == device || device < 0) host_waits_for(*stream);
    }
    tell_host_wait("synchronize");
  }
  c10::DeviceCapability getDeviceCapability(Device) const override { return {}; }
  void recordDataPtrOnStream(const c10::DataPtr& data, const CStream& s) const override {
    allocator.recordStream(data, s);
  }
};

inline Guard guard;

// --- random numbers -----------------------------------------------------------------------------

// A seed and an offset, as at::CUDAGeneratorImpl has them; the state is those 16 bytes.
struct Generator final : c10::GeneratorImpl {
  uint64_t seed_ = c10::default_rng_seed_val, offset_ = 0;

  explicit Generator(c10::DeviceIndex i)
      : GeneratorImpl(c10::Device(GPU, i), c10::DispatchKeySet(c10::DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override {
    seed_ = seed;
    offset_ = 0;
  }
  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override {
    set_current_seed(std::random_device()());
    return seed_;
  }
  void set_offset(uint64_t offset) override { offset_ = offset; }
  uint64_t get_offset() const override { return offset_; }
  void set_state(const c10::TensorImpl& state) override {
    TORCH_CHECK(state.device().is_cpu() && state.numel() == 16,
                "RNG state must be a torch.ByteTensor of 16 bytes on the CPU");
    auto* words = (const uint64_t*)state.data();
    seed_ = words[0];
    offset_ = words[1];
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    auto state = at::detail::empty_cpu({16}, at::kByte, false, std::nullopt);
    auto* words = (uint64_t*)state.mutable_data_ptr();
    words[0] = seed_;
    words[1] = offset_;
    return state.getIntrusivePtr();
  }
  Generator* clone_impl() const override {
    auto* copy = new Generator(device().index());
    copy->seed_ = seed_;
    copy->offset_ = offset_;
    return copy;
  }
};

inline at::Generator& default_generator(int device) {
  static std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (int i = 0; i < MOST_DEVICES; i++) made.push_back(at::make_generator<Generator>(i));
    return made;
  }();
  return all.at(device < 0 ? current_device : device);
}

// Runs a CPU kernel whose random numbers follow from the device's generator. The CPU's generator is
// as it was afterwards.
template <typename Run>
void with_random_numbers(Generator& generator, Run run) {
  static std::mutex one;
  std::lock_guard<std::mutex> lock(one);
  auto* cpu = at::detail::getDefaultCPUGenerator().get<at::CPUGeneratorImpl>();
  auto engine = cpu->engine();
  auto next_float = cpu->next_float_normal_sample();
  auto next_double = cpu->next_double_normal_sample();
  auto restore = [&] {
    cpu->set_engine(engine);
    cpu->set_next_float_normal_sample(next_float);
    cpu->set_next_double_normal_sample(next_double);
  };
  generator.offset_ += 4;
  uint64_t mixed = generator.seed_ * 0x9E3779B97F4A7C15ull + generator.offset_ * 0xBF58476D1CE4E5B9ull;
  cpu->set_engine(at::mt19937(mixed));
  cpu->set_next_float_normal_sample(std::nullopt);
  cpu->set_next_double_normal_sample(std::nullopt);
  try {
    run();
  } catch (...) {
    restore();
    throw;
  }
  restore();
}

// --- hooks: at::CUDAHooksInterface --------------------------------------------------------------

struct Hooks final : at::CUDAHooksInterface {
  Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count() > 0; }
  bool hasCUDA() const override { return device_count() > 0; }
  bool hasPrimaryContext(c10::DeviceIndex device) const override {
    Lock lock(mutex);
    return contexts.count(device);
  }
  c10::DeviceIndex deviceCount() const override { return device_count(); }
  int getNumGPUs() const override { return device_count(); }
  c10::DeviceIndex current_device() const override { return fakecuda::current_device; }
  c10::DeviceIndex getCurrentDevice() const override { return fakecuda::current_device; }
  void setCurrentDevice(c10::DeviceIndex d) const override { fakecuda::current_device = d; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex d) const override {
    return std::exchange(fakecuda::current_device, (int)d);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex d) const override { return exchangeDevice(d); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex i) const override {
    return default_generator(i);
  }
  at::Generator getNewGenerator(c10::DeviceIndex i) const override {
    return at::make_generator<Generator>(i < 0 ? fakecuda::current_device : i);
  }
  bool isPinnedPtr(const void* p) const override { return is_locked(p); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  at::Allocator* getCUDADeviceAllocator() const override { return &allocator; }
  c10::Device getDeviceFromPtr(void* p) const override {
    Lock lock(mutex);
    auto found = blocks.find(p);
    int device = found == blocks.end() ? fakecuda::current_device : found->second.device;
    return {GPU, (c10::DeviceIndex)device};
  }
  void deviceSynchronize(c10::DeviceIndex device) const override { guard.synchronizeDevice(device); }
};

}  // namespace fakecuda
