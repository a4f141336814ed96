// gptq_api._cuda: addresses and a stream in, an exception out. Shapes, types, devices and alignment are checked in gptq_api/kernels.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention/attention_decode.h"
#include "common/device.h"
#include "common/pairing.h"
#include "exchange/exchange.h"
#include "gemm/dequant.h"
#include "gemm/mma.h"
#include "gemm/pack.h"
#include "gemm/same_bits.h"
#include "gemv/gemv.h"
#include "head/head.h"
#include "ops/ops.h"
#include "sampler/sampler.h"
#ifdef GPTQ_API_HOPPER
#include "gemm/same_bits_wgmma.h"
#include "gemm/wgmma.h"
#endif

namespace py = pybind11;
using py::literals::operator""_a;  // "x"_a is py::arg("x"): a name that Python may call with, in the order of the function's parameters

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}
cudaStream_t as_stream(std::uintptr_t address) { return pointer<CUstream_st>(address); }

void raise_on(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a launch error is not sticky; leave none behind for the next caller
  throw std::runtime_error(what + ": " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
}

std::string shape(const char* name, int M, int N, int K) {
  return std::string(name) + " M=" + std::to_string(M) + " N=" + std::to_string(N) + " K=" + std::to_string(K);
}

void gemv(std::uintptr_t w, std::uintptr_t x, std::uintptr_t y, std::uintptr_t bias, std::uintptr_t residual, int M, int N, int K,
          int ldx, int ldy, int ldr, int paired, int groups, bool zeros, bool bf16, bool in_a_row, std::uintptr_t stream, bool f32) {
  gptq::GemvArgs args{};
  args.w = pointer<const std::uint8_t>(w);
  args.x = pointer<const std::uint16_t>(x);
  args.y = pointer<void>(y);
  args.bias = pointer<const std::uint16_t>(bias);
  args.residual = pointer<const std::uint16_t>(residual);
  args.M = M, args.N = N, args.K = K, args.ldx = ldx, args.ldy = ldy, args.ldr = ldr, args.paired = paired, args.f32 = f32;
  raise_on(gptq::launch_gemv(args, groups, zeros, bf16, in_a_row, as_stream(stream)), shape("decode", M, N, K));
}

void dequant(std::uintptr_t w, std::uintptr_t out, int N, int K, int ldo, int strip_first, int strip_count, int paired, int groups,
             bool zeros, bool bf16, std::uintptr_t stream) {
  const gptq::DequantArgs args{pointer<const std::uint8_t>(w), pointer<std::uint16_t>(out), N, K, ldo, strip_first, strip_count, paired};
  raise_on(gptq::launch_dequant(args, groups, zeros, bf16, as_stream(stream)), shape("dequant", 0, N, K));
}

void gather(std::uintptr_t x, std::uintptr_t perm, std::uintptr_t out, int M, int K, int ldx, int ldo, std::uintptr_t stream) {
  const gptq::GatherArgs args{pointer<const std::uint16_t>(x), pointer<const int>(perm), pointer<std::uint16_t>(out), M, K, ldx, ldo};
  raise_on(gptq::launch_gather(args, as_stream(stream)), shape("gather", M, 0, K));
}

void pack(std::uintptr_t qweight, std::uintptr_t scales, std::uintptr_t zeros, std::uintptr_t perm, std::uintptr_t columns,
          std::uintptr_t out, int N, int K, int groups, int group_size, int group_count, std::uintptr_t stream) {
  gptq::PackArgs args{};
  args.qweight = pointer<const std::uint32_t>(qweight), args.scales = pointer<const std::uint16_t>(scales);
  args.zeros = pointer<const std::uint8_t>(zeros), args.perm = pointer<const int>(perm), args.columns = pointer<const int>(columns);
  args.out = pointer<std::uint8_t>(out);
  args.N = N, args.K = K, args.group_size = group_size, args.group_count = group_count;
  raise_on(gptq::launch_pack(args, groups, as_stream(stream)), shape("pack", 0, N, K));
}

void embed(std::uintptr_t history, std::uintptr_t row_seat, std::uintptr_t positions, std::uintptr_t table, std::uintptr_t out, int T,
           int V, int H, int ldh, std::uintptr_t stream) {
  const gptq::EmbedArgs args{
      pointer<const int>(history), pointer<const int>(row_seat), pointer<const int>(positions), pointer<const std::uint16_t>(table),
      pointer<std::uint16_t>(out), T, V, H, ldh};
  raise_on(gptq::launch_embed(args, as_stream(stream)), "embed T=" + std::to_string(T) + " H=" + std::to_string(H));
}

void rms_norm(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t perm, std::uintptr_t out, int T, int H, int ldx, int ldo, float eps,
              bool bf16, std::uintptr_t stream) {
  const gptq::RmsNormArgs args{
      pointer<const std::uint16_t>(x), pointer<const std::uint16_t>(weight), pointer<const int>(perm), pointer<std::uint16_t>(out), T, H,
      ldx, ldo, eps};
  raise_on(gptq::launch_rms_norm(args, bf16, as_stream(stream)), "rms_norm T=" + std::to_string(T) + " H=" + std::to_string(H));
}

void rope_and_write(std::uintptr_t qkv, std::uintptr_t positions, std::uintptr_t slot_mapping, std::uintptr_t cos_sin, std::uintptr_t cache,
                    std::uintptr_t q_norm, std::uintptr_t k_norm, int T, int num_heads, int num_kv_heads, int head_dim, int block_size,
                    int ldq, float eps, bool bf16, bool fp8_cache, std::uintptr_t stream) {
  const gptq::RopeArgs args{
      pointer<std::uint16_t>(qkv), pointer<const int>(positions), pointer<const int>(slot_mapping), pointer<const float>(cos_sin),
      pointer<void>(cache), pointer<const std::uint16_t>(q_norm), pointer<const std::uint16_t>(k_norm), T, num_heads, num_kv_heads,
      head_dim, block_size, ldq, eps};
  raise_on(gptq::launch_rope_and_write(args, bf16, fp8_cache, as_stream(stream)), "rope_and_write T=" + std::to_string(T));
}

gptq::SamplerRows sampler_rows(std::uintptr_t logits, int S, int V, long long ldl, std::uintptr_t fields, long long ldf) {
  return {pointer<const float>(logits), S, V, ldl, pointer<const int>(fields), ldf};
}

void sample(std::uintptr_t logits, int S, int V, long long ldl, std::uintptr_t fields, long long ldf, std::uintptr_t history, long long ldh,
            int capacity, std::uintptr_t tokens, std::uintptr_t stream) {
  const gptq::SamplerHistory past{pointer<int>(history), ldh, capacity};
  raise_on(gptq::launch_sample(sampler_rows(logits, S, V, ldl, fields, ldf), past, pointer<int>(tokens), as_stream(stream)),
           shape("sample", S, V, 0));
}

void sample_adjust(std::uintptr_t logits, int S, int V, long long ldl, std::uintptr_t fields, long long ldf, std::uintptr_t history,
                   long long ldh, int capacity, std::uintptr_t entries, std::uintptr_t masks, std::uintptr_t out, long long ldo,
                   std::uintptr_t stream) {
  const gptq::SamplerHistory past{pointer<int>(history), ldh, capacity};
  raise_on(gptq::launch_sample_adjust(sampler_rows(logits, S, V, ldl, fields, ldf), past, pointer<const int>(entries),
                                      pointer<const int>(masks), pointer<float>(out), ldo, as_stream(stream)),
           shape("sample_adjust", S, V, 0));
}

void sample_logprobs(std::uintptr_t logits, int S, int V, long long ldl, std::uintptr_t fields, long long ldf, std::uintptr_t tokens,
                     std::uintptr_t out, std::uintptr_t stream) {
  raise_on(gptq::launch_sample_logprobs(sampler_rows(logits, S, V, ldl, fields, ldf), pointer<const int>(tokens), pointer<int>(out),
                                        as_stream(stream)),
           shape("sample_logprobs", S, V, 0));
}

void attention_decode(std::uintptr_t qkv, std::uintptr_t cache, std::uintptr_t block_tables, std::uintptr_t context_lens,
                      std::uintptr_t query_start, std::uintptr_t out, std::uintptr_t out_index, std::uintptr_t groups,
                      std::uintptr_t positions, std::uintptr_t slot_mapping, std::uintptr_t cos_sin, std::uintptr_t q_norm,
                      std::uintptr_t k_norm, std::uintptr_t workspace, float eps, float scale, int ldqkv, int ldo, int table_stride,
                      int sequences, int heads, int kv_heads, int block_size, int head_dim, int window, bool prefetch, bool bf16, bool fp8,
                      int blocks_per_sm, int teams, std::uintptr_t stream) {
  gptq::AttentionDecodeArgs args{};
  args.qkv = pointer<const std::uint16_t>(qkv), args.cache = pointer<std::uint8_t>(cache);
  args.block_tables = pointer<const int>(block_tables), args.context_lens = pointer<const int>(context_lens);
  args.query_start = pointer<const int>(query_start);
  args.out = pointer<std::uint16_t>(out), args.out_index = pointer<const int>(out_index);
  args.groups = pointer<const int>(groups);
  args.positions = pointer<const int>(positions), args.slot_mapping = pointer<const int>(slot_mapping),
  args.cos_sin = pointer<const float>(cos_sin);
  args.q_norm = pointer<const std::uint16_t>(q_norm), args.k_norm = pointer<const std::uint16_t>(k_norm),
  args.workspace = pointer<void>(workspace);
  args.eps = eps, args.scale = scale, args.ldqkv = ldqkv, args.ldo = ldo, args.table_stride = table_stride, args.sequences = sequences;
  args.heads = heads, args.kv_heads = kv_heads, args.block_size = block_size, args.window = window, args.prefetch = prefetch;
  raise_on(gptq::launch_attention_decode(args, head_dim, bf16, fp8, blocks_per_sm, static_cast<gptq::Teams>(teams), as_stream(stream)),
           "attention_decode sequences=" + std::to_string(sequences) + " heads=" + std::to_string(heads) + "/" + std::to_string(kv_heads) +
               " head_dim=" + std::to_string(head_dim));
}

using LaunchMma = cudaError_t (*)(const gptq::MmaGemm&, cudaStream_t);

template <LaunchMma Launch>
void mma(std::uintptr_t w, std::uintptr_t x, std::uintptr_t y, std::uintptr_t bias, std::uintptr_t residual, std::uintptr_t workspace,
         int M, int N, int K, int ldx, int ldy, int ldr, int paired, int groups, bool zeros, bool bf16, int tile, int split,
         std::uintptr_t stream, bool f32) {
  gptq::MmaGemm call{};
  call.weight = pointer<void>(w), call.x = pointer<void>(x), call.y = pointer<void>(y), call.bias = pointer<void>(bias);
  call.residual = pointer<void>(residual), call.workspace = pointer<void>(workspace);
  call.m = M, call.n = N, call.k = K, call.ldx = ldx, call.ldy = ldy, call.ldr = ldr;
  call.paired = paired, call.groups = groups, call.zeros = zeros, call.bf16 = bf16, call.f32 = f32, call.tile = tile, call.split = split;
  raise_on(Launch(call, as_stream(stream)), shape(Launch == &gptq::launch_mma ? "mma" : "same_bits", M, N, K));
}

gptq::HeadProduct head_product(std::uintptr_t w, std::uintptr_t x, std::uintptr_t logits, int M, int V, int H, long long ldx,
                               long long ldl, bool bf16, int tokens) {
  return {pointer<const void>(w), pointer<const void>(x), pointer<float>(logits), M, V, H, ldx, ldl, bf16, tokens};
}

void head(std::uintptr_t w, std::uintptr_t x, std::uintptr_t logits, int M, int V, int H, long long ldx, long long ldl, bool bf16,
          int tokens, std::uintptr_t stream) {
  raise_on(gptq::launch_head(head_product(w, x, logits, M, V, H, ldx, ldl, bf16, tokens), as_stream(stream)), shape("head", M, V, H));
}

#ifdef GPTQ_API_HOPPER
void head_wgmma(std::uintptr_t w, std::uintptr_t x, std::uintptr_t logits, int M, int V, int H, long long ldx, long long ldl, bool bf16,
                int tokens, std::uintptr_t stream) {
  raise_on(gptq::launch_head_wgmma(head_product(w, x, logits, M, V, H, ldx, ldl, bf16, tokens), as_stream(stream)),
           shape("head_wgmma", M, V, H));
}

void wgmma(std::uintptr_t w, std::uintptr_t x, std::uintptr_t y, std::uintptr_t bias, std::uintptr_t residual, std::uintptr_t workspace,
           int M, int N, int K, int ldx, int ldy, int ldr, int paired, int groups, bool zeros, bool bf16, int tile, int sharing, int split,
           std::uintptr_t stream) {
  gptq::WgmmaGemm call{};
  call.weight = pointer<void>(w), call.x = pointer<void>(x), call.y = pointer<void>(y), call.bias = pointer<void>(bias);
  call.residual = pointer<void>(residual), call.workspace = pointer<void>(workspace);
  call.m = M, call.n = N, call.k = K, call.ldx = ldx, call.ldy = ldy, call.ldr = ldr;
  call.paired = paired, call.groups = groups, call.zeros = zeros, call.bf16 = bf16, call.tile = tile, call.sharing = sharing,
  call.split = split;
  raise_on(gptq::launch_wgmma(call, as_stream(stream)), shape("wgmma", M, N, K));
}
#endif

using Addresses = std::vector<std::uintptr_t>;  // a rank each

gptq::ExchangeArgs exchange_args(const Addresses& full, const Addresses& words, std::uintptr_t state, std::uintptr_t stuck,
                                 const std::vector<int>& begin, int rank, int rows, int capacity, double limit_s) {
  const std::size_t ranks = full.size();
  if (ranks > gptq::kMaxRanks || words.size() != ranks || begin.size() != ranks + 1)
    throw std::invalid_argument("exchange: " + std::to_string(ranks) + " ranks, and not of each its addresses and columns");
  gptq::ExchangeArgs args{};
  args.state = pointer<gptq::ExchangeState>(state), args.stuck = pointer<std::uint32_t>(stuck);
  for (std::size_t i = 0; i < ranks; i++)
    args.full[i] = pointer<std::uint32_t>(full[i]), args.words[i] = pointer<std::uint64_t>(words[i]);
  for (std::size_t i = 0; i <= ranks; i++) args.begin[i] = begin[i];
  args.rank = rank, args.ranks = static_cast<int>(ranks), args.rows = rows, args.capacity = capacity;
  args.limit_ns = static_cast<std::uint64_t>(limit_s * 1e9);
  return args;
}

void exchange(std::uintptr_t source, const Addresses& full, const Addresses& words, const Addresses& arrived, std::uintptr_t staged,
              std::int64_t stage, std::uintptr_t state, std::uintptr_t index, std::uintptr_t stuck, const std::vector<int>& begin, int rank,
              int rows, int lds, int ldf, int capacity, bool as_rows, double limit_s, std::uintptr_t stream) {
  gptq::ExchangeArgs args = exchange_args(full, words, state, stuck, begin, rank, rows, capacity, limit_s);
  if (arrived.size() != full.size()) throw std::invalid_argument("exchange: not of each rank where it is told that rows are there");
  for (std::size_t i = 0; i < arrived.size(); i++) args.arrived[i] = pointer<std::uint32_t>(arrived[i]);
  args.source = pointer<const std::uint32_t>(source), args.index = pointer<const int>(index), args.lds = lds, args.ldf = ldf;
  args.staged = pointer<std::uint32_t>(staged), args.stage = stage;
  raise_on((as_rows ? gptq::launch_exchange_rows : gptq::launch_exchange_words)(args, as_stream(stream)),
           shape("exchange", rows, begin.back(), 0));
}

void exchange_norm(const Addresses& full, const Addresses& words, std::uintptr_t state, std::uintptr_t stuck, const std::vector<int>& begin,
                   int rank, int capacity, double limit_s, std::uintptr_t weight, std::uintptr_t perm, std::uintptr_t out, int T, int H,
                   int ldx, int ldo, float eps, bool bf16, std::uintptr_t stream) {
  const gptq::ExchangeArgs args = exchange_args(full, words, state, stuck, begin, rank, T, capacity, limit_s);
  const gptq::RmsNormArgs norm{reinterpret_cast<const std::uint16_t*>(args.full[rank]),
                               pointer<const std::uint16_t>(weight),
                               pointer<const int>(perm),
                               pointer<std::uint16_t>(out),
                               T,
                               H,
                               ldx,
                               ldo,
                               eps};
  raise_on(gptq::launch_exchange_norm(args, norm, bf16, as_stream(stream)), shape("exchange_norm", T, H, 0));
}

void enable_peer_access(int peer) {
  raise_on(gptq::enable_peer_access(peer), "peer access to GPU " + std::to_string(peer));
}

// For the current device; 0 where the kernels have no code for it.
int compiled_for() {
  int code = 0;
  gptq::compiled_for(code);
  cudaGetLastError();
  return code;
}

int device_count() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  cudaGetLastError();
  return status == cudaSuccess ? count : 0;  // no driver is no device, not an error
}

}  // namespace

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "CUDA kernels for 4-bit GPTQ weights; use gptq_api.kernels.gemm";
  const auto free_gil = py::call_guard<py::gil_scoped_release>();
  m.def("device_count", &device_count, free_gil);
  m.def("compiled_for", &compiled_for, free_gil);
  m.attr("architectures") = GPTQ_API_ARCHS;  // as CMake was told, with commas
  m.attr("cuda_version") = CUDART_VERSION;
  m.def("decode", &gemv, free_gil, "w"_a, "x"_a, "y"_a, "bias"_a, "residual"_a, "M"_a, "N"_a, "K"_a, "ldx"_a, "ldy"_a, "ldr"_a, "paired"_a,
        "groups"_a, "zeros"_a, "bf16"_a, "in_a_row"_a, "stream"_a, "f32"_a = false);
  m.def("dequant", &dequant, free_gil, "w"_a, "out"_a, "N"_a, "K"_a, "ldo"_a, "strip_first"_a, "strip_count"_a, "paired"_a, "groups"_a,
        "zeros"_a, "bf16"_a, "stream"_a);
  m.def("gather", &gather, free_gil, "x"_a, "perm"_a, "out"_a, "M"_a, "K"_a, "ldx"_a, "ldo"_a, "stream"_a);
  m.def("pack", &pack, free_gil, "qweight"_a, "scales"_a, "zeros"_a, "perm"_a, "columns"_a, "out"_a, "N"_a, "K"_a, "groups"_a,
        "group_size"_a, "group_count"_a, "stream"_a);
  m.def("embed", &embed, free_gil, "history"_a, "row_seat"_a, "positions"_a, "table"_a, "out"_a, "T"_a, "V"_a, "H"_a, "ldh"_a, "stream"_a);
  m.def("rms_norm", &rms_norm, free_gil, "x"_a, "weight"_a, "perm"_a, "out"_a, "T"_a, "H"_a, "ldx"_a, "ldo"_a, "eps"_a, "bf16"_a,
        "stream"_a);
  m.def("rope_and_write", &rope_and_write, free_gil, "qkv"_a, "positions"_a, "slot_mapping"_a, "cos_sin"_a, "cache"_a, "q_norm"_a,
        "k_norm"_a, "T"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "block_size"_a, "ldq"_a, "eps"_a, "bf16"_a, "fp8_cache"_a,
        "stream"_a);
  m.def("sample", &sample, free_gil, "logits"_a, "S"_a, "V"_a, "ldl"_a, "fields"_a, "ldf"_a, "history"_a, "ldh"_a, "capacity"_a, "tokens"_a,
        "stream"_a);
  m.def("sample_adjust", &sample_adjust, free_gil, "logits"_a, "S"_a, "V"_a, "ldl"_a, "fields"_a, "ldf"_a, "history"_a, "ldh"_a,
        "capacity"_a, "entries"_a, "masks"_a, "out"_a, "ldo"_a, "stream"_a);
  m.def("sample_logprobs", &sample_logprobs, free_gil, "logits"_a, "S"_a, "V"_a, "ldl"_a, "fields"_a, "ldf"_a, "tokens"_a, "out"_a,
        "stream"_a);
  m.def("exchange", &exchange, free_gil, "source"_a, "full"_a, "words"_a, "arrived"_a, "staged"_a, "stage"_a, "state"_a, "index"_a,
        "stuck"_a, "begin"_a, "rank"_a, "rows"_a, "lds"_a, "ldf"_a, "capacity"_a, "as_rows"_a, "limit_s"_a, "stream"_a);
  m.def("exchange_norm", &exchange_norm, free_gil, "full"_a, "words"_a, "state"_a, "stuck"_a, "begin"_a, "rank"_a, "capacity"_a,
        "limit_s"_a, "weight"_a, "perm"_a, "out"_a, "T"_a, "H"_a, "ldx"_a, "ldo"_a, "eps"_a, "bf16"_a, "stream"_a);
  m.attr("exchange_state_bytes") = sizeof(gptq::ExchangeState);
  m.attr("exchange_most_ranks") = gptq::kMaxRanks;
  m.def("enable_peer_access", &enable_peer_access, free_gil, "peer"_a);
  m.def("attention_decode", &attention_decode, free_gil, "qkv"_a, "cache"_a, "block_tables"_a, "context_lens"_a, "query_start"_a, "out"_a,
        "out_index"_a, "groups"_a, "positions"_a, "slot_mapping"_a, "cos_sin"_a, "q_norm"_a, "k_norm"_a, "workspace"_a, "eps"_a, "scale"_a,
        "ldqkv"_a, "ldo"_a, "table_stride"_a, "sequences"_a, "heads"_a, "kv_heads"_a, "block_size"_a, "head_dim"_a, "window"_a,
        "prefetch"_a, "bf16"_a, "fp8"_a, "blocks_per_sm"_a, "teams"_a, "stream"_a);
  m.def("attention_decode_workspace_bytes", &gptq::attention_decode_workspace_bytes, "heads"_a, "kv_heads"_a, "head_dim"_a);
  m.def("mma", &mma<&gptq::launch_mma>, free_gil, "w"_a, "x"_a, "y"_a, "bias"_a, "residual"_a, "workspace"_a, "M"_a, "N"_a, "K"_a,
        "ldx"_a, "ldy"_a, "ldr"_a, "paired"_a, "groups"_a, "zeros"_a, "bf16"_a, "tile"_a, "split"_a, "stream"_a,
        "f32"_a = false);
  m.def("mma_workspace_bytes", &gptq::mma_workspace_bytes);
  m.def("same_bits", &mma<&gptq::launch_same_bits>, free_gil, "w"_a, "x"_a, "y"_a, "bias"_a, "residual"_a, "workspace"_a, "M"_a, "N"_a,
        "K"_a, "ldx"_a, "ldy"_a, "ldr"_a, "paired"_a, "groups"_a, "zeros"_a, "bf16"_a, "tile"_a, "split"_a, "stream"_a,
        "f32"_a = false);
  m.def("same_bits_workspace_bytes", &gptq::same_bits_workspace_bytes);
  m.def("head", &head, free_gil, "w"_a, "x"_a, "logits"_a, "M"_a, "V"_a, "H"_a, "ldx"_a, "ldl"_a, "bf16"_a, "tokens"_a, "stream"_a);
