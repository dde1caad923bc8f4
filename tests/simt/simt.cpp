// simt.cpp: runs a grid on the CPU. Threads are fibres; warps meet in lock-step at collectives, blocks at barriers.
//
// The scheduler goes round the warps; on each visit every ready lane runs until it waits, exits or is preempted, and
// then the warp's collective is settled if all 32 lanes stand at the same one. A round in which nothing ran is the end
// of the block, a complete barrier, or threads that wait for others that have exited.
#include "simt.hpp"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <exception>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "fiber.hpp"

#if defined(__ELF__)
// Set by the linker when some kernel has shared memory, else null.
extern "C" char __start_kvc_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_kvc_shared[] __attribute__((weak, visibility("hidden")));
#endif

namespace kvc_simt {

Place here{};

namespace {

// Preemptions in a row during which no thread exited and nobody got past a collective. About 0.1 s.
constexpr uint64_t kMaxIdlePreemptions = uint64_t{1} << 22;
constexpr size_t kMaxParamsBytes = 4096;  // what a kernel takes by value on every supported device

constexpr const char* kStateNames[] = {"still running", "exited",     "sync_block",  "sync_warp",   "ballot",
                                       "shfl_u32",      "shfl_u64",   "shfl_up_u32", "shfl_up_u64", "shfl_xor_u64"};
static_assert(std::size(kStateNames) == static_cast<size_t>(State::n_states), "one name per state");

struct Random {  // splitmix64
    uint64_t state;
    uint64_t next() {
        uint64_t z = (state += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    uint64_t below(uint32_t n) { return ((next() >> 32) * n) >> 32; }
    template <typename Items>
    void shuffle(Items& items, size_t n) {
        for (size_t i = n; i > 1; --i) std::swap(items[i - 1], items[below(static_cast<uint32_t>(i))]);
    }
};

struct Warp {
    State state[kWarp];
    uint64_t value[kWarp];
    Settled settled;
    uint32_t n_lanes;
};

struct Launch {
    const Kernel* kernel = nullptr;
    const void* params = nullptr;
    uint32_t block_x = 0;
    uint32_t n_warps = 0;
    Random random{0};
    uint32_t until_preemption = 1;
    uint64_t idle_preemptions = 0;
    Fiber* running = nullptr;
    std::string error;

    std::vector<Warp> warps;
    std::vector<Fiber> fibers;
    StackPool stacks;
};

Launch launch;
std::mutex one_launch;
const Kernel* first_kernel = nullptr;

State& state_of(uint32_t thread) { return launch.warps[thread / kWarp].state[thread % kWarp]; }

void thread_main() {
    launch.kernel->run(launch.params);
    state_of(here.thread) = State::exited;
    launch.idle_preemptions = 0;
    launch.running->finish();
}

void wait_in(State state) {
    state_of(here.thread) = state;
    launch.running->suspend();
}

// "lanes 0x0000ffff at ballot, lanes 0xffff0000 exited"
std::string describe(const Warp& warp) {
    std::string text;
    for (size_t s = 0; s < std::size(kStateNames); ++s) {
        uint32_t lanes = 0;
        for (uint32_t i = 0; i < warp.n_lanes; ++i) lanes |= uint32_t{warp.state[i] == static_cast<State>(s)} << i;
        if (lanes == 0) continue;
        char part[64];
        const char* at = s >= static_cast<size_t>(State::sync_block) ? "at " : "";
        std::snprintf(part, sizeof part, "%slanes 0x%08x %s%s", text.empty() ? "" : ", ", lanes, at, kStateNames[s]);
        text += part;
    }
    return text;
}

std::string where() {
    const std::string block = std::to_string(here.block) + ", " + std::to_string(here.block_y);
    return std::string(launch.kernel->name) + ", block (" + block + ")";
}

void diverged(const Warp& warp, size_t index) {
    launch.error = where() + ", warp " + std::to_string(index) + ": divergent collective: " + describe(warp);
    if (warp.n_lanes < kWarp) launch.error += "; the warp has only " + std::to_string(warp.n_lanes) + " threads";
    launch.error += "; all 32 lanes have to reach the same collective";
}

// Lets the lanes past the collective that all of them stand at; false when they stand apart and can never meet.
bool settle(Warp& warp) {
    bool is_uniform = true, is_collective = false;
    for (uint32_t i = 0; i < warp.n_lanes; ++i) {
        if (warp.state[i] == State::ready) return true;  // preempted: not the time to judge
        is_uniform &= warp.state[i] == warp.state[0];
        is_collective |= warp.state[i] >= State::sync_warp;
    }
    if (!is_collective) return true;  // at the block's barrier or gone: judged with the whole block
    if (!is_uniform || warp.n_lanes != kWarp) return false;
    warp.settled.ballot = 0;
    for (uint32_t i = 0; i < kWarp; ++i) {
        warp.settled.value[i] = warp.value[i];
        warp.settled.ballot |= uint32_t{warp.value[i] != 0} << i;
        warp.state[i] = State::ready;
    }
    launch.idle_preemptions = 0;
    return true;
}

// Runs each ready lane of the warp once; false when none was ready. An error ends it early.
bool visit(size_t index) {
    Warp& warp = launch.warps[index];
    uint8_t order[kWarp];
    uint32_t n_ready = 0;
    for (uint32_t i = 0; i < warp.n_lanes; ++i) {
        if (warp.state[i] == State::ready) order[n_ready++] = static_cast<uint8_t>(i);
    }
    if (n_ready == 0) return false;
    launch.random.shuffle(order, n_ready);
    for (uint32_t i = 0; i < n_ready; ++i) {
        here.thread = static_cast<uint32_t>(index) * kWarp + order[i];
        launch.running = &launch.fibers[here.thread];
        launch.running->resume();
        if (!launch.error.empty()) return true;
    }
    if (!settle(warp)) diverged(warp, index);
    return true;
}

// Nothing can run: lets the block past its barrier, or ends it. Returns whether it goes on.
bool pass_barrier() {
    uint32_t n_waiting = 0;
    for (uint32_t t = 0; t < launch.block_x; ++t) n_waiting += state_of(t) == State::sync_block;
    if (n_waiting == 0) return false;
    if (n_waiting < launch.block_x) {
        launch.error = where() + ": barrier divergence: " + std::to_string(n_waiting) + " of " +
                       std::to_string(launch.block_x) + " threads wait at sync_block and the others have exited";
        for (size_t w = 0; w < launch.n_warps; ++w) {
            launch.error += "; warp " + std::to_string(w) + " " + describe(launch.warps[w]);
        }
        return false;
    }
    for (uint32_t t = 0; t < launch.block_x; ++t) state_of(t) = State::ready;
    launch.idle_preemptions = 0;
    return true;
}

void run_block() {
#if defined(__ELF__)
    // Weak addresses: null where no kernel has shared memory.
    const size_t shared_bytes = static_cast<size_t>(__stop_kvc_shared - __start_kvc_shared);
    const int junk = static_cast<int>(1 + launch.random.below(255));
    if (shared_bytes != 0) std::memset(__start_kvc_shared, junk, shared_bytes);
#endif
    for (uint32_t t = 0; t < launch.block_x; ++t) {
        state_of(t) = State::ready;
        launch.fibers[t].prepare(launch.stacks[t], t, thread_main);
    }
    launch.idle_preemptions = 0;
    uint8_t order[kMaxBlock / kWarp];
    std::iota(order, order + launch.n_warps, uint8_t{0});
    do {
        bool moved = true;
        while (moved && launch.error.empty()) {
            moved = false;
            launch.random.shuffle(order, launch.n_warps);
            for (uint32_t i = 0; i < launch.n_warps && launch.error.empty(); ++i) moved |= visit(order[i]);
        }
    } while (launch.error.empty() && pass_barrier());
}

void run_grid(uint32_t grid_x, uint32_t grid_y) {
    launch.n_warps = (launch.block_x + kWarp - 1) / kWarp;
    launch.warps.resize(launch.n_warps);
    for (uint32_t w = 0; w < launch.n_warps; ++w) launch.warps[w].n_lanes = std::min(kWarp, launch.block_x - w * kWarp);
    if (launch.fibers.size() < launch.block_x) launch.fibers.resize(launch.block_x);
    launch.stacks.reserve(launch.block_x);

    std::vector<uint32_t> order(size_t{grid_x} * grid_y);
    std::iota(order.begin(), order.end(), 0u);
    launch.random.shuffle(order, order.size());
    for (uint32_t block : order) {
        here = {0, block % grid_x, block / grid_x, grid_x, grid_y};
        run_block();
        if (!launch.error.empty()) return;
    }
}

const Kernel* find(const char* name) {
    const Kernel* kernel = first_kernel;
    while (kernel != nullptr && std::strcmp(kernel->name, name) != 0) kernel = kernel->next;
    return kernel;
}

// Empty when the launch is one that the device would take.
std::string refusal(const Kernel* kernel, unsigned grid_x, unsigned grid_y, unsigned block_x, size_t params_bytes) {
    if (kernel == nullptr) return "unknown kernel; the library's list names those it has";
    if (params_bytes != kernel->params_bytes || params_bytes > kMaxParamsBytes) {
        return "params of " + std::to_string(params_bytes) + " bytes, the kernel takes " +
               std::to_string(kernel->params_bytes) + " and a launch at most " + std::to_string(kMaxParamsBytes) +
               "; compare the dtype with the struct";
    }
    const unsigned max_block = std::min(kernel->max_block, kMaxBlock);
    if (block_x == 0 || block_x > max_block) {
        return "block of " + std::to_string(block_x) + " threads, allowed 1 to " + std::to_string(max_block);
    }
    const uint64_t n_blocks = uint64_t{grid_x} * grid_y;
    if (n_blocks == 0 || n_blocks > 0x7fffffffu || grid_y > 65535) {
        return "grid of " + std::to_string(grid_x) + " x " + std::to_string(grid_y) +
               " blocks, allowed 1 to 2147483647 in all and 1 to 65535 in y";
    }
    return {};
}

}  // namespace

Registration::Registration(Kernel& kernel) {
    kernel.next = first_kernel;
    first_kernel = &kernel;
}

const Settled& meet(State collective, uint64_t value) {
    Warp& warp = launch.warps[here.thread / kWarp];
    warp.value[here.thread % kWarp] = value;
    wait_in(collective);
    return warp.settled;
}

void sync_block() { wait_in(State::sync_block); }

void preempt() {
    if (--launch.until_preemption != 0) return;
    launch.until_preemption = 1 + static_cast<uint32_t>(launch.random.below(8));
    if (++launch.idle_preemptions > kMaxIdlePreemptions) {
        fail("spins without progress; blocks run one after the other here, so a wait for another block never ends");
    }
    launch.running->suspend();
}

void fail(const char* format, ...) {
    char text[256];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    launch.error = where() + ", thread " + std::to_string(here.thread) + ": " + text;
    for (;;) launch.running->abandon();
}

}  // namespace kvc_simt

#define KVC_SIMT_API extern "C" __attribute__((visibility("default")))

// The i-th kernel, or null past the last.
KVC_SIMT_API const char* kvc_simt_kernel(unsigned i, unsigned* max_block, size_t* params_bytes) {
    const kvc_simt::Kernel* kernel = kvc_simt::first_kernel;
    while (kernel != nullptr && i-- != 0) kernel = kernel->next;
    if (kernel == nullptr) return nullptr;
    *max_block = kernel->max_block;
    *params_bytes = kernel->params_bytes;
    return kernel->name;
}

// 0, or 1 with the reason in `error`. After a failure, memory holds whatever was written before it.
KVC_SIMT_API int kvc_simt_launch(const char* name, unsigned grid_x, unsigned grid_y, unsigned block_x,
                                 const void* params, size_t params_bytes, uint64_t seed, char* error,
                                 size_t error_bytes) {
    using namespace kvc_simt;
    const std::lock_guard<std::mutex> lock(one_launch);
    const Kernel* kernel = find(name);
    launch.error = refusal(kernel, grid_x, grid_y, block_x, params_bytes);
    if (!launch.error.empty()) {
        launch.error = std::string(name) + ": " + launch.error;
    } else {
        alignas(64) static char copy[kMaxParamsBytes];
        std::memcpy(copy, params, params_bytes);
        launch.kernel = kernel;
        launch.params = copy;
        launch.block_x = block_x;
        launch.random = {seed};
        launch.until_preemption = 1;
        try {
            run_grid(grid_x, grid_y);
        } catch (const std::exception& e) {
            launch.error = std::string(name) + ": no memory for the run (" + e.what() + ")";
        }
    }
    if (error_bytes != 0) std::snprintf(error, error_bytes, "%s", launch.error.c_str());
    return launch.error.empty() ? 0 : 1;
}
