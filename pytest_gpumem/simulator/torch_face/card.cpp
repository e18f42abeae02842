// Tensors that torch's own C++ takes for a card's, on a machine without one.
//
// Such a tensor is dense, on device cuda:N, and its bytes lie in the host's memory. An operation
// that torch has no CUDA kernel for, which without a CUDA build is every one, arrives at `on_card`:
// it runs the CPU's kernel on CPU tensors that share the arguments' memory, and what comes out
// becomes a tensor on the card. Each storage on a card is charged to it by a call into Python
// (`take`), and given back by another (`release`) when C++ drops the storage.
//
// Of Python only functions of its stable interface are called. They are declared here, so that no
// headers of Python are needed.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_fused_sdp_choice_ops.h>
#include <ATen/ops/_log_softmax.h>
#include <ATen/ops/_log_softmax_backward_data.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/_softmax.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/zeros.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>
#if __has_include(<torch/csrc/distributed/c10d/reducer_timer.hpp>)
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#define GPUMEM_HAS_TIMERS
#endif
#include <torch/version.h>

#include <array>
#include <cstring>
#include <mutex>
#include <optional>
#include <regex>
#include <string>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

extern "C" {
typedef struct _object PyObject;
int Py_IsInitialized(void);
int PyGILState_Ensure(void);
void PyGILState_Release(int);
void Py_IncRef(PyObject*);
void Py_DecRef(PyObject*);
PyObject* PyObject_CallFunction(PyObject*, const char*, ...);
void PyErr_Fetch(PyObject**, PyObject**, PyObject**);
void PyErr_Restore(PyObject*, PyObject*, PyObject*);
int PyErr_CheckSignals(void);
int PyErr_ExceptionMatches(PyObject*);
int Py_AddPendingCall(int (*)(void*), void*);
extern PyObject* PyExc_RuntimeError;
int PyErr_GivenExceptionMatches(PyObject*, PyObject*);
void PyErr_WriteUnraisable(PyObject*);
PyObject* PyObject_Str(PyObject*);
PyObject* PyObject_GetAttrString(PyObject*, const char*);
long PyLong_AsLong(PyObject*);
void PyErr_Clear(void);
const char* PyUnicode_AsUTF8AndSize(PyObject*, ssize_t*);
void PyErr_NormalizeException(PyObject**, PyObject**, PyObject**);
}

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using c10::Storage;
using c10::StorageImpl;
using torch::jit::Stack;

constexpr auto kCard = c10::DeviceType::CUDA;

// ---------------------------------------------------------------- what Python keeps: the account

struct Account {
  DeviceIndex cards = 0;
  PyObject* take = nullptr;           // (card, size, address) -> block; raises when it does not fit
  PyObject* release = nullptr;        // (card, block)
  PyObject* out_of_memory = nullptr;  // torch.OutOfMemoryError
  bool open = false;
  std::thread::id thread;
} account;

thread_local DeviceIndex current = 0;

struct Gil {
  int state = PyGILState_Ensure();
  ~Gil() { PyGILState_Release(state); }
};

// What a signal's handler raises (Ctrl-C, a limit of time, sys.exit) while Python keeps the account
// is no error of the account: it is raised where Python goes on, as it was.
struct Raised {
  PyObject *type, *value, *trace;
  Raised() { PyErr_Fetch(&type, &value, &trace); }
};

int raise_now(void* held) {
  auto* raised = static_cast<Raised*>(held);
  PyErr_Restore(raised->type, raised->value, raised->trace);
  delete raised;
  return -1;
}

// Whether the error that is set is a signal's: handlers run in the thread that installed the cards,
// and what the account itself raises are torch's errors, which are RuntimeErrors.
bool is_a_signals() {
  return std::this_thread::get_id() == account.thread &&
         !PyErr_ExceptionMatches(PyExc_RuntimeError);
}

// Calls Python for the account; null: the error that the account raised is set.
template <class... Arguments>
PyObject* ask(PyObject* whom, const char* form, Arguments... arguments) {
  std::vector<Raised*> later;
  PyObject* answer = nullptr;
  for (int tries = 4; tries && !answer; --tries) {
    if (PyErr_CheckSignals()) later.push_back(new Raised);  // as a rule not in the midst of it
    answer = PyObject_CallFunction(whom, form, arguments...);
    if (answer || tries == 1 || !is_a_signals()) break;
    later.push_back(new Raised);
  }
  // Not before: Python would go on in what it is asked here.
  for (auto* each : later) Py_AddPendingCall(&raise_now, each);
  return answer;
}

