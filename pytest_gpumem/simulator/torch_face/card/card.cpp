// Tensors that torch's own C++ takes for a card's, on a machine without one.
//
// Such a tensor is dense, on device cuda:N, and its bytes lie in the host's memory. An operation
// that torch has no CUDA kernel for, which without a CUDA build is every one, arrives at `on_card`:
// it runs the CPU's kernel on CPU tensors that share the arguments' memory, and what comes out
// becomes a tensor on the card. Sparse, quantized and nested tensors are made of such. Each storage
// on a card is charged to it by a call into Python (`take`), and given back by another (`release`)
// when C++ drops the storage.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>
#if __has_include(<torch/csrc/distributed/c10d/reducer_timer.hpp>)
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#define GPUMEM_HAS_TIMERS
#endif

#include <cstring>
#include <sstream>
#include <string>
#include <unordered_set>
#include <vector>

#include "kernels.h"
#include "operation.h"

namespace {

// Operations that are made of others on any device, and have nothing of their own to run.
const std::unordered_set<std::string> kMadeOfOthers = {
    "convolution", "zeros", "ones", "full", "rand", "randn", "randint", "empty_like", "rand_like", "randn_like",
    "randint_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones",
    "new_full", "new_empty_strided", "is_set_to", "detach", "detach_", "alias", "lift",
    "lift_fresh", "transpose_", "t_", "squeeze_", "unsqueeze_", "swapdims_", "swapaxes_",
    "as_strided_", "scalar_tensor", "is_same_size", "q_scale", "copy", "_to_copy", "is_pinned",
    "_pin_memory", "_efficientzerotensor", "_lazy_clone"};

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
  auto put = [&](const c10::OperatorName& name, DispatchKey key, c10::KernelFunction kernel) {
    kept->push_back(dispatcher.registerImpl(name, key, std::move(kernel), std::nullopt, nullptr,
                                            "the simulated card"));
  };
  using c10::KernelFunction;
  const std::pair<Kind, KernelFunction> ways[] = {
      {kDense, KernelFunction::makeFromBoxedFunction<&on_card<kDense.host>>()},
      {kSparse, KernelFunction::makeFromBoxedFunction<&on_card<kSparse.host>>()},
      {kCompressed, KernelFunction::makeFromBoxedFunction<&on_card<kCompressed.host>>()},
      {kQuantized, KernelFunction::makeFromBoxedFunction<&on_card<kQuantized.host>>()},
      {kNested, KernelFunction::makeFromBoxedFunction<&on_card<kNested.host>>()}};
  for (const auto& name : dispatcher.getAllOpNames()) {
    auto space = name.getNamespace();
    if (!space || (*space != "aten" && *space != "c10d")) continue;
    auto op = dispatcher.findOp(name);
    if (!op || !op->hasSchema()) continue;
    for (const auto& [kind, kernel] : ways)
      if (kind.has_storage() && is_wanted(*op) ||
          kind.host != kDense.host && op->hasKernelForDispatchKey(kind.host))
        put(name, kind.card, kernel);
  }
  for (const auto& [kind, kernel] : ways)
    kept->push_back(dispatcher.registerFallback(kind.card, kernel, "the simulated card"));
  for (const char* name : {"aten::_use_cudnn_ctc_loss", "aten::_use_miopen_ctc_loss"})
    for (const char* variant : {"", "Tensor"})
      if (dispatcher.findSchema({name, variant}))
        put({name, variant}, kDense.card, KernelFunction::makeFromBoxedFunction<&answer_no>());
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
  aten->impl("histc", &histc);
  aten->impl("_efficientzerotensor", &zero_tensor);
  aten->impl("set_", &set_to_nothing);
  aten->impl("_assert_async", &assert_async);
  aten->impl("_assert_async.msg", &assert_saying);
  aten->impl("record_stream", &record_stream);
  auto pinning = dispatcher.findSchemaOrThrow("aten::_pin_memory", "");
  if (!pinning.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd)) {
    aten->impl("_pin_memory", &pin_memory);
    aten->impl("is_pinned", &is_pinned);
  }
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose_attention);
}

