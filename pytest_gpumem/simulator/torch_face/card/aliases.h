// The way of tensors from a card to the host's kernels, and back.

#pragma once

#include <ATen/NestedTensorImpl.h>
#include <ATen/SparseCsrTensorImpl.h>
#include <ATen/SparseTensorImpl.h>
#include <ATen/quantized/QTensorImpl.h>

#include <optional>
#include <utility>

#include "account.h"

namespace {

void drop_storage(void* impl) {
  c10::raw::intrusive_ptr::decref(static_cast<StorageImpl*>(impl));
}

// The keys of each kind of tensor, on the host and on a card.
struct Kind {
  DispatchKey host, card;
  bool has_storage() const { return host == DispatchKey::CPU || host == DispatchKey::QuantizedCPU; }
};
constexpr Kind kDense{DispatchKey::CPU, DispatchKey::CUDA};
constexpr Kind kSparse{DispatchKey::SparseCPU, DispatchKey::SparseCUDA};
constexpr Kind kCompressed{DispatchKey::SparseCsrCPU, DispatchKey::SparseCsrCUDA};
constexpr Kind kQuantized{DispatchKey::QuantizedCPU, DispatchKey::QuantizedCUDA};
constexpr Kind kNested{DispatchKey::NestedTensorCPU, DispatchKey::NestedTensorCUDA};

Kind kind_of(const Tensor& tensor) {
  if (tensor.is_nested()) return kNested;
  if (tensor.is_quantized()) return kQuantized;
  if (tensor.layout() == c10::kStrided) return kDense;
  if (tensor.layout() == c10::kSparse) return kSparse;
  TORCH_CHECK_NOT_IMPLEMENTED(tensor.layout() != c10::kMkldnn,
                              "CUDA has no tensors of MKL-DNN");
  return kCompressed;
}

template <class Impl>
Impl* impl_of(const Tensor& tensor) {
  return static_cast<Impl*>(tensor.unsafeGetTensorImpl());
}

// The arguments of one call as CPU tensors on the same memory, and the way back.
class Aliases {
 public:
  explicit Aliases(bool writes = false) : writes_(writes) {}

  Tensor to_host(const Tensor& card) {
    for (auto& [host, original] : tensors_)
      if (original.is_same(card)) return host;
    Tensor host = rebuilt(
        card, Device(c10::kCPU), [](Kind kind) { return kind.host; },
        [&](const Storage& storage) { return host_of(storage); },
        [&](const Tensor& part) { return to_host(part); });
    tensors_.emplace_back(host, card);
    return host;
  }

  // `result` of the CPU's kernel as a tensor on `card`: an argument, a view of one, or a new one,
  // which without a card stays on the host.
  Tensor to_card(const Tensor& result, std::optional<DeviceIndex> card) {
    if (!result.defined()) return result;
    for (auto& [host, original] : tensors_)
      if (host.is_same(result)) return original;
    if (!card || result.device().type() != c10::DeviceType::CPU) return result;
    return rebuilt(
        result, Device(kCard, *card), [](Kind kind) { return kind.card; },
        [&](const Storage& storage) { return card_of(storage, *card); },
        [&](const Tensor& part) { return to_card(part, card); });
  }

  // Gives originals the size and the memory that the kernel gave their stand-ins.
  void adopt_changes() {
    for (auto& [host, original] : tensors_) {
      if (adopted_parts(host, original)) continue;
      auto* hosts = host.storage().unsafeGetStorageImpl();
      auto* cards = original.storage().unsafeGetStorageImpl();
      if (hosts->data() != cards->data() || hosts->nbytes() != cards->nbytes()) {
        size_t size = hosts->nbytes();
        void* bytes = hosts->mutable_data();
        Storage owner(Storage::use_byte_size_t(), size,
                      hosts->set_data_ptr(at::DataPtr(bytes, c10::kCPU)), nullptr, false);
        // The new block is taken before the old one is free, as on a card.
        cards->set_data_ptr_noswap(charged(std::move(owner), cards->device().index()));
        cards->set_nbytes(size);
      }
      if (host.sizes() != original.sizes() || host.strides() != original.strides() ||
          host.storage_offset() != original.storage_offset())
        original.unsafeGetTensorImpl()->set_sizes_and_strides(
            host.sizes(), host.strides(), host.storage_offset());
    }
  }

