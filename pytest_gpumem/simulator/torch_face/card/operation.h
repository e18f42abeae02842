// One operation on a card.

#pragma once

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>

#include "aliases.h"
#include "devices.h"

namespace {

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
  bool multiplies = false;  // matrices
  bool chooses = false;     // by indices, which may lie outside
  const char* unordered = nullptr;  // the kernel of CUDA's that adds in no fixed order
};

const std::unordered_set<std::string> kMixing = {
    "aten::copy_", "aten::fill_", "aten::_foreach_copy_", "aten::_copy_from",
    "aten::_copy_from_and_resize",
    "aten::_to_copy", "aten::copy_sparse_to_sparse_", "aten::resize_as_", "aten::is_same_size",
    "aten::tensor_split",
    "aten::is_set_to", "aten::ctc_loss", "aten::_ctc_loss", "aten::_ctc_loss_backward",
    "aten::_pack_padded_sequence", "aten::_pack_padded_sequence_backward"};
const std::unordered_set<std::string> kIndexing = {
    "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_",
    "aten::_unsafe_index"};
const std::unordered_set<std::string> kChoosing = {"index", "indices", "target"};  // arguments
const std::unordered_set<std::string> kSetting = {"aten::set_"};

// What torch.use_deterministic_algorithms(True) refuses on CUDA alone.
const std::unordered_map<std::string, const char*> kUnordered = {
    {"avg_pool3d_backward", "avg_pool3d_backward_cuda"},
    {"_adaptive_avg_pool2d_backward", "adaptive_avg_pool2d_backward_cuda"},
    {"_adaptive_avg_pool3d_backward", "adaptive_avg_pool3d_backward_cuda"},
    {"max_pool3d_with_indices_backward", "max_pool3d_with_indices_backward_cuda"},
    {"adaptive_max_pool2d_backward", "adaptive_max_pool2d_backward_cuda"},
    {"fractional_max_pool2d_backward", "fractional_max_pool2d_backward_cuda"},
    {"fractional_max_pool3d_backward", "fractional_max_pool3d_backward_cuda"},
    {"upsample_linear1d_backward", "upsample_linear1d_backward_out_cuda"},
    {"upsample_bilinear2d_backward", "upsample_bilinear2d_backward_out_cuda"},
    {"upsample_bicubic2d_backward", "upsample_bicubic2d_backward_out_cuda"},
    {"upsample_trilinear3d_backward", "upsample_trilinear3d_backward_out_cuda"},
    {"reflection_pad1d_backward", "reflection_pad1d_backward_out_cuda"},
    {"reflection_pad2d_backward", "reflection_pad2d_backward_cuda"},
    {"reflection_pad3d_backward", "reflection_pad3d_backward_out_cuda"},
    {"replication_pad1d_backward", "replication_pad1d_backward_cuda"},
    {"replication_pad2d_backward", "replication_pad2d_backward_cuda"},
    {"replication_pad3d_backward", "replication_pad3d_backward_cuda"},
    {"grid_sampler_2d_backward", "grid_sampler_2d_backward_cuda"},
    {"grid_sampler_3d_backward", "grid_sampler_3d_backward_cuda"},
    {"nll_loss2d_forward", "nll_loss2d_forward_out_cuda_template"},
    {"_ctc_loss_backward", "ctc_loss_backward_gpu"},
    {"kthvalue", "kthvalue CUDA"}};

Plan plan_of(const c10::OperatorHandle& op) {
  const auto& schema = op.schema();
  Plan plan;
  plan.as_it_is = kSetting.count(schema.name());
  for (const auto& result : schema.returns())
    if (result.alias_info() && !result.alias_info()->isWrite()) plan.as_it_is = true;
  plan.indexes = kIndexing.count(schema.name());
  plan.mixes = plan.indexes || kMixing.count(schema.name()) ||
               schema.name().rfind("c10d::", 0) == 0;
  plan.multiplies = account.products.count(schema.name());
  auto unordered = kUnordered.find(schema.name().substr(schema.name().find("::") + 2));
  if (unordered != kUnordered.end()) plan.unordered = unordered->second;
  plan.packs = schema.name() == "aten::_pack_padded_sequence";
  for (size_t place = 0; place < schema.arguments().size(); ++place) {
    const auto& argument = schema.arguments()[place];
    if (argument.alias_info() && argument.alias_info()->isWrite()) plan.writes = true;
    if (argument.name() == "pin_memory") plan.pinned = int(place);
    if (kChoosing.count(argument.name())) plan.chooses = true;
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

// Runs the host's kernel. Where it says that an index lies outside, a kernel of CUDA asserts it,
// which ends the context.
template <class Run>
void run_choosing(const Plan& plan, const Run& run) {
  try {
    run();
  } catch (const c10::Error& error) {
    if (plan.chooses && tell(account.judge, "(s)", error.what_without_backtrace())) {
      lost = true;
      check();
    }
    throw;
  }
}

// What an operation does whose tensors have the keys of a card; `kHost` is that of the host's.
template <DispatchKey kHost>
void on_card(const c10::OperatorHandle& op, Stack* stack) {
  const Plan& plan = known_plan(op);
  if (plan.as_it_is) {
    op.redispatchBoxed(DispatchKeySet(kHost), stack);
    return;
  }
  check();
  if (plan.unordered) at::globalContext().alertNotDeterministic(plan.unordered);
  const auto& formals = op.schema().arguments();
  size_t count = formals.size(), begin = stack->size() - count;
  Aliases aliases(plan.writes);
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
  // Where new results go: where asked for, or beside the tensors.
  Device place(kCard, current);
  if (asked) place = *asked;
  else if (plan.mixes && places.first) place = *places.first;
  else if (places.card) place = *places.card;
  std::optional<DeviceIndex> card;
  if (place.type() == kCard) card = place.has_index() ? place.index() : current;
  DeviceIndex drawing_card = card.value_or(current);

  if (plan.pinned >= 0) (*stack)[begin + plan.pinned] = IValue();
  bool has_generators = size_t(drawing_card) < generators().size();
  if (plan.generator >= 0) {
    IValue& chosen = (*stack)[begin + plan.generator];
    if (chosen.isGenerator()) chosen = host_generator(chosen.toGenerator());
    else if (has_generators) chosen = host_generator(generators()[drawing_card]);
  }
  if (plan.multiplies && card) tell(account.multiply, "(i)", int(*card));
  {
    std::optional<Drawing> drawing;
    if (plan.draws && has_generators) drawing.emplace(drawing_card);
    ResultOn there(card.value_or(-1));
    run_choosing(plan, [&] {
      if constexpr (kHost == DispatchKey::CPU) {
        op.redispatchBoxed(DispatchKeySet(kHost), stack);
      } else {  // which of the host's kinds it is now is seen from the arguments
        at::AutoDispatchBelowADInplaceOrView below;
        op.callBoxed(stack);
      }
    });
  }
  if (plan.writes) aliases.adopt_changes();

  size_t results = op.schema().returns().size(), from = stack->size() - results;
  for (size_t place = 0; place < (plan.packs ? 1 : results); ++place) {
    IValue& value = (*stack)[from + place];
    value = each_tensor(value, [&](const Tensor& t) { return aliases.to_card(t, card); });
  }
}

}  // namespace
