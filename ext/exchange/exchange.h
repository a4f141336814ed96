// What ranks of one host give each other: every rank has some columns of a matrix, and afterwards all have all of it.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace gptq {

constexpr int kMaxRanks = 8;

// A rank's own, on its device; zeros at the beginning.
struct ExchangeState {
  uint32_t round;             // of exchanges that are done
  uint32_t ticket;            // blocks of the kernel at work that are done
  uint32_t live;              // 0: ranks do not wait for each other, and nothing moves: what kernels cost is measured alone
  uint32_t pad;
};

// Columns are counted in words of 32 bits: two elements of 16, or one of 32. `words` and `arrived` of a rank are on its device where peers
// can write that, and otherwise in the host's memory, which all of them can; zeros at the beginning.
struct ExchangeArgs {
  const uint32_t* source;  // [rows, this rank's columns], row stride lds words
  uint32_t* full[kMaxRanks];  // [rows, columns] on every rank, row stride ldf words; source may be its part of this rank's
  uint64_t* words[kMaxRanks];  // [2, ranks, capacity] of every rank: value, and round in the upper half
  uint32_t* arrived[kMaxRanks];  // [kMaxRanks] of every rank, by peers: the last round of theirs that came as a whole
  uint32_t* staged;  // in the host's memory [2, stage], of all ranks: where peers find such parts; null where they are written into place
  ExchangeState* state;
  const int* index;  // [2 * columns] or null: where in a row of `full` each element of 16 bits goes, of words that come one by one
  uint32_t* stuck;   // in the host's memory: which rank did not come, plus 1
  int begin[kMaxRanks + 1];  // first column of each rank
  int rank, ranks, rows, lds, ldf, capacity;
  int64_t stage;      // words
  uint64_t limit_ns;  // that a rank is waited for
};

// Word by word: each with its round, so that whoever reads it needs neither a barrier nor a fence. For few rows.
// At most `capacity` words of each rank.
cudaError_t launch_exchange_words(const ExchangeArgs& args, cudaStream_t stream);

// Straight into place, and one flag when all of it is there; by way of `staged`, up to `stage` words of all ranks, where ranks cannot
// write each other's memory. For many rows; without `index`.
cudaError_t launch_exchange_rows(const ExchangeArgs& args, cudaStream_t stream);

struct RmsNormArgs;

// The same word by word, in place, and then ops/ops.h's RMSNorm of the rows that are whole now: norm.x is args.full[args.rank], norm.T its
// rows, in bits that launch_rms_norm gives. Parts begin at multiples of 8 elements.
cudaError_t launch_exchange_norm(const ExchangeArgs& args, const RmsNormArgs& norm, bool bf16, cudaStream_t stream);

// Lets the current device write what `peer` has. cudaErrorPeerAccessUnsupported where it cannot.
cudaError_t enable_peer_access(int peer);

}  // namespace gptq
