// The account of the card, which Python keeps: calls into it, and memory that is charged to it.
//
// Of Python only functions of its stable interface are called. They are declared here, so that no
// headers of Python are needed.

#pragma once

#include <ATen/Tensor.h>
#include <c10/core/CPUAllocator.h>
#include <torch/version.h>

#include <array>
#include <atomic>
#include <mutex>
#include <string>
#include <thread>
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
int PyObject_IsTrue(PyObject*);
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

// What is asked of Python: methods of `Answers` in compiled.py.
struct Account {
  DeviceIndex cards = 0;
  PyObject* take = nullptr;      // (card, size, address, stream) -> block; raises: does not fit
  PyObject* release = nullptr;   // (card, block, address)
  PyObject* foresee = nullptr;   // (card, size): raises what a `take` surely would
  PyObject* use = nullptr;       // (address, stream)
  PyObject* multiply = nullptr;  // (card): a product is about to begin
  PyObject* lose = nullptr;      // (): the context is lost
  PyObject* judge = nullptr;     // (text of an error) -> whether it is the context that is lost
  PyObject* pin = nullptr;       // (address, size)
  PyObject* unpin = nullptr;     // (address)
  PyObject* pinned = nullptr;    // (address) -> whether it is
  PyObject* out_of_memory = nullptr;  // torch.OutOfMemoryError
  std::unordered_set<std::string> products{};  // the operations that `multiply` is told of
  bool open = false;
  std::thread::id thread{};
} account;

std::atomic<bool> lost = false;

thread_local DeviceIndex current = 0;
thread_local std::array<c10::StreamId, 128> streams{};  // the current one of each card

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

// Has Python do what is asked, and throws what it raises. Returns whether the answer is true.
template <class... Arguments>
bool tell(PyObject* whom, const char* form, Arguments... arguments) {
  Gil gil;
  PyObject* answer = ask(whom, form, arguments...);
  if (!answer) rethrow();
  bool yes = PyObject_IsTrue(answer) > 0;
  Py_DecRef(answer);
  return yes;
}

// Tells Python, as long as there is one, what is no longer needed.
template <class... Arguments>
void give_back(PyObject* whom, const char* form, Arguments... arguments) {
  if (!account.open || !Py_IsInitialized()) return;
  Gil gil;
  PyObject *type, *value, *trace;  // an error may be on its way: it must arrive
  PyErr_Fetch(&type, &value, &trace);
  PyObject* done = ask(whom, form, arguments...);
  if (done) Py_DecRef(done);
  else PyErr_WriteUnraisable(whom);
  PyErr_Restore(type, value, trace);
}

ssize_t number(const void* address) { return reinterpret_cast<ssize_t>(address); }

// Throws what CUDA says to each call after the one by which the context was lost.
void check() {
  if (lost) tell(account.foresee, "in", int(current), ssize_t(0));
}

// What stands behind the bytes of a storage on a card.
struct Held {
  PyObject* block;
  DeviceIndex card;
  Storage host;  // owns the bytes
};

// By where the bytes are: torch's lazy clones share only what has no other context than that.
auto& held = *new std::unordered_multimap<const void*, Held>;  // outlives all storages
std::mutex held_mutex;  // never taken while Python is asked

void let_go(void* bytes) {
  std::unique_lock lock(held_mutex);
  auto gone = held.extract(bytes);
  lock.unlock();
  auto& [block, card, host] = gone.mapped();
  give_back(account.release, "iOn", int(card), block, number(bytes));
  if (account.open && Py_IsInitialized()) {
    Gil gil;
    Py_DecRef(block);
  }
}

// Charges `host` to a card and returns its bytes as the card's.
at::DataPtr charged(Storage host, DeviceIndex card) {
  void* bytes = host.mutable_data();
  PyObject* block;
  {
    Gil gil;
    block = ask(account.take, "innL", int(card), ssize_t(host.nbytes()), number(bytes),
                static_cast<long long>(streams[card]));
    if (!block) rethrow();
    if (!bytes) Py_DecRef(block);  // None
  }
  if (bytes) {
    std::lock_guard lock(held_mutex);
    held.emplace(bytes, Held{block, card, std::move(host)});
  }
  return {bytes, bytes, &let_go, Device(kCard, card)};
}

// On which card the result of what this thread runs will lie; -1: none, or it was asked already.
thread_local DeviceIndex result_card = -1;

struct ResultOn {
  explicit ResultOn(DeviceIndex card) : before(std::exchange(result_card, card)) {}
  ~ResultOn() { result_card = before; }
  DeviceIndex before;
};

// The host's memory. What a CPU's kernel asks for first is, as a rule, its result's: where the card
// has no room for that, it is refused before the work, and before the host has to hold it.
struct HostAllocator : c10::Allocator {
  static constexpr size_t kWorthAsking = 1 << 20;
  at::DataPtr allocate(size_t size) override {
    if (result_card >= 0 && size >= kWorthAsking)
      tell(account.foresee, "in", int(std::exchange(result_card, -1)), ssize_t(size));
    return base->allocate(size);
  }
  c10::DeleterFnPtr raw_deleter() const override { return base->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t count) const override {
    base->copy_data(to, from, count);
  }
  c10::Allocator* base = c10::GetCPUAllocator();
};

struct CardAllocator : c10::Allocator {
  at::DataPtr allocate(size_t size) override {
    ResultOn here(current);
    Storage host(Storage::use_byte_size_t(), size, c10::GetCPUAllocator(), false);
    return charged(std::move(host), current);
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }
} card_allocator;

}  // namespace
