// What torch's C++ asks about devices: the current card and stream, generators, pinned memory.

#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <utility>
#include <vector>

#include "account.h"

namespace {

struct CardGuard : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kCard; }
  Device exchangeDevice(Device to) const override {
    Device before(kCard, current);
    uncheckedSetDevice(to);
    return before;
  }
  Device getDevice() const override { return Device(kCard, current); }
  void setDevice(Device to) const override { uncheckedSetDevice(to); }
  void uncheckedSetDevice(Device to) const noexcept override {
    if (to.has_index()) current = to.index();
  }
  c10::Stream getStream(Device device) const noexcept override {
    DeviceIndex card = device.has_index() ? device.index() : current;
    return c10::Stream(c10::Stream::UNSAFE, Device(kCard, card), streams[card]);
  }
  c10::Stream getDefaultStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device.has_index() ? device : getDevice());
  }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override {
    return getStream(device);
  }
  c10::Stream getNewStream(Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override {
    c10::Stream before = getStream(stream.device());
    streams[stream.device_index()] = stream.id();
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return account.cards; }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void recordDataPtrOnStream(const c10::DataPtr& bytes, const c10::Stream& stream) const override {
    tell(account.use, "nL", number(bytes.get()), static_cast<long long>(stream.id()));
  }
} guard;

// A generator of the host that says it is on a card.
struct CardGenerator : c10::GeneratorImpl {
  explicit CardGenerator(DeviceIndex card)
      : GeneratorImpl(Device(kCard, card), DispatchKeySet(DispatchKey::CUDA)),
        host(at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t chosen) override { offset = chosen; }
  uint64_t get_offset() const override { return offset; }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    host.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
  CardGenerator* clone_impl() const override {
    auto* copy = new CardGenerator(device_.index());
    copy->host = host.clone();
    copy->offset = offset;
    return copy;
  }
  at::Generator host;
  uint64_t offset = 0;  // kept for who asks: the host's generator counts none
};

std::vector<at::Generator>& generators() {
  static auto* each = new std::vector<at::Generator>;
  return *each;
}

at::Generator new_generator(DeviceIndex card) {
  return at::Generator(c10::make_intrusive<CardGenerator>(card < 0 ? current : card));
}

at::Generator default_generator(int64_t card) {
  TORCH_CHECK(card < int64_t(generators().size()), "invalid device ordinal");
  return generators()[card < 0 ? current : card];
}

// Host memory that is pinned, of which Python keeps an account as well.
struct PinnedAllocator : c10::Allocator {
  at::DataPtr allocate(size_t size) override {
    at::DataPtr inner = c10::GetCPUAllocator()->allocate(size);
    void* bytes = inner.get();
    tell(account.pin, "nn", number(bytes), ssize_t(size));
    return {bytes, new at::DataPtr(std::move(inner)), &unpin, Device(c10::DeviceType::CPU)};
  }
  static void unpin(void* context) {
    auto* inner = static_cast<at::DataPtr*>(context);
    give_back(account.unpin, "(n)", number(inner->get()));
    delete inner;
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }
} pinned_allocator;

std::atomic<int64_t> kept_plans = 4096;  // of cuFFT at most, as CUDA begins; there are never any

// Without `override`: which of these there are differs among versions of torch.
struct CardHooks : at::CUDAHooksInterface {
  void init() const {}
  void initCUDA() const {}
  bool isBuilt() const { return true; }
  bool isAvailable() const { return true; }
  bool hasCUDA() const { return true; }
  bool hasPrimaryContext(DeviceIndex) const { return true; }
  DeviceIndex deviceCount() const { return account.cards; }
  int getNumGPUs() const { return account.cards; }
  DeviceIndex current_device() const { return current; }
  DeviceIndex getCurrentDevice() const { return current; }
  void setCurrentDevice(DeviceIndex card) const { current = card; }
  DeviceIndex exchangeDevice(DeviceIndex card) const { return std::exchange(current, card); }
  DeviceIndex maybeExchangeDevice(DeviceIndex card) const {
    return card < 0 ? current : std::exchange(current, card);
  }
  const at::Generator& getDefaultGenerator(DeviceIndex card = -1) const {
    return generators().at(card < 0 ? current : card);
  }
  at::Generator getNewGenerator(DeviceIndex card = -1) const { return new_generator(card); }
  Device getDeviceFromPtr(void*) const {
    // The host would read what its tensor is of, where it has nothing.
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, "the simulated card makes no tensor of an address (__cuda_array_interface__)");
  }
  at::Allocator* getPinnedMemoryAllocator() const { return &pinned_allocator; }
  at::Allocator* getCUDADeviceAllocator() const { return &card_allocator; }
  bool isPinnedPtr(const void* bytes) const { return tell(account.pinned, "(n)", number(bytes)); }
  void deviceSynchronize(DeviceIndex) const {}
  std::string showConfig() const { return "  - a simulated card\n"; }
  int64_t cuFFTGetPlanCacheMaxSize(DeviceIndex) const { return kept_plans; }
  void cuFFTSetPlanCacheMaxSize(DeviceIndex, int64_t most) const { kept_plans = most; }
  int64_t cuFFTGetPlanCacheSize(DeviceIndex) const { return 0; }
  void cuFFTClearPlanCache(DeviceIndex) const {}
};

}  // namespace
