// simt.hpp: what the device header asks of the CPU runtime, and how kernels make themselves known to it.
//
// One launch at a time per process, its blocks one after the other. The seed decides the order of the blocks, the order
// in which warps and lanes run between two collectives, where a thread is preempted at an atomic or a volatile access,
// and what shared memory holds when a block starts. C++17, like the kernels that include it.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#define KVC_SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define KVC_SIMT_ASAN 1
#endif
#endif

namespace kvc_simt {

constexpr uint32_t kWarp = 32;
constexpr uint32_t kMaxBlock = 1024;

// What a thread of the block is doing. From sync_warp on: collectives of the warp.
enum class State : uint8_t {
    ready,
    exited,
    sync_block,
    sync_warp,
    ballot,
    shfl_u32,
    shfl_u64,
    shfl_up_u32,
    shfl_up_u64,
    shfl_xor_u64,
    n_states,
};

// What the 32 lanes brought to the collective that they all reached; stays until all of them reach the next one.
struct Settled {
    uint64_t value[kWarp];
    uint32_t ballot;  // bit i: value[i] is not 0
};

// The indices of the running thread.
struct Place {
    uint32_t thread, block, block_y, n_blocks, n_blocks_y;
};
extern Place here;

const Settled& meet(State collective, uint64_t value);  // returns when all 32 lanes of the warp have come
void sync_block();                                      // returns when all threads of the block have come
void preempt();                                         // now and then lets other threads run
// Ends the launch with this text.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

struct Kernel {
    const char* name;
    unsigned max_block;
    size_t params_bytes;
    void (*run)(const void* params);  // the body of one thread
    const Kernel* next = nullptr;
};

struct Registration {
    explicit Registration(Kernel& kernel);
};

}  // namespace kvc_simt
