// Kernels: the CPU's, on the same memory.
//
// One boxed fallback of the dispatch key CUDA runs every operator that has no kernel here: its CUDA
// tensors become CPU tensors of the same memory, the operator is dispatched again with the key CPU,
// and what it returns becomes CUDA tensors.
//
// With kernels = "late", results are there late: a kernel reads its inputs when it is launched, and
// the outputs of a stream's last kernel are NaN until the stream is waited for. Whoever reads them on
// another stream without waiting finds NaN. Of the kernels before the last one, and of inputs that a
// kernel may still read, the clocks tell.
#pragma once
#include <ATen/MemoryOverlap.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "hooks.h"

namespace fakecuda {

using at::Tensor;

const c10::DispatchKeySet CPU_KEYS(c10::DispatchKey::CPU), CUDA_KEYS(c10::DispatchKey::CUDA);

// --- one memory, two devices --------------------------------------------------------------------

inline Tensor tensor_on(const c10::Storage& storage, const Tensor& like, c10::DispatchKeySet keys) {
  auto t = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), keys, like.dtype());
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  if (like.is_conj()) t._set_conj(true);
  if (like.is_neg()) t._set_neg(true);
  return t;
}

// The same bytes as CPU memory; keeps the device's storage alive.
inline c10::Storage cpu_storage(const c10::Storage& s) {
  auto release = [](void* kept) { delete (c10::Storage*)kept; };
  c10::DataPtr data(const_cast<void*>(s.data()), new c10::Storage(s), release, c10::Device(c10::kCPU));
  return c10::Storage(c10::Storage::use_byte_size_t(), s.nbytes(), std::move(data),
                      c10::GetAllocator(c10::kCPU), true);
}

inline Tensor cpu_alias(const Tensor& t) {
  return t.is_cuda() ? tensor_on(cpu_storage(t.storage()), t, CPU_KEYS) : t;
}

// The same, without a hold on the memory: what is queued does not keep its operands alive.
inline Tensor borrowed(const Tensor& t) {
  c10::DataPtr data(const_cast<void*>(t.storage().data()), c10::Device(c10::kCPU));
  c10::Storage s(c10::Storage::use_byte_size_t(), t.storage().nbytes(), std::move(data), nullptr, false);
  return tensor_on(s, t, CPU_KEYS);
}

inline c10::Storage cuda_storage(size_t bytes, int device) {
  c10::DeviceGuard on(c10::Device(GPU, device));
  return c10::Storage(c10::Storage::use_byte_size_t(), bytes, allocator.allocate(bytes), &allocator, true);
}

inline void replace_memory(c10::StorageImpl* storage, c10::DataPtr memory, size_t bytes) {
  storage->set_data_ptr_noswap(std::move(memory));
  storage->set_nbytes(bytes);
}

inline void resize_storage(const c10::Storage& storage, size_t bytes) {
  c10::DeviceGuard on(storage.device());
  auto memory = allocator.allocate(bytes);
  {
    Lock lock(mutex);
    auto& stream = current_stream(storage.device().index());
    drain(stream);
    note_launch(stream, "resize");
  }
  if (size_t kept = std::min(bytes, storage.nbytes())) memcpy(memory.get(), storage.data(), kept);
  replace_memory(storage.unsafeGetStorageImpl(), std::move(memory), bytes);
}

// --- results that are late ----------------------------------------------------------------------

// What the kernel has written to `t`, which is CPU memory, is not there before the stream is at it.
inline void make_late(Stream& stream, const Tensor& t) {
  if (settings.kernels != "late" || t.numel() == 0 || !t.has_storage() || !t.storage().data()) return;
  if (at::has_internal_overlap(t) != at::MemOverlap::No) return;
  at::AutoDispatchBelowADInplaceOrView plain;
  auto target = borrowed(t);
  auto result = target.clone();
  if (t.is_floating_point() || t.is_complex())
    target.fill_(std::numeric_limits<double>::quiet_NaN());
  else
    target.zero_();
  enqueue_late(stream, [=]() mutable {
    at::AutoDispatchBelowADInplaceOrView plain;
    target.copy_(result);
  });
}

// A CUDA tensor of what a kernel has returned in CPU memory; its bytes come when the stream is at it.
inline Tensor result_on_device(const Tensor& t, int device, const std::string& by) {
  size_t bytes = t.storage().nbytes();
  auto storage = cuda_storage(bytes, device);
  auto result = tensor_on(storage, t, CUDA_KEYS);
  Lock lock(mutex);
  auto& stream = current_stream(device);
  note_access(stream, result, true, by);
  if (!bytes) return result;
  void* to = storage.mutable_data();
  auto copy = [to, kept = t, bytes] { memcpy(to, kept.storage().data(), bytes); };
  if (settings.kernels == "late")
    enqueue_late(stream, copy);
  else
    enqueue(stream, copy);
  return result;
}

