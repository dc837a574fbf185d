// How fast this machine's threads read memory: bandwidth THREADS MEBIBYTES PASSES
//
// Prints the bytes per second of the fastest pass. Each thread sums its own contiguous share, as a
// decode step reads its weights; the sums are printed so that no read can be left out.

#include <sys/mman.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

// 32 sums that do not wait for each other: the compiler makes vectors of them.
uint64_t sum(const uint64_t* words, size_t count) {
    uint64_t sums[32] = {};
    for (size_t i = 0; i + 32 <= count; i += 32)
        for (size_t lane = 0; lane < 32; ++lane) sums[lane] += words[i + lane];
    uint64_t total = 0;
    for (uint64_t part : sums) total += part;
    return total;
}

double read_all(const uint64_t* words, size_t count, int threads, uint64_t* total) {
    std::vector<std::thread> readers;
    std::vector<uint64_t> sums(threads);
    const size_t share = count / threads;
    const auto started = Clock::now();
    for (int t = 0; t < threads; ++t)
        readers.emplace_back([=, &sums] { sums[t] = sum(words + t * share, share); });
    for (std::thread& reader : readers) reader.join();
    const double seconds = std::chrono::duration<double>(Clock::now() - started).count();
    for (uint64_t part : sums) *total += part;
    return static_cast<double>(share * threads * sizeof(uint64_t)) / seconds;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 4) return 2;
    const int threads = std::atoi(argv[1]);
    const size_t bytes = static_cast<size_t>(std::atoll(argv[2])) << 20;
    const int passes = std::atoi(argv[3]);
    if (threads < 1 || bytes == 0 || passes < 1) return 2;
    void* memory =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return 1;
#ifdef MADV_HUGEPAGE
    madvise(memory, bytes, MADV_HUGEPAGE);  // as the weights lie
#endif
    std::memset(memory, 1, bytes);
    double best = 0;
    uint64_t total = 0;
    for (int pass = 0; pass < passes; ++pass) {
        const double rate = read_all(static_cast<uint64_t*>(memory), bytes / 8, threads, &total);
        if (rate > best) best = rate;
    }
    std::printf("%.0f %llu\n", best, static_cast<unsigned long long>(total));
    return 0;
}