#ifdef GPTQ_API_HOPPER
  m.def("same_bits_wgmma", &mma<&gptq::launch_same_bits_wgmma>, free_gil, "w"_a, "x"_a, "y"_a, "bias"_a, "residual"_a, "workspace"_a,
        "M"_a, "N"_a, "K"_a, "ldx"_a, "ldy"_a, "ldr"_a, "paired"_a, "groups"_a, "zeros"_a, "bf16"_a, "tile"_a, "split"_a, "stream"_a,
        "f32"_a = false);
  m.def("wgmma", &wgmma, free_gil, "w"_a, "x"_a, "y"_a, "bias"_a, "residual"_a, "workspace"_a, "M"_a, "N"_a, "K"_a, "ldx"_a, "ldy"_a,
        "ldr"_a, "paired"_a, "groups"_a, "zeros"_a, "bf16"_a, "tile"_a, "sharing"_a, "split"_a, "stream"_a);
  m.def("wgmma_workspace_bytes", &gptq::wgmma_workspace_bytes);
  m.def("head_wgmma", &head_wgmma, free_gil, "w"_a, "x"_a, "logits"_a, "M"_a, "V"_a, "H"_a, "ldx"_a, "ldl"_a, "bf16"_a, "tokens"_a,
        "stream"_a);
#endif
}
