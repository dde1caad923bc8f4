// fiber.hpp: the stack of one CUDA thread, and the switch between it and the scheduler.
//
// All fibres and the scheduler live on one OS thread; a fibre only ever switches to the scheduler and back. A fibre
// that is abandoned half way (its launch failed) is simply prepared again: kernels own nothing to destroy.
#pragma once

#include <cstddef>
#include <vector>

#include "simt.hpp"

#if !defined(__x86_64__) && !defined(KVC_SIMT_UCONTEXT)
#define KVC_SIMT_UCONTEXT 1
#endif
#if defined(KVC_SIMT_UCONTEXT)
#include <ucontext.h>
#endif

// Sanitized frames carry red zones, so they get more room.
#if !defined(KVC_SIMT_STACK_BYTES)
#if defined(KVC_SIMT_ASAN)
#define KVC_SIMT_STACK_BYTES (256 * 1024)
#else
#define KVC_SIMT_STACK_BYTES (64 * 1024)
#endif
#endif

namespace kvc_simt {

struct Stack {
    char* low = nullptr;  // lowest usable byte; the guard page lies below
    size_t bytes = 0;
};

// Guarded stacks, mapped once and reused by every block of every launch.
class StackPool {
public:
    void reserve(size_t n_stacks);  // throws std::bad_alloc when the system gives no more memory
    Stack operator[](size_t i) const { return stacks_[i]; }

private:
    std::vector<Stack> stacks_;
};

class Fiber {
public:
    // Makes the next resume() call entry() on the stack; entry must end with finish(). `index` staggers the frames:
    // stacks lie at a power-of-two stride, and without it the hot frames of all threads would share one cache set.
    void prepare(Stack stack, size_t index, void (*entry)());
    void resume();   // scheduler: runs the fibre until it suspends or finishes
    void suspend();  // fibre: back to the scheduler, returns at the next resume()
    void finish();   // fibre, all of whose calls but entry() have returned: back to the scheduler for good
    void abandon();  // fibre: the same from anywhere

private:
    void leave(bool for_good);

    bool is_clean_ = false;  // nothing but the frames of entry() was left on the stack

    Stack stack_;
#if defined(KVC_SIMT_UCONTEXT)
    ucontext_t context_;
#else
    void* stack_pointer_ = nullptr;
#endif
    void* fake_stack_ = nullptr;  // of the address sanitizer
};

}  // namespace kvc_simt