PyObject* take_block(DeviceIndex card, size_t size, void* address) {
  return ask(account.take, "inn", int(card), ssize_t(size), reinterpret_cast<ssize_t>(address));
}

void give_block(DeviceIndex card, PyObject* block) {
  if (PyObject* done = ask(account.release, "iO", int(card), block)) Py_DecRef(done);
  else PyErr_WriteUnraisable(account.release);
}

// Throws the error that Python raised, as the C++ error that becomes it again.
[[noreturn]] void rethrow() {
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  PyErr_NormalizeException(&type, &value, &trace);
  std::string text = "unknown";
  if (PyObject* said = PyObject_Str(value)) {
    if (const char* words = PyUnicode_AsUTF8AndSize(said, nullptr)) text = words;
    Py_DecRef(said);
  }
  bool memory = PyErr_GivenExceptionMatches(value, account.out_of_memory);
  [[maybe_unused]] long code = 0;
  if (PyObject* number = PyObject_GetAttrString(value, "error_code")) {
    code = PyLong_AsLong(number);
    Py_DecRef(number);
  }
  PyErr_Clear();
  for (auto* each : {type, value, trace})
    if (each) Py_DecRef(each);
  c10::SourceLocation here{__func__, __FILE__, static_cast<uint32_t>(__LINE__)};
  if (memory) throw c10::OutOfMemoryError(here, text);
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 8
  if (code) throw c10::AcceleratorError(here, int32_t(code), text);
#endif
  throw c10::Error(here, text);
}

// What stands behind the bytes of a storage on a card.
struct Held {
  PyObject* block;
  DeviceIndex card;
  Storage host;  // owns the bytes
};

void let_go(void* context) {
  auto* held = static_cast<Held*>(context);
  if (account.open && Py_IsInitialized()) {
    Gil gil;
    PyObject *type, *value, *trace;  // an error may be on its way: it must arrive
    PyErr_Fetch(&type, &value, &trace);
    give_block(held->card, held->block);
    Py_DecRef(held->block);
    PyErr_Restore(type, value, trace);
  }
  delete held;
}

// Charges `host` to a card and returns its bytes as the card's.
at::DataPtr charged(Storage host, DeviceIndex card) {
  void* bytes = host.mutable_data();
  PyObject* block;
  {
    Gil gil;
    block = take_block(card, host.nbytes(), bytes);
    if (!block) rethrow();
  }
  auto* held = new Held{block, card, std::move(host)};
  return {bytes, held, &let_go, Device(kCard, card)};
}

struct CardAllocator : c10::Allocator {
  at::DataPtr allocate(size_t size) override {
    Storage host(Storage::use_byte_size_t(), size, c10::GetCPUAllocator(), false);
    return charged(std::move(host), current);
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }
} card_allocator;

// ---------------------------------------------------------------- what C++ asks about devices

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
    return c10::Stream(c10::Stream::DEFAULT, device.has_index() ? device : getDevice());
  }
  c10::Stream getDefaultStream(Device device) const override { return getStream(device); }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override {
    return getStream(device);
  }
  c10::Stream getNewStream(Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override {
    return getStream(stream.device());
  }
  DeviceIndex deviceCount() const noexcept override { return account.cards; }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
} guard;

// A generator of the host that says it is on a card.
struct CardGenerator : c10::GeneratorImpl {
  explicit CardGenerator(DeviceIndex card)
      : GeneratorImpl(Device(kCard, card), DispatchKeySet(DispatchKey::CUDA)),
        host(at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { host.set_offset(offset); }
  uint64_t get_offset() const override { return host.get_offset(); }
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
    return copy;
  }
  at::Generator host;
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

// Host memory that is pinned, as far as anyone asks.
struct PinnedAllocator : c10::Allocator {
  at::DataPtr allocate(size_t size) override {
    at::DataPtr inner = c10::GetCPUAllocator()->allocate(size);
    void* bytes = inner.get();
    {
      std::lock_guard<std::mutex> hold(mutex());
      addresses().insert(bytes);
    }
    return {bytes, new at::DataPtr(std::move(inner)), &unpin, Device(c10::DeviceType::CPU)};
  }
  static void unpin(void* context) {
    auto* inner = static_cast<at::DataPtr*>(context);
    {
      std::lock_guard<std::mutex> hold(mutex());
      addresses().erase(inner->get());
    }
    delete inner;
  }
  static bool knows(const void* bytes) {
    std::lock_guard<std::mutex> hold(mutex());
    return addresses().count(bytes);
  }
  static std::mutex& mutex() {
    static auto* it = new std::mutex;
    return *it;
  }
  static std::unordered_set<const void*>& addresses() {
    static auto* it = new std::unordered_set<const void*>;
    return *it;
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }
} pinned_allocator;

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
  Device getDeviceFromPtr(void*) const { return Device(kCard, current); }
  at::Allocator* getPinnedMemoryAllocator() const { return &pinned_allocator; }
  at::Allocator* getCUDADeviceAllocator() const { return &card_allocator; }
  bool isPinnedPtr(const void* bytes) const { return PinnedAllocator::knows(bytes); }
  void deviceSynchronize(DeviceIndex) const {}
};