// --- what CUDA refuses --------------------------------------------------------------------------

// Operators whose indices may be on the CPU (ATen/native/TensorAdvancedIndexing.cpp, make_info).
inline bool takes_cpu_indices(const std::string& op) {
  static const std::set<std::string> names = {"aten::index", "aten::index_put_", "aten::_index_put_impl_",
                                              "aten::_unsafe_index", "aten::_unsafe_index_put"};
  return names.count(op);
}

// A CPU tensor of dimension 0 is a number to what TensorIterator runs (ATen/TensorIterator.cpp,
// compute_types, allow_cpu_scalars: build_binary_op and build_comparison_op set it), to fills, to
// foreach kernels and to the fused optimizers' learning rate. torch marks the former "pointwise", but
// forgets floor_divide and most of what works in place.
inline bool takes_cpu_numbers(const c10::OperatorHandle& op) {
  static const std::set<std::string> names = {"aten::fill_",        "aten::masked_fill",
                                              "aten::masked_fill_", "aten::index_fill",
                                              "aten::index_fill_",  "aten::where",
                                              "aten::floor_divide", "aten::floor_divide_"};
  const auto& name = op.schema().name();
  auto pointwise = [](const c10::OperatorHandle& o) { return o.hasTag(at::Tag::pointwise); };
  if (pointwise(op) || names.count(name) || takes_cpu_indices(name)) return true;
  if (name.rfind("aten::_foreach_", 0) == 0 || name.rfind("aten::_fused_", 0) == 0) return true;
  if (name.back() != '_') return false;
  auto functional = c10::Dispatcher::singleton().findSchema(
      {name.substr(0, name.size() - 1), op.schema().overload_name()});
  return functional && pointwise(*functional);
}

// Operators whose result's size, or answer, the host must know.
inline bool host_waits_in(const std::string& op) {
  static const std::set<std::string> names = {
      "aten::nonzero",    "aten::equal",  "aten::_unique2", "aten::masked_select", "aten::is_nonzero",
      "aten::unique_dim", "aten::bincount", "aten::unique_consecutive"};
  return names.count(op);
}

// --- the fallback -------------------------------------------------------------------------------