void answer_for_cuda() {
  c10::impl::device_guard_impl_registry[static_cast<size_t>(kCard)].store(&guard);
  c10::SetAllocator(kCard, &card_allocator, 100);
  c10::SetCPUAllocator(new HostAllocator, 100);
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

Tensor bytes_of(Storage storage, DispatchKey key) {
  auto count = static_cast<int64_t>(storage.nbytes());
  auto made = c10::make_intrusive<c10::TensorImpl>(std::move(storage), DispatchKeySet(key),
                                                   caffe2::TypeMeta::Make<uint8_t>());
  made->set_sizes_contiguous(count);
  return Tensor{std::move(made)};
}

void resize_storage(Storage storage, int64_t size) {
  auto* cards = storage.unsafeGetStorageImpl();
  ResultOn there(cards->device().index());
  Storage host(Storage::use_byte_size_t(), size, c10::GetCPUAllocator(), false);
  std::memcpy(host.mutable_data(), cards->data(), std::min<size_t>(size, cards->nbytes()));
  cards->set_data_ptr_noswap(charged(std::move(host), cards->device().index()));
  cards->set_nbytes(size);
}

// The host's bytes of a storage on a card, as a tensor of the host.
Tensor host_bytes(Storage storage) {
  auto* cards = storage.unsafeGetStorageImpl();
  const void* bytes = cards->mutable_data();  // a lazy clone's own from now on
  std::lock_guard lock(held_mutex);
  return bytes_of(held.find(bytes)->second.host, DispatchKey::CPU);
}

// Lets `host` have the bytes of a storage on a card, which keeps its block.
void move_bytes(Storage storage, Storage host) {
  auto* cards = storage.unsafeGetStorageImpl();
  void* bytes = host.mutable_data();
  std::memcpy(bytes, cards->data(), cards->nbytes());
  std::unique_lock lock(held_mutex);
  auto moved = held.extract(cards->data());
  Storage before = std::exchange(moved.mapped().host, std::move(host));
  moved.key() = bytes;
  held.insert(std::move(moved));
  lock.unlock();
  auto old = cards->set_data_ptr({bytes, bytes, &let_go, cards->device()});
  old.release_context();
}

// The bytes of `host`, for which another process is charged, as a tensor on a card.
Tensor received(Storage host, int64_t card) {
  auto drop = [](void* owner) { delete static_cast<Storage*>(owner); };
  void* bytes = host.mutable_data();
  size_t size = host.nbytes();
  at::DataPtr there(bytes, new Storage(std::move(host)), drop, Device(kCard, DeviceIndex(card)));
  return bytes_of({Storage::use_byte_size_t(), size, std::move(there), &card_allocator, false},
                  DispatchKey::CUDA);
}

}  // namespace

TORCH_LIBRARY(gpumem_card, m) {
  m.def("resize_storage(Storage storage, int size) -> ()", &resize_storage);
  m.def("host_bytes(Storage storage) -> Tensor", &host_bytes);
  m.def("move_bytes(Storage storage, Storage host) -> ()", &move_bytes);
  m.def("received(Storage host, int card) -> Tensor", &received);
  m.def("default_generator(int card) -> Generator?", &default_generator);
  m.def("generator(int card) -> Generator?", [](int64_t card) { return new_generator(card); });
}

extern "C" {

// Puts so many cards into this process's torch. There is no way back. `answers` is asked what
// `Account` names, about products (operations of aten, their names with spaces between) too.
void gpumem_install(int cards, PyObject* answers, const char* products) {
  account.cards = DeviceIndex(cards);
  for (auto [method, name] : {std::pair{&account.take, "take"},
                              {&account.release, "release"},
                              {&account.foresee, "foresee"},
                              {&account.use, "use"},
                              {&account.multiply, "multiply"},
                              {&account.lose, "lose"},
                              {&account.judge, "judge"},
                              {&account.pin, "pin"},
                              {&account.unpin, "unpin"},
                              {&account.pinned, "pinned"},
                              {&account.out_of_memory, "out_of_memory"}})
    *method = PyObject_GetAttrString(answers, name);
  std::istringstream each(products);
  for (std::string name; each >> name;) account.products.insert("aten::" + name);
  account.thread = std::this_thread::get_id();
  account.open = true;
  for (DeviceIndex card = 0; card < cards; ++card) generators().push_back(new_generator(card));
  answer_for_cuda();
  lend_clocks();
  register_kernels();
}

// Says that CUDA is initialised, without which C++ takes no memory for pinned.
void gpumem_begin() {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 6
  at::globalContext().lazyInitDevice(kCard);
#else
  at::globalContext().lazyInitCUDA();
#endif
}

// Stops asking Python, which is about to end.
void gpumem_close() { account.open = false; }

int gpumem_current() { return current; }
void gpumem_choose(int card) { current = DeviceIndex(card); }
long long gpumem_stream(int card) { return streams[card]; }
void gpumem_choose_stream(int card, long long stream) { streams[card] = stream; }
}
