// What only CUDA has a kernel for, made of the CPU's operations.

#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_fused_sdp_choice_ops.h>
#include <ATen/ops/_log_softmax.h>
#include <ATen/ops/_log_softmax_backward_data.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/_softmax.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/histc.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <optional>
#include <tuple>

#include "aliases.h"
#include "devices.h"

namespace {

using Optional = std::optional<Tensor>;

// The arguments of a kernel below on the host, and its results on their card.
struct Call {
  explicit Call(const Tensor& first) : card(first.device().index()) { check(); }
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

// The CPU's flash attention stands for whichever of CUDA's fused kernels a program has enabled.
struct FusedAttention {
  at::Context& torch = at::globalContext();
  bool flash = torch.userEnabledFlashSDP(), math = torch.userEnabledMathSDP();
  FusedAttention() {
    torch.setSDPUseFlash(flash || torch.userEnabledMemEfficientSDP() ||
                         torch.userEnabledCuDNNSDP());
    torch.setSDPUseMath(true);  // for what the CPU's flash attention refuses
  }
  ~FusedAttention() {
    torch.setSDPUseFlash(flash);
    torch.setSDPUseMath(math);
  }
};

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
  FusedAttention enabled;
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

// The CPU's refuses whole numbers, which mixtures of experts count.
Tensor histc(const Tensor& tensor, int64_t bins, const at::Scalar& least, const at::Scalar& most) {
  Call call(tensor);
  at::globalContext().alertNotDeterministic("_histc_cuda");
  Tensor host = call.in(tensor);
  at::ScalarType dtype = host.scalar_type();
  if (at::isIntegralType(dtype, false)) host = host.to(at::kDouble);
  return call.out(at::histc(host, bins, least, most).to(dtype));
}

Tensor zero_tensor(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
                   std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  return at::zeros({}, at::TensorOptions().dtype(dtype).device(device)).expand(size);
}

Tensor& set_to_nothing(Tensor& tensor) {
  tensor.set_(at::empty({0}, tensor.options()).storage(), 0, {0}, {1});
  return tensor;
}

// The kernel that tries it ends the context, which the next call sees.
void assert_async(const Tensor& tensor) {
  Call call(tensor);
  if (call.in(tensor).is_nonzero()) return;
  tell(account.lose, "()");
  lost = true;
}

void assert_saying(const Tensor& tensor, c10::string_view) { assert_async(tensor); }

void record_stream(Tensor& tensor, c10::Stream stream) {
  guard.recordDataPtrOnStream(tensor.storage().data_ptr(), stream);
}

// In older versions of torch these are kernels of CUDA's, asked with a tensor of the host.
Tensor pin_memory(const Tensor& tensor, std::optional<Device>) {
  size_t size = at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(),
                                                 tensor.dtype().itemsize());
  Storage pinned(Storage::use_byte_size_t(), size, &pinned_allocator, false);
  Tensor made = at::empty({0}, tensor.options());
  made.set_(pinned, 0, tensor.sizes(), tensor.strides());
  return made.copy_(tensor);
}

bool is_pinned(const Tensor& tensor, std::optional<Device>) {
  return tell(account.pinned, "(n)", number(tensor.storage().data()));
}

// Whether another library is used for it: there is none.
void answer_no(const c10::OperatorHandle& op, Stack* stack) {
  torch::jit::drop(*stack, op.schema().arguments().size());
  stack->emplace_back(false);
}

}  // namespace