class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : op_(op), name_(op.schema().name()), stack_(stack) {}

  void run() {
    lower_arguments();
    if (!device_.has_index()) device_ = guard.getDevice();
    refuse_cpu_tensors();
    c10::DeviceGuard on(device_);
    launch();
    if (op_.hasTag(at::Tag::nondeterministic_seeded))
      with_random_numbers(*generator(), [&] { op_.redispatchBoxed(CPU_KEYS, stack_); });
    else
      op_.redispatchBoxed(CPU_KEYS, stack_);
    adopt_resized_outputs();
    raise_results();
    if (host_waits_in(name_)) tell_host_wait(name_.c_str());
  }

 private:
  struct Operand {
    Tensor original, alias;
    bool written;
  };

  void lower_arguments() {
    const auto& arguments = op_.schema().arguments();
    size_t first = stack_->size() - arguments.size();
    for (size_t k = 0; k < arguments.size(); k++) {
      auto* alias = arguments[k].alias_info();
      lower((*stack_)[first + k], alias && alias->isWrite());
    }
  }

  void lower(c10::IValue& value, bool written) {
    if (value.isTensor()) {
      value = lower(value.toTensor(), written);
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(lower(t, written));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (std::optional<Tensor> t : value.toOptionalTensorList())
        list.push_back(t ? std::optional<Tensor>(lower(*t, written)) : t);
      value = list;
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      if (!device_.has_index()) device_ = c10::Device(GPU, index_of(value.toDevice()));
      value = c10::Device(c10::kCPU);
    } else if (value.isGenerator()) {
      auto given = value.toGenerator();
      TORCH_CHECK(given.device().is_cuda(), "Expected a 'cuda' device type for generator but found '",
                  given.device().type(), "'");
      generator_ = given.get<Generator>();
      value = c10::IValue();  // the CPU's own, which with_random_numbers sets
    }
  }

  Tensor lower(const Tensor& t, bool written) {
    if (!t.defined()) return t;
    if (!t.is_cuda()) {
      cpu_tensors_.push_back(t);
      return t;
    }
    TORCH_CHECK(!device_.has_index() || device_ == t.device(),
                "Expected all tensors to be on the same device, but found at least two devices, ",
                device_, " and ", t.device(), "! (", name_, ")");
    device_ = t.device();
    for (auto& operand : operands_)
      if (operand.original.is_same(t)) {
        operand.written |= written;
        return operand.alias;
      }
    auto* storage = t.storage().unsafeGetStorageImpl();
    auto found = storages_.find(storage);
    if (found == storages_.end()) found = storages_.emplace(storage, cpu_storage(t.storage())).first;
    auto alias = tensor_on(found->second, t, CPU_KEYS);
    operands_.push_back({t, alias, written});
    return alias;
  }

  void refuse_cpu_tensors() {
    for (auto& t : cpu_tensors_) {
      bool allowed = t.dim() == 0 ? takes_cpu_numbers(op_) : takes_cpu_indices(name_);
      TORCH_CHECK(allowed, "Expected all tensors to be on the same device, but found at least two devices, ",
                  device_, " and cpu! (", name_, ")");
    }
  }

  // A view launches nothing.
  bool is_view() const {
    for (auto& returned : op_.schema().returns())
      if (!returned.alias_info() || returned.alias_info()->isWrite()) return false;
    return !op_.schema().returns().empty();
  }

  void launch() {
    if (is_view()) return;
    Lock lock(mutex);
    auto& stream = current_stream(device_.index());
    maybe_work();
    drain(stream);
    note_launch(stream, name_);
    counts.kernels++;
    for (auto& operand : operands_) note_access(stream, operand.original, operand.written, name_);
    if (host_waits_in(name_)) host_waits_for(stream);
  }

  Generator* generator() {
    return generator_ ? generator_ : default_generator(device_.index()).get<Generator>();
  }

  // out= tensors that the CPU's kernel has resized; and what was written in place is late.
  void adopt_resized_outputs() {
    for (auto& operand : operands_) {
      if (!operand.written) continue;
      auto &alias = operand.alias.storage(), &original = operand.original.storage();
      if (alias.data() != original.data() || alias.nbytes() != original.nbytes()) {
        auto memory = allocator.allocate(alias.nbytes());
        Lock lock(mutex);
        drain(current_stream(device_.index()));
        memcpy(memory.get(), alias.data(), alias.nbytes());
        replace_memory(original.unsafeGetStorageImpl(), std::move(memory), alias.nbytes());
      }
      if (operand.alias.sizes() != operand.original.sizes() ||
          operand.alias.strides() != operand.original.strides())
        operand.original.unsafeGetTensorImpl()->set_sizes_and_strides(
            operand.alias.sizes(), operand.alias.strides(), operand.alias.storage_offset());
      Lock lock(mutex);
      make_late(current_stream(device_.index()), operand.original);
    }
  }

  void raise_results() {
    size_t returned = op_.schema().returns().size();
    for (size_t k = stack_->size() - returned; k < stack_->size(); k++) {
      c10::IValue& value = (*stack_)[k];
      if (value.isTensor()) {
        value = raise(value.toTensor());
      } else if (value.isTensorList()) {
        c10::List<Tensor> list;
        for (const Tensor& t : value.toTensorVector()) list.push_back(raise(t));
        value = list;
      }
    }
  }

  Tensor raise(const Tensor& t) {
    if (!t.defined() || t.is_cuda()) return t;
    for (auto& operand : operands_)
      if (operand.alias.is_same(t)) return operand.original;
    for (auto& given : cpu_tensors_)
      if (given.is_same(t)) return t;
    for (auto& [original, alias] : storages_)
      if (alias.unsafeGetStorageImpl() == t.storage().unsafeGetStorageImpl())  // a view
        return tensor_on(c10::Storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(original)), t,
                         CUDA_KEYS);
    return result_on_device(t, device_.index(), name_);
  }

  const c10::OperatorHandle& op_;
  const std::string& name_;
  torch::jit::Stack* stack_;
  c10::Device device_{GPU, -1};
  std::vector<Operand> operands_;
  std::map<c10::StorageImpl*, c10::Storage> storages_;
  std::vector<Tensor> cpu_tensors_;
  Generator* generator_ = nullptr;
};

inline void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) { Call(op, stack).run(); }

// --- operators of its own -----------------------------------------------------------------------

inline Tensor empty_memory_format(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
                                  std::optional<at::Layout>, std::optional<c10::Device> device,
                                  std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard on(device ? *device : guard.getDevice());
  return at::detail::empty_generic(size, &allocator, CUDA_KEYS, c10::dtype_or_default(dtype), format);
}

inline Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                            std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                            std::optional<c10::Device> device, std::optional<bool>) {
  c10::DeviceGuard on(device ? *device : guard.getDevice());
  return at::detail::empty_strided_generic(size, stride, &allocator, CUDA_KEYS, c10::dtype_or_default(dtype));
}

