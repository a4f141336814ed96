// All products, written once over 16 lanes (`lanes_*.h`): included by one source for each instruction set.
#pragma once
#include "cpu/dense_ways.h"
#include "cpu/exact_ways.h"
#include "cpu/ops_ways.h"
#include "cpu/rounded_ways.h"

namespace gptq_cpu {
namespace {

Ways ways_of(const char* name) { return {name, quantize, multiply, gather, multiply_exact, dense, &kOps}; }

}  // namespace
}  // namespace gptq_cpu
