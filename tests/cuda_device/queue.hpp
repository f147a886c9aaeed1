// The device: its memory, and the commands that streams and graphs hand to it.
//
// Device memory is an arena of host memory. Commands are nodes of a dependency graph; they are
// executed late, by the thread that waits for one of them, in an order that the schedule picks.
// What a kernel computes comes from Python, through the callback of device_init.
#pragma once
#include <cerrno>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace {

// The lock, and Python's.

int (*gil_check)() = nullptr;
void *(*gil_save)() = nullptr;
void (*gil_restore)(void *) = nullptr;

// Guards what the runtime knows. Nobody waits for Python's lock while he holds it, so a thread with
// Python's lock may wait for it and keeps that meanwhile: to give it up here would be to wait for
// it again, perhaps within the caching allocator's lock, which another thread with Python's lock
// may be waiting for. For the same reason no command of Python's runs under it.
std::recursive_mutex mutex;

struct Lock {
    Lock() { mutex.lock(); }
    ~Lock() { mutex.unlock(); }
};

void logf(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("[cuda_device] ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
}

// Commands.

enum Kind { NOP, MEMCPY, MEMSET, HOST, CALL };

int (*py_run)(uint64_t) = nullptr;

std::mutex released_mutex;
std::vector<uint64_t> released;  // Python fetches them

struct Call {  // what Python is asked to run; released with its last command
    uint64_t id;
    ~Call() {
        std::lock_guard<std::mutex> lock(released_mutex);
        released.push_back(id);
    }
};

struct Op {
    Kind kind = NOP;
    char *dst = nullptr;
    const char *src = nullptr;
    size_t n = 0, height = 1, dpitch = 0, spitch = 0;
    int value = 0;
    void (*fn)(void *) = nullptr;
    void *data = nullptr;
    std::shared_ptr<Call> call;
    std::shared_ptr<std::vector<char>> staged;
    std::string label;
};

struct Stream;
struct Node;
using NodeP = std::shared_ptr<Node>;

struct Node {
    uint64_t seq;
    Op op;
    int stream;
    bool done = false;
    double finished = 0;
    int waits_for = 0;
    std::vector<NodeP> deps;
    std::vector<Node *> dependents;
};

struct GraphNode {
    Op op;
    std::vector<GraphNode *> deps;
    int stream = 0;
};

struct UserObject {
    void *ptr;
    void (*destroy)(void *);
    long refs;
};

struct Graph {
    std::vector<std::unique_ptr<GraphNode>> nodes;
    std::map<UserObject *, long> objects;
    ~Graph();
};

struct Exec {
    std::vector<Op> ops;
    std::vector<std::vector<int>> deps;
    std::vector<int> streams;
    std::shared_ptr<Graph> keep;
    NodeP last;
};

struct Capture {
    uint64_t id;
    std::shared_ptr<Graph> graph;
    Stream *origin;
    cudaStreamCaptureMode mode;
    std::thread::id thread;
    bool invalid = false, over = false;
    std::string why;
};
using CaptureP = std::shared_ptr<Capture>;

struct Stream {
    int id = 0;
    unsigned flags = 0;
    int priority = 0;
    NodeP last;
    std::vector<NodeP> waits;
    CaptureP capture;
    std::vector<GraphNode *> at;  // what the next captured command depends on
};

struct Event {
    unsigned flags = 0;
    NodeP node;
    bool recorded = false;
    CaptureP capture;
    std::vector<GraphNode *> at;
    int queries = 0;
};

enum Mode { EAGER, LAZY, RANDOM, REVERSE };
Mode mode = LAZY;
std::mt19937_64 rng(0);
std::map<int, double> weights;
int picks = 0;
bool poison_host = true;

uint64_t next_seq = 1, next_capture = 1;
int next_stream = 1;
std::map<uint64_t, NodeP> pending;
std::set<uint64_t> ready;
bool had_choice = false;  // two commands could run at once, so their order was the schedule's
Stream legacy;
std::set<Stream *> streams;
std::set<CaptureP> captures;
std::map<cudaGraph_t, std::shared_ptr<Graph>> graphs;
bool running = false;  // at most one thread runs commands at a time
std::thread::id runner;
std::condition_variable_any idle;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
thread_local cudaError_t last_error = cudaSuccess;
cudaError_t sticky = cudaSuccess;
std::string sticky_why;
uint64_t executed = 0, violations = 0;

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

cudaError_t fail(cudaError_t code) {
    if (code != cudaSuccess && code != cudaErrorNotReady) last_error = code;
    if (code == cudaErrorNotReady) last_error = code;
    return code;
}

// Memory.

const uintptr_t ARENA = 0x100000000000, PINNED = 0x200000000000;
const size_t ARENA_SIZE = 64ull << 30, PINNED_SIZE = 32ull << 30, CLAIMED = 16ull << 30;

struct Pool {
    uintptr_t base;
    size_t size, used = 0;
    bool mapped = false;
    std::map<uintptr_t, size_t> live, free_;

    Pool(uintptr_t base, size_t size) : base(base), size(size) {}

    void map() {
        if (mapped) return;
        void *p = mmap((void *)base, size, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
        if (p != (void *)base) {
            fprintf(stderr, "cuda_device: cannot reserve %zu GB of address space: %s\n", size >> 30,
                    strerror(errno));
            _exit(3);
        }
        mapped = true;
        free_[base] = size;
    }
    void *alloc(size_t n) {
        map();
        size_t want = (std::max<size_t>(n, 1) + 4095) / 4096 * 4096;
        want += 4096;  // a guard between allocations
        for (auto it = free_.begin(); it != free_.end(); ++it)
            if (it->second >= want) {
                uintptr_t at = it->first;
                size_t rest = it->second - want;
                free_.erase(it);
                if (rest) free_[at + want] = rest;
                live[at] = n;
                used += n;
                memset((void *)at, 0xA5, std::min<size_t>(want, 64 << 20));
                return (void *)at;
            }
        return nullptr;
    }
    bool release(void *p) {
        auto it = live.find((uintptr_t)p);
        if (it == live.end()) return false;
        size_t want = (std::max<size_t>(it->second, 1) + 4095) / 4096 * 4096 + 4096;
        used -= it->second;
        uintptr_t at = it->first;
        live.erase(it);
        madvise((void *)at, want, MADV_DONTNEED);
        memset((void *)at, 0xA5, std::min<size_t>(want, 4 << 20));
        free_[at] = want;  // merged with its neighbours
        auto f = free_.find(at);
        auto next = std::next(f);
        if (next != free_.end() && f->first + f->second == next->first) {
            f->second += next->second;
            free_.erase(next);
        }
        if (f != free_.begin()) {
            auto before = std::prev(f);
            if (before->first + before->second == f->first) {
                before->second += f->second;
                free_.erase(f);
            }
        }
        return true;
    }
    std::map<uintptr_t, size_t>::iterator find(const void *p) {
        auto it = live.upper_bound((uintptr_t)p);
        if (it == live.begin()) return live.end();
        --it;
        return (uintptr_t)p < it->first + std::max<size_t>(it->second, 1) ? it : live.end();
    }
};

Pool device_pool(ARENA, ARENA_SIZE), host_pool(PINNED, PINNED_SIZE);
std::map<uintptr_t, size_t> registered;  // cudaHostRegister
uint64_t generation = 1;

bool is_device(const void *p) { return (uintptr_t)p >= ARENA && (uintptr_t)p < ARENA + ARENA_SIZE; }
bool is_pinned(const void *p) {
    if ((uintptr_t)p >= PINNED && (uintptr_t)p < PINNED + PINNED_SIZE) return true;
    auto it = registered.upper_bound((uintptr_t)p);
    if (it == registered.begin()) return false;
    --it;
    return (uintptr_t)p < it->first + it->second;
}

// Memory that was freed while commands were queued: CUDA waits for them, here it stays until they
// are done.
struct Zombie {
    Pool *pool;
    void *p;
    uint64_t last;
};
std::vector<Zombie> zombies;

void bury() {
    uint64_t oldest = pending.empty() ? UINT64_MAX : pending.begin()->first;
    for (size_t i = 0; i < zombies.size();)
        if (zombies[i].last < oldest) {
            zombies[i].pool->release(zombies[i].p);
            ++generation;
            zombies[i] = zombies.back();
            zombies.pop_back();
        } else ++i;
}

cudaError_t free_in(Pool &pool, void *p) {
    for (auto &z : zombies)
        if (z.p == p) return cudaErrorInvalidValue;
    if (!pool.live.count((uintptr_t)p)) return cudaErrorInvalidValue;
    zombies.push_back({&pool, p, next_seq - 1});
    bury();
    return cudaSuccess;
}

// Execution.

void make_ready(const Node *node) {
    ready.insert(node->seq);
    had_choice |= ready.size() > 1;
}

void run(const NodeP &node) {
    Op &op = node->op;
    switch (op.kind) {
    case NOP: break;
    case MEMCPY: {
        const char *src = op.staged ? op.staged->data() : op.src;
        for (size_t row = 0; row < op.height; ++row)
            memmove(op.dst + row * op.dpitch, src + row * op.spitch, op.n);
        break;
    }
    case MEMSET:
        for (size_t row = 0; row < op.height; ++row)
            memset(op.dst + row * op.dpitch, op.value, op.n);
        break;
    case HOST:
        mutex.unlock();
        op.fn(op.data);
        mutex.lock();
        break;
    case CALL:
        if (sticky == cudaSuccess && py_run) {
            mutex.unlock();
            int code = py_run(op.call->id);
            mutex.lock();
            if (code != 0 && sticky == cudaSuccess) {
                sticky = cudaErrorLaunchFailure;
                sticky_why = op.label;
            }
        }
        break;
    }
    ++executed;
    node->done = true;
    node->finished = now();
    pending.erase(node->seq);
    ready.erase(node->seq);
    for (Node *d : node->dependents)
        if (--d->waits_for == 0) make_ready(d);
    node->dependents.clear();
    node->deps.clear();
    node->op = Op{};
    if (!zombies.empty()) bury();
}

// Becomes the thread that runs commands. Not within a command; if another thread is at it, waits or
// not.
bool begin_running(bool wait) {
    auto me = std::this_thread::get_id();
    if (running && runner == me) return false;
    while (running) {
        if (!wait) return false;
        void *state = gil_check && gil_check() ? gil_save() : nullptr;
        idle.wait(mutex, [] { return !running; });
        mutex.unlock();
        if (state) gil_restore(state);
        mutex.lock();
    }
    running = true;
    runner = me;
    return true;
}

void end_running() {
    running = false;
    idle.notify_all();
}

uint64_t random_ready() {
    if (picks++ % 48 == 0) weights.clear();
    std::vector<double> w;
    std::vector<uint64_t> seqs(ready.begin(), ready.end());
    double total = 0;
    for (uint64_t s : seqs) {
        int stream = pending[s]->stream;
        auto it = weights.find(stream);
        if (it == weights.end()) {
            double u = std::uniform_real_distribution<>(-4, 4)(rng);
            it = weights.emplace(stream, std::exp(u)).first;
        }
        total += it->second;
        w.push_back(total);
    }
    double x = std::uniform_real_distribution<>(0, total)(rng);
    size_t i = std::lower_bound(w.begin(), w.end(), x) - w.begin();
    return seqs[std::min(i, seqs.size() - 1)];
}

std::vector<NodeP> ancestors(const NodeP &target) {
    std::vector<NodeP> found{target};
    std::unordered_set<Node *> seen{target.get()};
    for (size_t i = 0; i < found.size(); ++i)
        for (auto &d : std::vector<NodeP>(found[i]->deps))
            if (!d->done && seen.insert(d.get()).second) found.push_back(d);
    std::sort(found.begin(), found.end(), [](auto &a, auto &b) { return a->seq < b->seq; });
    return found;
}

// What a target needs, each time the newest command that can run: whoever has not waited comes
// last.
void run_newest(const NodeP &target, int limit) {
    std::unordered_set<Node *> wanted;
    std::set<uint64_t> can;
    for (auto &node : ancestors(target)) {
        wanted.insert(node.get());
        if (!node->waits_for) can.insert(node->seq);
    }
    for (; !target->done && !can.empty() && limit != 0; --limit) {
        uint64_t seq = *can.rbegin();
        can.erase(seq);
        NodeP node = pending[seq];
        std::vector<Node *> after = node->dependents;
        run(node);
        for (Node *d : after)
            if (!d->waits_for && wanted.count(d)) can.insert(d->seq);
    }
}

void run_some(const NodeP &target, int n) {  // a few steps towards it; all of them if n < 0
    if (!target || target->done || !begin_running(n < 0)) return;
    if (mode == RANDOM)
        for (; n != 0 && !target->done; --n) {
            NodeP node = pending[random_ready()];
            run(node);
        }
    else if (mode == REVERSE) run_newest(target, n);
    else
        for (auto &node : ancestors(target)) {
            if (n-- == 0) break;
            if (!node->done) run(node);
        }
    end_running();
}

void run_until(const NodeP &target) { run_some(target, -1); }

void run_all() {
    if (!begin_running(true)) return;
    while (!ready.empty()) {
        NodeP node = pending[mode == RANDOM    ? random_ready()
                             : mode == REVERSE ? *ready.rbegin()
                                               : *ready.begin()];
        run(node);
    }
    end_running();
}

void now_and_then() {  // at any call, if the schedule likes
    if (mode == EAGER) run_all();
    if (mode != RANDOM || ready.empty() || !begin_running(false)) return;
    while (!ready.empty() && rng() % 3 == 0) {
        NodeP node = pending[random_ready()];
        run(node);
    }
    end_running();
}

// Whether a call comes from PyTorch's allocators, which hold their locks meanwhile: then nothing
// may run.
bool from_an_allocator(void *caller) {
    static std::map<void *, bool> known;
    auto it = known.find(caller);
    if (it != known.end()) return it->second;
    Dl_info info{};
    bool is = dladdr(caller, &info) && info.dli_fname &&
              (strstr(info.dli_fname, "libc10_cuda") || strstr(info.dli_fname, "libtorch_cuda"));
    return known[caller] = is;
}

NodeP add_node(Op op, int stream, std::vector<NodeP> deps) {
    auto node = std::make_shared<Node>();
    node->seq = next_seq++;
    node->op = std::move(op);
    node->stream = stream;
    std::sort(deps.begin(), deps.end());
    deps.erase(std::unique(deps.begin(), deps.end()), deps.end());
    for (auto &d : deps)
        if (d && !d->done) {
            node->deps.push_back(d);
            d->dependents.push_back(node.get());
            ++node->waits_for;
        }
    pending[node->seq] = node;
    if (!node->waits_for) make_ready(node.get());
    return node;
}

Stream *stream_of(cudaStream_t s) {
    if (s == nullptr || s == cudaStreamLegacy || s == cudaStreamPerThread) return &legacy;
    return (Stream *)s;
}

NodeP push_raw(Stream *s, Op op) {
    std::vector<NodeP> deps;
    if (s->last) deps.push_back(s->last);
    deps.insert(deps.end(), s->waits.begin(), s->waits.end());
    if (s == &legacy) {
        for (Stream *other : streams)
            if (!(other->flags & cudaStreamNonBlocking) && other->last) deps.push_back(other->last);
    } else if (!(s->flags & cudaStreamNonBlocking) && legacy.last) deps.push_back(legacy.last);
    s->waits.clear();
    s->last = add_node(std::move(op), s->id, std::move(deps));
    return s->last;
}

void invalidate(const CaptureP &c, const char *why) {
    if (!c->invalid) {
        c->invalid = true;
        c->why = why;
        ++violations;
        logf("capture invalidated: %s", why);
    }
}

// Calls that CUDA forbids while a stream is captured, unless the thread has said otherwise.
cudaError_t unsafe(const char *name) {
    bool bad = false;
    for (auto &c : captures) {
        bool mine = c->thread == std::this_thread::get_id();
        bool hit = thread_mode == cudaStreamCaptureModeGlobal
                       ? (c->mode == cudaStreamCaptureModeGlobal ||
                          (mine && c->mode == cudaStreamCaptureModeThreadLocal))
                   : thread_mode == cudaStreamCaptureModeThreadLocal
                       ? (mine && c->mode != cudaStreamCaptureModeRelaxed)
                       : false;
        if (hit) {
            invalidate(c, name);
            bad = true;
        }
    }
    return bad ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

// A command onto a stream, or into the graph that it is captured in.
cudaError_t push(Stream *s, Op op, NodeP *out = nullptr) {
    if (sticky != cudaSuccess) return sticky;
    if (s == &legacy) {
        for (auto &c : captures)
            if (c->mode != cudaStreamCaptureModeRelaxed &&
                !(c->origin->flags & cudaStreamNonBlocking)) {
                invalidate(c, "the legacy stream was used while another one is captured");
                return cudaErrorStreamCaptureImplicit;
            }
    }
    if (s->capture) {
        if (s->capture->invalid) return cudaErrorStreamCaptureInvalidated;
        auto node = std::make_unique<GraphNode>();
        node->op = std::move(op);
        node->deps = s->at;
        node->stream = s->id;
        s->at = {node.get()};
        s->capture->graph->nodes.push_back(std::move(node));
        return cudaSuccess;
    }
    NodeP node = push_raw(s, std::move(op));
    if (out) *out = node;
    return cudaSuccess;
}

Graph::~Graph() {
    for (auto &[object, count] : objects)
        if ((object->refs -= count) <= 0) {
            if (object->destroy) object->destroy(object->ptr);
            delete object;
        }
}

}  // namespace
