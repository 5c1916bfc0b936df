// A device of type `cuda` for a torch that was built for the CPU alone. See ../README.md.
#include "kernels.h"

namespace fakecuda {

REGISTER_ALLOCATOR(GPU, &allocator);
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
static const int pinned_memory = (at::setHostAllocator(GPU, &pinned_allocator, 0), 0);

static std::vector<std::string> take_races() {
  Lock lock(mutex);
  std::vector<std::string> found;
  for (auto& [kind, times] : race_kinds) found.push_back(std::to_string(times) + " x " + kind);
  race_kinds.clear();
  return found;
}

static std::vector<int64_t> usage_of(int64_t device) {
  Lock lock(mutex);
  auto& u = usage[device < 0 ? current_device : device];
  return {u.allocated, u.allocated_peak, u.reserved, u.reserved_peak, u.allocations, u.retries, u.ooms,
          (int64_t)settings.memory};
}

static std::vector<int64_t> all_counts() {
  Lock lock(mutex);
  return {counts.kernels, counts.late_copies, counts.races, counts.host_waits};
}

static std::vector<int64_t> used_devices() {
  Lock lock(mutex);
  return {contexts.begin(), contexts.end()};
}

}  // namespace fakecuda

namespace at {  // the macro names the class without its namespace
using CUDAHooks = fakecuda::Hooks;
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", CUDAHooks)
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fakecuda::fallback>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", fakecuda::empty_memory_format);
  m.impl("empty_strided", fakecuda::empty_strided);
  m.impl("copy_", fakecuda::copy_);
  m.impl("_copy_from_and_resize", fakecuda::copy_from_and_resize);
  m.impl("_foreach_copy_", fakecuda::foreach_copy_);
  m.impl("_local_scalar_dense", fakecuda::item);
  m.impl("set_.source_Storage_storage_offset", fakecuda::set_storage_offset);
  m.impl("set_.source_Tensor", fakecuda::set_tensor);
  m.impl("set_.source_Storage", fakecuda::set_storage);
  m.impl("set_", fakecuda::set_nothing);
  m.impl("resize_", fakecuda::resize_);
  m.impl("record_stream", fakecuda::record_stream);
}

TORCH_LIBRARY(fakecuda, m) {
  m.def("alias(Tensor t, bool written, str by) -> Tensor");
  m.def("result(Tensor t, int device, str by) -> Tensor");
  m.def("resize(Tensor t, int bytes) -> ()");
  m.def("generator(int device) -> Generator?", [](int64_t i) { return fakecuda::default_generator(i); });
  m.def("races() -> str[]", [] { return fakecuda::take_races(); });
  m.def("usage(int device) -> int[]", [](int64_t i) { return fakecuda::usage_of(i); });
  m.def("counts() -> int[]", [] { return fakecuda::all_counts(); });
  m.def("contexts() -> int[]", [] { return fakecuda::used_devices(); });
}

TORCH_LIBRARY_IMPL(fakecuda, CUDA, m) {
  m.impl("alias", [](const at::Tensor& t, bool written, std::string by) {
    return fakecuda::alias_for(t, written, by);
  });
  m.impl("resize", [](const at::Tensor& t, int64_t bytes) { fakecuda::resize_storage(t.storage(), bytes); });
}

TORCH_LIBRARY_IMPL(fakecuda, CPU, m) {
  m.impl("result", [](const at::Tensor& t, int64_t device, std::string by) {
    return fakecuda::result_on_device(t, device, by);
  });
}

// For ctypes. What takes the device's lock must not hold Python's: ctypes.CDLL lets it go.
extern "C" {
void fakecuda_start() { at::globalContext().lazyInitDevice(fakecuda::GPU); }
void fakecuda_read_settings() {
  fakecuda::Lock lock(fakecuda::mutex);
  fakecuda::settings = fakecuda::read_settings();
}
void fakecuda_on_host_wait(void (*call)(const char*)) { fakecuda::on_host_wait = call; }
int fakecuda_register(char* address, size_t bytes) { return fakecuda::register_host_memory(address, bytes); }
int fakecuda_unregister(char* address) { return fakecuda::unregister_host_memory(address); }
int fakecuda_device_count() { return fakecuda::device_count(); }
int fakecuda_device() { return fakecuda::current_device; }
int fakecuda_set_device(int device) {
  if (device < 0 || device >= fakecuda::device_count()) return 101;  // cudaErrorInvalidDevice
  fakecuda::current_device = device;
  return 0;
}
long fakecuda_stream(int device) {
  fakecuda::Lock lock(fakecuda::mutex);
  return fakecuda::current_stream(device).id;
}
void fakecuda_set_stream(int device, long id) {
  fakecuda::Lock lock(fakecuda::mutex);
  fakecuda::current_stream_ids[device] = id;
  fakecuda::contexts.insert(device);
}
void fakecuda_synchronize(int device) { fakecuda::guard.synchronizeDevice(device); }
void fakecuda_empty_cache() { fakecuda::allocator.emptyCache({0, 0}); }
void fakecuda_reset_peak(int device) { fakecuda::allocator.resetPeakStats(device); }
}