// ---------------------------------------------------------------- the way there and back

[[noreturn]] void refuse_kind() {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, "a sparse, quantized or nested tensor on the simulated card: only strided ones are"
      " simulated");
}

void drop_storage(void* impl) {
  c10::raw::intrusive_ptr::decref(static_cast<StorageImpl*>(impl));
}

// The arguments of one call as CPU tensors on the same memory, and the way back.
class Aliases {
 public:
  Tensor to_host(const Tensor& card) {
    const auto& storage = card.storage();
    auto impl = c10::make_intrusive<c10::TensorImpl>(
        host_of(storage), DispatchKeySet(DispatchKey::CPU), card.dtype());
    impl->set_sizes_and_strides(card.sizes(), card.strides(), card.storage_offset());
    if (card.is_conj()) impl->_set_conj(true);
    if (card.is_neg()) impl->_set_neg(true);
    Tensor host{c10::intrusive_ptr<c10::TensorImpl>(std::move(impl))};
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
    if (result.layout() != c10::kStrided || result.is_quantized() || result.is_nested())
      refuse_kind();
    auto impl = c10::make_intrusive<c10::TensorImpl>(
        card_of(result.storage(), *card), DispatchKeySet(DispatchKey::CUDA), result.dtype());
    impl->set_sizes_and_strides(result.sizes(), result.strides(), result.storage_offset());
    if (result.is_conj()) impl->_set_conj(true);
    if (result.is_neg()) impl->_set_neg(true);
    return Tensor{c10::intrusive_ptr<c10::TensorImpl>(std::move(impl))};
  }

