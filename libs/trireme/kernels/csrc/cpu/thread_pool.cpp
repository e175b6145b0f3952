#include "thread_pool.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>

namespace trireme {
namespace {

constexpr int kSpinPauses = 2000;  // 30 to 100 us, as long as the CPU takes a pause to be
constexpr int kMostWorkers = 255;

struct Pool {
    // The job. Written while no piece is left to take, read by who has taken one.
    Piece piece = nullptr;
    void* context = nullptr;
    int64_t count = 0;
    alignas(64) std::atomic<int> helpers{0};     // workers that the job may use
    alignas(64) std::atomic<int64_t> left{0};    // pieces not taken yet; taking brings it below 0
    alignas(64) std::atomic<int64_t> done{0};
    alignas(64) std::atomic<uint32_t> jobs{0};   // what sleepers wait on
    std::atomic<int> sleepers{0};
    alignas(64) std::atomic<bool> is_busy{false};
    int workers = 0;
};

// Never freed: workers outlive everything. Another one after a fork, whose child has none of the workers.
std::atomic<Pool*> current{nullptr};

bool take_piece(Pool& pool) {
    if (pool.left.load(std::memory_order_relaxed) <= 0) return false;
    const int64_t ticket = pool.left.fetch_sub(1, std::memory_order_acq_rel);
    if (ticket <= 0) return false;
    // The job cannot end before this piece has, so its fields are those that were published with the ticket.
    pool.piece(pool.context, pool.count - ticket);
    pool.done.fetch_add(1, std::memory_order_release);
    return true;
}

struct Worker {
    Pool* pool;
    int index;
};

void* work(void* argument) {
    Worker* self = static_cast<Worker*>(argument);
    Pool& pool = *self->pool;
    const int index = self->index;
    delete self;
    for (;;) {
        const uint32_t seen = pool.jobs.load(std::memory_order_seq_cst);
        bool has_worked = false;
        for (int pause = 0; pause < kSpinPauses; ++pause) {
            while (index < pool.helpers.load(std::memory_order_relaxed) && take_piece(pool)) {
                has_worked = true;
            }
            if (has_worked) break;
            _mm_pause();
        }
        if (has_worked) continue;
        pool.sleepers.fetch_add(1, std::memory_order_seq_cst);
        if (pool.jobs.load(std::memory_order_seq_cst) == seen) {
            syscall(SYS_futex, &pool.jobs, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
        }
        pool.sleepers.fetch_sub(1, std::memory_order_seq_cst);
    }
    return nullptr;
}

void grow(Pool& pool, int workers) {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    while (pool.workers < workers) {
        Worker* worker = new Worker{&pool, pool.workers};
        pthread_t thread;
        if (pthread_create(&thread, &attributes, work, worker) != 0) {  // at a limit: fewer do all the work
            delete worker;
            break;
        }
        ++pool.workers;
    }
    pthread_attr_destroy(&attributes);
}

void forget() { current.store(nullptr); }

Pool& pool_here() {
    Pool* pool = current.load(std::memory_order_acquire);
    if (pool) return *pool;
    static const int registered = pthread_atfork(nullptr, nullptr, forget);
    (void)registered;
    Pool* fresh = new Pool;
    if (current.compare_exchange_strong(pool, fresh)) return *fresh;
    delete fresh;
    return *pool;
}

}  // namespace

void run_pieces(Piece piece, void* context, int64_t count, int threads) {
    int helpers = threads - 1 < count - 1 ? threads - 1 : static_cast<int>(count - 1);
    helpers = helpers < kMostWorkers ? helpers : kMostWorkers;
    Pool* pool = helpers > 0 ? &pool_here() : nullptr;
    if (!pool || pool->is_busy.exchange(true, std::memory_order_acquire)) {
        for (int64_t index = 0; index < count; ++index) piece(context, index);
        return;
    }
    if (pool->workers < helpers) grow(*pool, helpers);
    pool->piece = piece;
    pool->context = context;
    pool->count = count;
    pool->done.store(0, std::memory_order_relaxed);
    pool->helpers.store(helpers, std::memory_order_relaxed);
    pool->left.store(count, std::memory_order_release);
    pool->jobs.fetch_add(1, std::memory_order_seq_cst);
    if (pool->sleepers.load(std::memory_order_seq_cst) > 0) {
        syscall(SYS_futex, &pool->jobs, FUTEX_WAKE_PRIVATE, helpers, nullptr, nullptr, 0);
    }
    while (take_piece(*pool)) {
    }
    for (int pause = 0; pool->done.load(std::memory_order_acquire) < count; ++pause) {
        if (pause < kSpinPauses) {
            _mm_pause();
        } else {
            sched_yield();  // a worker was taken off its core in the middle of a piece
        }
    }
    pool->is_busy.store(false, std::memory_order_release);
}

}  // namespace trireme