 private:
  // A tensor like `tensor` on `device`, made of what `move` makes of its storage or its parts.
  template <class Key, class MoveStorage, class Move>
  static Tensor rebuilt(const Tensor& tensor, Device device, const Key& key,
                        const MoveStorage& move_storage, const Move& move) {
    Kind kind = kind_of(tensor);
    DispatchKeySet keys(key(kind));
    c10::intrusive_ptr<c10::TensorImpl> made;
    if (kind.host == kSparse.host) {
      auto* from = impl_of<at::SparseTensorImpl>(tensor);
      c10::OptionalDeviceGuard there(device);  // where its constructor makes empty parts
      made = c10::make_intrusive<at::SparseTensorImpl>(keys, tensor.dtype());
      set_parts(*static_cast<at::SparseTensorImpl*>(made.get()), *from, move);
    } else if (kind.host == kCompressed.host) {
      made = c10::make_intrusive<at::SparseCsrTensorImpl>(keys, device, tensor.layout(),
                                                          tensor.dtype());
      set_parts(*static_cast<at::SparseCsrTensorImpl*>(made.get()),
                *impl_of<at::SparseCsrTensorImpl>(tensor), move);
    } else if (kind.host == kNested.host) {
      auto* from = impl_of<at::native::NestedTensorImpl>(tensor);
      made = c10::make_intrusive<at::native::NestedTensorImpl>(
          move(from->get_unsafe_storage_as_tensor()), from->get_nested_sizes(),
          from->get_nested_strides(), from->get_storage_offsets());
    } else {
      if (kind.host == kQuantized.host)
        made = c10::make_intrusive<at::QTensorImpl>(move_storage(tensor.storage()), keys,
                                                    tensor.dtype(),
                                                    impl_of<at::QTensorImpl>(tensor)->quantizer());
      else
        made = c10::make_intrusive<c10::TensorImpl>(move_storage(tensor.storage()), keys,
                                                    tensor.dtype());
      made->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    }
    if (tensor.is_conj()) made->_set_conj(true);
    if (tensor.is_neg()) made->_set_neg(true);
    return Tensor{std::move(made)};
  }

  template <class Move>
  static void set_parts(at::SparseTensorImpl& to, at::SparseTensorImpl& from, const Move& move) {
    to.raw_resize_(from.sparse_dim(), from.dense_dim(), from.sizes());
    to.set_indices_and_values_unsafe(move(from.indices()), move(from.values()));
    to.set_coalesced(from.coalesced());
  }

  template <class Move>
  static void set_parts(at::SparseCsrTensorImpl& to, at::SparseCsrTensorImpl& from,
                        const Move& move) {
    to.set_member_tensors(move(from.compressed_indices()), move(from.plain_indices()),
                          move(from.values()), from.sizes());
  }

  // Gives an original that is sparse the parts that the kernel gave its stand-in.
  bool adopted_parts(const Tensor& host, const Tensor& original) {
    Kind kind = kind_of(host);
    if (kind.host == kNested.host) return true;  // its buffer is what may have changed
    auto move = [&](const Tensor& part) { return to_card(part, original.device().index()); };
    if (kind.host == kSparse.host)
      set_parts(*impl_of<at::SparseTensorImpl>(original), *impl_of<at::SparseTensorImpl>(host),
                move);
    else if (kind.host == kCompressed.host)
      set_parts(*impl_of<at::SparseCsrTensorImpl>(original),
                *impl_of<at::SparseCsrTensorImpl>(host), move);
    else
      return false;
    return true;
  }

  Storage host_of(const Storage& card) {
    for (auto& [host, original] : storages_)
      if (original.unsafeGetStorageImpl() == card.unsafeGetStorageImpl()) return host;
    // It keeps the card's alive: what the kernel started may outlast this call.
    auto* impl = card.unsafeGetStorageImpl();
    c10::raw::intrusive_ptr::incref(impl);
    // What only reads shares the bytes of a lazy clone with those that have them too.
    void* at = writes_ ? impl->mutable_data() : const_cast<void*>(impl->data());
    at::DataPtr bytes(at, impl, &drop_storage, c10::kCPU);
    Storage host(Storage::use_byte_size_t(), card.nbytes(), std::move(bytes),
                 c10::GetCPUAllocator(), true);
    storages_.emplace_back(host, card);
    return host;
  }

  Storage card_of(const Storage& host, DeviceIndex card) {
    for (auto& [known, original] : storages_)
      if (known.unsafeGetStorageImpl() == host.unsafeGetStorageImpl()) return original;
    Storage made(Storage::use_byte_size_t(), host.nbytes(), charged(host, card), &card_allocator,
                 true);
    storages_.emplace_back(host, made);
    return made;
  }

  bool writes_;
  c10::SmallVector<std::pair<Tensor, Tensor>, 4> tensors_;
  c10::SmallVector<std::pair<Storage, Storage>, 4> storages_;
};

}  // namespace