  // Gives originals the size and the memory that the kernel gave their stand-ins.
  void adopt_changes() {
    for (auto& [host, original] : tensors_) {
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
  Storage host_of(const Storage& card) {
    for (auto& [host, original] : storages_)
      if (original.unsafeGetStorageImpl() == card.unsafeGetStorageImpl()) return host;
    // It keeps the card's alive: what the kernel started may outlast this call.
    auto* impl = card.unsafeGetStorageImpl();
    c10::raw::intrusive_ptr::incref(impl);
    at::DataPtr bytes(impl->mutable_data(), impl, &drop_storage, c10::kCPU);
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

  c10::SmallVector<std::pair<Tensor, Tensor>, 4> tensors_;
  c10::SmallVector<std::pair<Storage, Storage>, 4> storages_;
};

// ---------------------------------------------------------------- one operation

// What is known of an operation from its schema.
struct Plan {
  bool as_it_is = false;  // changes nothing but what a tensor says of its memory
  bool mixes = false;     // takes tensors from several devices
  bool indexes = false;
  bool writes = false;
  int generator = -1;     // places among the arguments
  int pinned = -1;
  bool draws = false;     // at random, without a generator among its arguments
  bool packs = false;     // its second result stays on the host
};

const std::unordered_set<std::string> kMixing = {
    "aten::copy_", "aten::_foreach_copy_", "aten::_copy_from", "aten::_copy_from_and_resize",
    "aten::_to_copy", "aten::resize_as_", "aten::is_same_size", "aten::tensor_split",
    "aten::is_set_to", "aten::ctc_loss", "aten::_ctc_loss", "aten::_ctc_loss_backward",
    "aten::_pack_padded_sequence", "aten::_pack_padded_sequence_backward"};
const std::unordered_set<std::string> kIndexing = {
    "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_",
    "aten::_unsafe_index"};
const std::unordered_set<std::string> kSetting = {"aten::set_"};

Plan plan_of(const c10::OperatorHandle& op) {
  const auto& schema = op.schema();
  Plan plan;
  plan.as_it_is = kSetting.count(schema.name());
  for (const auto& result : schema.returns())
    if (result.alias_info() && !result.alias_info()->isWrite()) plan.as_it_is = true;
  plan.indexes = kIndexing.count(schema.name());
  plan.mixes = plan.indexes || kMixing.count(schema.name()) ||
               schema.name().rfind("c10d::", 0) == 0;
  plan.packs = schema.name() == "aten::_pack_padded_sequence";
  for (size_t place = 0; place < schema.arguments().size(); ++place) {
    const auto& argument = schema.arguments()[place];
    if (argument.alias_info() && argument.alias_info()->isWrite()) plan.writes = true;
    if (argument.name() == "pin_memory") plan.pinned = int(place);
    if (argument.type()->str().find("Generator") != std::string::npos)
      plan.generator = int(place);
  }
  plan.draws = plan.generator < 0 && op.hasTag(at::Tag::nondeterministic_seeded);
  return plan;
}

const Plan& known_plan(const c10::OperatorHandle& op) {
  thread_local std::unordered_map<const void*, std::pair<c10::OperatorName, Plan>> plans;
  auto found = plans.find(&op.schema());
  // Another operation may have come to lie there, in programs that define and drop their own.
  if (found == plans.end() || !(found->second.first == op.operator_name()))
    found = plans.insert_or_assign(&op.schema(), std::make_pair(op.operator_name(), plan_of(op)))
                .first;
  return found->second.second;
}

// Where the tensors of one call are, and what torch says where they are not together.
struct Places {
  const Plan& plan;
  std::optional<Device> first{}, card{}, other{};

  void see(const Tensor& tensor, bool written) {
    Device place = tensor.device();
    if (!first) first = place;
    if (place.type() == kCard) {
      if (!card) card = place;
      else if (*card != place) other = other ? other : std::optional<Device>(place);
    } else if (place.type() != c10::DeviceType::Meta && (tensor.dim() || written)) {
      other = other ? other : std::optional<Device>(place);
    }
  }

  void check() const {
    if (!other || !card) return;
    if (plan.indexes) {
      TORCH_CHECK(other->type() != kCard && first->type() == kCard,
                  "indices should be either on cpu or on the same device as the indexed tensor (",
                  first->str(), ")");
    }
    TORCH_CHECK(plan.mixes,
                "Expected all tensors to be on the same device, but found at least two devices, ",
                *first == *card ? card->str() : other->str(), " and ",
                *first == *card ? other->str() : card->str(), "!");
  }
};

// Lets operations that ask for no generator draw from a card's.
struct Drawing {
  explicit Drawing(DeviceIndex card)
      : card_(static_cast<CardGenerator*>(generators().at(card).unsafeGetGeneratorImpl())->host) {
    swap();
  }
  ~Drawing() { swap(); }
  void swap() {
    auto* hosts = at::detail::getDefaultCPUGenerator().unsafeGetGeneratorImpl();
    auto* cards = card_.unsafeGetGeneratorImpl();
    auto before = hosts->get_state();
    hosts->set_state(*cards->get_state());
    cards->set_state(*before);
  }
  at::Generator card_;
};

at::Generator host_generator(const at::Generator& chosen) {
  TORCH_CHECK(chosen.device().type() == kCard,
              "Expected a 'cuda' device type for generator but found '",
              c10::DeviceTypeName(chosen.device().type(), true), "'");
  auto* ours = dynamic_cast<CardGenerator*>(chosen.unsafeGetGeneratorImpl());
  TORCH_CHECK(ours, "a generator of CUDA's own on the simulated card");
  return ours->host;
}

// The host was full before the card was asked, which has less room as a rule: ask it now.
void ask_card_instead(const c10::Error& error, DeviceIndex card) {
  static const auto* told =
      new std::regex("can't allocate memory: you tried to allocate (\\d+) bytes");
  std::cmatch found;
  if (!std::regex_search(error.what_without_backtrace(), found, *told)) return;
  Gil gil;
  PyObject* block = take_block(card, std::stoull(found[1].str()), nullptr);
  if (!block) rethrow();
  give_block(card, block);
  Py_DecRef(block);
}

// `value` with what `change` makes of each tensor in it.
template <class Change>
IValue each_tensor(const IValue& value, const Change& change) {
  if (value.isTensor()) return change(value.toTensor());
  if (!value.isList()) return value;
  auto list = value.toList();
  auto kind = list.elementType();
  if (kind->kind() == c10::TypeKind::IntType || kind->kind() == c10::TypeKind::SymIntType ||
      kind->kind() == c10::TypeKind::FloatType)
    return value;
  c10::impl::GenericList changed(kind);
  changed.reserve(list.size());
  for (const IValue& each : value.toListRef()) changed.push_back(each_tensor(each, change));
  return changed;
}

void on_card(const c10::OperatorHandle& op, Stack* stack) {
  const Plan& plan = known_plan(op);
  if (plan.as_it_is) {
    op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
    return;
  }
  const auto& formals = op.schema().arguments();
  size_t count = formals.size(), begin = stack->size() - count;
  Aliases aliases;
  Places places{plan};
  std::optional<Device> asked;

  auto to_host = [&](const Tensor& tensor, bool written) -> Tensor {
    if (!tensor.defined()) return tensor;
    places.see(tensor, written);
    return tensor.device().type() == kCard ? aliases.to_host(tensor) : tensor;
  };

  for (size_t place = 0; place < count; ++place) {
    IValue& value = (*stack)[begin + place];
    const auto* alias = formals[place].alias_info();
    bool written = alias && alias->isWrite();
    if (value.isTensor() || value.isList()) {
      value = each_tensor(value, [&](const Tensor& tensor) { return to_host(tensor, written); });
    } else if (value.isDevice()) {
      asked = value.toDevice();
      value = Device(c10::DeviceType::CPU);
    }
  }
  places.check();
  // Where new results go: beside the tensors, or where asked for.
  std::optional<DeviceIndex> card;
  if (asked && asked->type() != kCard) card = std::nullopt;
  else if (plan.mixes && places.first)
    card = places.first->type() == kCard ? std::optional<DeviceIndex>(places.first->index())
                                         : std::nullopt;
  else if (places.card) card = places.card->index();
  else card = asked && asked->has_index() ? asked->index() : current;
  DeviceIndex drawing_card = card.value_or(current);

  if (plan.pinned >= 0) (*stack)[begin + plan.pinned] = IValue();
  bool has_generators = size_t(drawing_card) < generators().size();
  if (plan.generator >= 0) {
    IValue& chosen = (*stack)[begin + plan.generator];
    if (chosen.isGenerator()) chosen = host_generator(chosen.toGenerator());
    else if (has_generators) chosen = host_generator(generators()[drawing_card]);
  }
  try {
    std::optional<Drawing> drawing;
    if (plan.draws && has_generators) drawing.emplace(drawing_card);
    op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  } catch (const c10::Error& error) {
    ask_card_instead(error, drawing_card);
    throw;
  }
  if (plan.writes) aliases.adopt_changes();

  size_t results = op.schema().returns().size(), from = stack->size() - results;
  for (size_t place = 0; place < (plan.packs ? 1 : results); ++place) {
    IValue& value = (*stack)[from + place];
    value = each_tensor(value, [&](const Tensor& t) { return aliases.to_card(t, card); });
  }
}

void refuse(const c10::OperatorHandle&, Stack*) { refuse_kind(); }

// ---------------------------------------------------------------- what only CUDA has a kernel for

using Optional = std::optional<Tensor>;

// The arguments of a kernel below on the host, and its results on their card.
struct Call {
  explicit Call(const Tensor& first) : card(first.device().index()) {}
  Tensor in(const Tensor& tensor) {
    return tensor.defined() && tensor.is_cuda() ? aliases.to_host(tensor) : tensor;
  }
  Optional in(const Optional& tensor) {
    return tensor ? Optional(in(*tensor)) : std::nullopt;
  }
  Tensor out(const Tensor& tensor) { return aliases.to_card(tensor, card); }
  Aliases aliases;
  DeviceIndex card;
};

std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& input, const Tensor& hidden,
                                             const Tensor& cx, const Optional& input_bias,
                                             const Optional& hidden_bias) {
  Call call(input);
  Tensor gates = call.in(input) + call.in(hidden);
  for (const auto* bias : {&input_bias, &hidden_bias})
    if (*bias && (*bias)->defined()) gates = gates + call.in(**bias);
  auto part = gates.chunk(4, 1);
  Tensor i = part[0].sigmoid(), f = part[1].sigmoid(), c = part[2].tanh(), o = part[3].sigmoid();
  Tensor cy = f * call.in(cx) + i * c;
  return {call.out(o * cy.tanh()), call.out(cy), call.out(at::cat({i, f, c, o}, 1))};
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_backward(const Optional& grad_hy,
                                                      const Optional& grad_cy, const Tensor& cx_,
                                                      const Tensor& cy_, const Tensor& workspace,
                                                      bool has_bias) {
  Call call(cx_);
  Tensor cx = call.in(cx_), t = call.in(cy_).tanh();
  auto part = call.in(workspace).chunk(4, 1);
  Tensor i = part[0], f = part[1], c = part[2], o = part[3];
  Tensor dh = grad_hy && grad_hy->defined() ? call.in(*grad_hy) : at::zeros(t.sizes(), t.options());
  Tensor dc = dh * o * (1 - t * t);
  if (grad_cy && grad_cy->defined()) dc = dc + call.in(*grad_cy);
  Tensor g = at::cat({dc * c * i * (1 - i), dc * cx * f * (1 - f), dc * i * (1 - c * c),
                      dh * t * o * (1 - o)}, 1);
  return {call.out(g), call.out(dc * f), has_bias ? call.out(g.sum(0)) : Tensor()};
}

std::tuple<Tensor, Tensor> gru_cell(const Tensor& input, const Tensor& hidden, const Tensor& hx_,
                                    const Optional& input_bias, const Optional& hidden_bias) {
  Call call(input);
  Tensor igates = call.in(input), hgates = call.in(hidden), hx = call.in(hx_);
  if (input_bias && input_bias->defined()) igates = igates + call.in(*input_bias);
  if (hidden_bias && hidden_bias->defined()) hgates = hgates + call.in(*hidden_bias);
  auto ig = igates.chunk(3, 1), hg = hgates.chunk(3, 1);
  Tensor r = (ig[0] + hg[0]).sigmoid(), z = (ig[1] + hg[1]).sigmoid();
  Tensor n = (ig[2] + r * hg[2]).tanh();
  return {call.out(n + z * (hx - n)), call.out(at::cat({r, z, n, hx, hg[2]}, 1))};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(const Tensor& grad,
                                                                     const Tensor& workspace,
                                                                     bool has_bias) {
  Call call(grad);
  Tensor gh = call.in(grad);
  auto part = call.in(workspace).chunk(5, 1);
  Tensor r = part[0], z = part[1], n = part[2], hx = part[3], hn = part[4];
  Tensor dn = gh * (1 - z) * (1 - n * n), dz = gh * (hx - n) * z * (1 - z);
  Tensor dr = dn * hn * r * (1 - r);
  Tensor gi = at::cat({dr, dz, dn}, 1), ghh = at::cat({dr, dz, dn * r}, 1);
  return {call.out(gi), call.out(ghh), call.out(gh * z),
          has_bias ? call.out(gi.sum(0)) : Tensor(), has_bias ? call.out(ghh.sum(0)) : Tensor()};
}

// Attention as CUDA's memory-efficient kernel does it: no matrix of all pairs is held.
std::tuple<Tensor, Tensor, Tensor, Tensor> attention(const Tensor& q, const Tensor& k,
                                                     const Tensor& v, const Optional& bias, bool,
                                                     double dropout, bool causal,
                                                     std::optional<double> scale) {
  Call call(q);
  auto [out, sums] = at::_scaled_dot_product_flash_attention_for_cpu(
      call.in(q), call.in(k), call.in(v), dropout, causal, call.in(bias), scale);
  auto seed = [&] { return call.out(at::zeros({}, at::TensorOptions(at::kLong))); };
  return {call.out(out), call.out(sums), seed(), seed()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
    const Tensor& out, const Tensor& sums, const Tensor&, const Tensor&, double dropout,
    std::array<bool, 4>, bool causal, std::optional<double> scale) {
  Call call(q);
  auto [gq, gk, gv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      call.in(grad), call.in(q), call.in(k), call.in(v), call.in(out), call.in(sums), dropout,
      causal, bias.defined() ? Optional(call.in(bias)) : std::nullopt, scale);
  return {call.out(gq), call.out(gk), call.out(gv), Tensor()};
}

// The choice that torch's C++ makes for CUDA, by what the CPU's flash attention can do.
int64_t choose_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& mask,
                         double dropout, bool causal, std::optional<double> scale
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 5
                         , bool grouped
#endif
) {
  constexpr int64_t kMath = 0, kFlash = 1, kEfficient = 2;
  if (dropout > 0 || (mask && mask->defined() && mask->requires_grad())) return kMath;
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 5
  if (grouped) return kMath;
  constexpr bool plain = false;
#define GPUMEM_GROUPED , plain
#else
#define GPUMEM_GROUPED
#endif
  at::AutoDispatchBelowAutograd below;
  Call call(q);
  int64_t choice = at::_ops::_fused_sdp_choice::call(call.in(q), call.in(k), call.in(v),
                                                     call.in(mask), dropout, causal,
                                                     scale GPUMEM_GROUPED);
  return choice == kFlash ? kEfficient : kMath;
}

// Half in, float out: autocast asks CUDA for it, and the CPU does not know it.
template <Tensor (*run)(const Tensor&, int64_t, bool)>
Tensor softmax(const Tensor& input, int64_t dim, bool to_float) {
  Call call(input);
  Tensor host = call.in(input);
  return call.out(run(to_float ? host.to(at::kFloat) : host, dim, false));
}

template <Tensor (*run)(const Tensor&, const Tensor&, int64_t, at::ScalarType)>
Tensor softmax_backward(const Tensor& grad, const Tensor& output, int64_t dim,
                        at::ScalarType dtype) {
  Call call(grad);
  Tensor host = call.in(grad);
  return call.out(run(host, call.in(output), dim, host.scalar_type()).to(dtype));
}

Tensor zero_tensor(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
                   std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  return at::zeros({}, at::TensorOptions().dtype(dtype).device(device)).expand(size);
}

Tensor& set_to_nothing(Tensor& tensor) {
  tensor.set_(at::empty({0}, tensor.options()).storage(), 0, {0}, {1});
  return tensor;
}

// Whether another library is used for it: there is none.
void answer_no(const c10::OperatorHandle& op, Stack* stack) {
  torch::jit::drop(*stack, op.schema().arguments().size());
  stack->emplace_back(false);
}

// ---------------------------------------------------------------- installing

// Operations that are made of others on any device, and have nothing of their own to run.
const std::unordered_set<std::string> kMadeOfOthers = {
    "zeros", "ones", "full", "rand", "randn", "randint", "empty_like", "rand_like", "randn_like",
    "randint_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones",
    "new_full", "new_empty_strided", "is_set_to", "detach", "detach_", "alias", "lift",
    "lift_fresh", "transpose_", "t_", "squeeze_", "unsqueeze_", "swapdims_", "swapaxes_",
    "as_strided_", "scalar_tensor", "is_same_size", "q_scale", "copy", "_to_copy", "is_pinned",
    "_pin_memory", "_efficientzerotensor"};

bool is_wanted(const c10::OperatorHandle& op) {
  const auto& name = op.operator_name();
  bool native = op.hasKernelForDispatchKey(DispatchKey::CUDA);
  if (native) return true;
  if (name.getNamespace() == std::optional<c10::string_view>("c10d")) return false;
  auto explicitly = [&](DispatchKey key) { return op.hasKernelForDispatchKey(key); };
  if (!explicitly(DispatchKey::CompositeExplicitAutograd) &&
      !explicitly(DispatchKey::CompositeExplicitAutogradNonFunctional))
    return false;
  std::string base = name.name.substr(name.name.find("::") + 2);
  if (kMadeOfOthers.count(base)) return false;
  bool copies = base.size() > 5 && base.compare(base.size() - 5, 5, "_copy") == 0;
  if (copies) return false;
  for (const auto& result : op.schema().returns())
    if (result.alias_info() && !result.alias_info()->isWrite()) return false;
  return true;
}

// Says nothing of kernels that take the place of others.
struct Quiet : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

void register_kernels() {
  Quiet quiet;
  c10::WarningUtils::WarningHandlerGuard silence(&quiet);
  auto& dispatcher = c10::Dispatcher::singleton();
  static auto* kept = new std::vector<c10::RegistrationHandleRAII>;
  for (const auto& name : dispatcher.getAllOpNames()) {
    auto space = name.getNamespace();
    if (!space || (*space != "aten" && *space != "c10d")) continue;
    auto op = dispatcher.findOp(name);
    if (op && op->hasSchema() && is_wanted(*op))
      kept->push_back(dispatcher.registerImpl(
          name, DispatchKey::CUDA, c10::KernelFunction::makeFromBoxedFunction<&on_card>(),
          std::nullopt, nullptr, "the simulated card"));
  }
  kept->push_back(dispatcher.registerFallback(
      DispatchKey::CUDA, c10::KernelFunction::makeFromBoxedFunction<&on_card>(),
      "the simulated card"));
  for (const char* name : {"aten::_use_cudnn_ctc_loss", "aten::_use_miopen_ctc_loss"})
    for (const char* variant : {"", "Tensor"})
      if (dispatcher.findSchema({name, variant}))
        kept->push_back(dispatcher.registerImpl(
            {name, variant}, DispatchKey::CUDA,
            c10::KernelFunction::makeFromBoxedFunction<&answer_no>(), std::nullopt, nullptr,
            "the simulated card"));
  for (auto key : {DispatchKey::SparseCUDA, DispatchKey::SparseCsrCUDA, DispatchKey::QuantizedCUDA,
                   DispatchKey::NestedTensorCUDA})
    kept->push_back(dispatcher.registerFallback(
        key, c10::KernelFunction::makeFromBoxedFunction<&refuse>(), "the simulated card"));
  static auto* aten = new torch::Library(torch::Library::IMPL, "aten",
                                         std::make_optional(DispatchKey::CUDA), __FILE__, __LINE__);
  aten->impl("_thnn_fused_lstm_cell", &lstm_cell);
  aten->impl("_thnn_fused_lstm_cell_backward_impl", &lstm_cell_backward);
  aten->impl("_thnn_fused_gru_cell", &gru_cell);
  aten->impl("_thnn_fused_gru_cell_backward", &gru_cell_backward);
  aten->impl("_scaled_dot_product_efficient_attention", &attention);
  aten->impl("_scaled_dot_product_efficient_attention_backward", &attention_backward);
  aten->impl("_softmax", &softmax<&at::_softmax>);
  aten->impl("_log_softmax", &softmax<&at::_log_softmax>);
  aten->impl("_softmax_backward_data", &softmax_backward<&at::_softmax_backward_data>);
  aten->impl("_log_softmax_backward_data", &softmax_backward<&at::_log_softmax_backward_data>);
  aten->impl("_efficientzerotensor", &zero_tensor);
  aten->impl("set_", &set_to_nothing);
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose_attention);
}

void answer_for_cuda() {
  c10::impl::device_guard_impl_registry[static_cast<size_t>(kCard)].store(&guard);
  c10::SetAllocator(kCard, &card_allocator, 100);
  // C++ may have asked for the hooks already and keeps them: what is there gets ours' functions.
  static auto* hooks = new CardHooks;
  auto& theirs = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  *reinterpret_cast<void**>(&theirs) = *reinterpret_cast<void**>(hooks);
}

// DistributedDataParallel measures itself by a clock of the device.
void lend_clocks() {
#ifdef GPUMEM_HAS_TIMERS
  auto of_the_host = [](Device) {
    return c10d::TimerRegistry()->Create(c10::kCPU, Device(c10::kCPU));
  };
  c10d::TimerRegistry()->Register(kCard, of_the_host, c10::REGISTRY_PREFERRED);
#endif
}

void resize_storage(Storage storage, int64_t size) {
  auto* cards = storage.unsafeGetStorageImpl();
  Storage host(Storage::use_byte_size_t(), size, c10::GetCPUAllocator(), false);
  std::memcpy(host.mutable_data(), cards->data(), std::min<size_t>(size, cards->nbytes()));
  cards->set_data_ptr_noswap(charged(std::move(host), cards->device().index()));
  cards->set_nbytes(size);
}

}  // namespace

TORCH_LIBRARY(gpumem_card, m) {
  m.def("resize_storage(Storage storage, int size) -> ()", &resize_storage);
  m.def("default_generator(int card) -> Generator?", &default_generator);
  m.def("generator(int card) -> Generator?", [](int64_t card) { return new_generator(card); });
}

extern "C" {

// Puts so many cards into this process's torch. There is no way back.
void gpumem_install(int cards, PyObject* take, PyObject* release, PyObject* out_of_memory) {
  for (auto* each : {take, release, out_of_memory}) Py_IncRef(each);
  account = {DeviceIndex(cards), take, release, out_of_memory, true, std::this_thread::get_id()};
  for (DeviceIndex card = 0; card < cards; ++card) generators().push_back(new_generator(card));
  answer_for_cuda();
  lend_clocks();
  register_kernels();
}

// Stops asking Python, which is about to end.
void gpumem_close() { account.open = false; }

int gpumem_current() { return current; }
void gpumem_choose(int card) { current = DeviceIndex(card); }
}