// CUDA Runtime API, "API synchronization behavior", and ATen/native/cuda/Copy.cu. Only copies
// between the device and page-locked memory run beside the host. From pageable memory the bytes are
// taken before the call returns; to pageable memory the host waits.
inline Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  if (to.is_same(from) || to.numel() == 0) return to;
  auto device = to.is_cuda() ? to.device() : from.device();
  c10::DeviceGuard on(device);
  bool on_device = to.is_cuda() && from.is_cuda();
  const char* name = on_device ? "copy on the device" : to.is_cuda() ? "copy to the device" : "copy to the host";
  {
    Lock lock(mutex);
    auto& stream = current_stream(device.index());
    maybe_work();
    note_launch(stream, name);
    counts.kernels++;
    note_access(stream, from, false, name);
    note_access(stream, to, true, name);
    void* host = const_cast<void*>((to.is_cuda() ? from : to).storage().data());
    if (!on_device && non_blocking && is_locked(host) && settings.copies != "now") {
      auto target = borrowed(to), source = borrowed(from.expand_as(to));
      copies_to_come[host]++;
      counts.late_copies++;
      enqueue_late(stream, [=]() mutable {
        at::AutoDispatchBelowADInplaceOrView plain;
        target.copy_(source);
        copies_to_come[host]--;
      });
      return to;
    }
    drain(stream);
    at::AutoDispatchBelowADInplaceOrView plain;
    auto target = cpu_alias(to);
    target.copy_(cpu_alias(from));
    if (on_device) make_late(stream, to);
    // Pageable memory to the device, non_blocking: staged, so that nobody waits for the device.
    if (on_device || (non_blocking && to.is_cuda())) return to;
    host_waits_for(stream);
  }
  tell_host_wait(name);
  return to;
}

inline Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  Tensor target = to;
  copy_(target, from, false);
  return to;
}

inline void foreach_copy_(at::TensorList to, at::TensorList from, bool non_blocking) {
  TORCH_CHECK(to.size() == from.size(), "_foreach_copy_: lists of different lengths");
  for (size_t i = 0; i < to.size(); i++) {
    Tensor target = to[i];
    target.copy_(from[i], non_blocking);
  }
}

inline at::Scalar item(const Tensor& t) {
  at::Scalar value;
  {
    Lock lock(mutex);
    auto& stream = current_stream(t.device().index());
    note_launch(stream, "item");
    note_access(stream, t, false, "item");
    host_waits_for(stream);
    value = cpu_alias(t).item();
  }
  tell_host_wait("item");
  return value;
}

inline void set_memory(Tensor& t, c10::Storage storage, int64_t offset) {
  TORCH_CHECK(storage.device().type() == GPU, "set_: a storage of ", storage.device());
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  t.unsafeGetTensorImpl()->set_storage_offset(offset);
}

inline Tensor& set_storage_offset(Tensor& t, c10::Storage storage, c10::SymInt offset,
                                  c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  set_memory(t, std::move(storage), offset.expect_int());
  auto sizes = C10_AS_INTARRAYREF_SLOW(size), strides = C10_AS_INTARRAYREF_SLOW(stride);
  if (strides.size() == sizes.size())
    t.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  else
    t.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return t;
}

inline Tensor& set_tensor(Tensor& t, const Tensor& source) {
  set_memory(t, source.storage(), source.storage_offset());
  t.unsafeGetTensorImpl()->set_sizes_and_strides(source.sizes(), source.strides());
  return t;
}

inline Tensor& set_storage(Tensor& t, c10::Storage storage) {
  int64_t n = storage.nbytes() / t.element_size();
  set_memory(t, std::move(storage), 0);
  t.unsafeGetTensorImpl()->set_sizes_contiguous({n});
  return t;
}

inline Tensor& set_nothing(Tensor& t) {
  set_memory(t, cuda_storage(0, t.device().index()), 0);
  t.unsafeGetTensorImpl()->set_sizes_contiguous({0});
  return t;
}

inline const Tensor& resize_(const Tensor& t, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  t.unsafeGetTensorImpl()->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  size_t bytes = (t.numel() + t.storage_offset()) * t.element_size();
  if (t.numel() && bytes > t.storage().nbytes()) resize_storage(t.storage(), bytes);
  return t;
}

inline void record_stream(Tensor& t, c10::Stream s) { allocator.recordStream(t.storage().data_ptr(), s); }

// The tensor as one of the CPU, for a kernel that is written in Python, and for gloo.
inline Tensor alias_for(const Tensor& t, bool written, const std::string& by) {
  {
    Lock lock(mutex);
    auto& stream = current_stream(t.device().index());
    drain(stream);
    note_launch(stream, by);
    note_access(stream, t, written, by);
  }
  return cpu_alias(t);
}

}  // namespace fakecuda
