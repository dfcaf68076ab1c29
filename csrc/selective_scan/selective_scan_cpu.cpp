// Contract: ultra_kernels/selective_scan/op.py
//
// A vector holds neighbouring channels; the state index and time run in loops. Time is cut into segments of at most
// kScanSegment steps within one sequence, and a direction is only a sign: row i of a tile is the i-th step *read*. The
// forward pass saves the state at each segment's start, from which the backward pass recomputes the segment.
// With `shift` the scan's result of step i belongs to the output of step i + 1: tiles of outputs have one row more.
#include "selective_scan/selective_scan.h"

#include "common/gates.h"
#include "common/parallel.h"
#include "common/simd.h"

namespace ultra {
namespace ULTRA_ISA {

constexpr float kLog2E = 1.44269504088896f, kLn2 = 0.693147180559945f;
constexpr int64_t kVectors = kScanBlock / kLanes;
constexpr int64_t kTile = (kScanSegment + 1) * kLanes;  // rows of one vector of channels
constexpr int64_t kTiles = kVectors * kTile;            // of a block: one after the other
// States per pass over a segment: their decay rates, states and adjoints stay in registers.
constexpr int kForwardStates = 8;
constexpr int kBackwardStates = 4;

static int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t longest(const ScanProblem& p) {
    if (!p.borders) return p.length;
    int64_t most = 0;
    for (int64_t s = 0; s < p.sequences; ++s)
        if (p.borders[s + 1] - p.borders[s] > most) most = p.borders[s + 1] - p.borders[s];
    return most;
}

struct Sequence {
    int64_t begin, length, slot;  // slot: of its first saved state
};

// A segment as read by one direction: step i is at position t + i * step.
struct Segment {
    int64_t begin, rows, t;
    int step;

    Segment(const Sequence& s, int64_t index, bool reverse) {
        begin = index * kScanSegment;
        rows = min_of(kScanSegment, s.length - begin);
        step = reverse ? -1 : 1;
        t = reverse ? s.begin + s.length - 1 - begin : s.begin + begin;
    }
};

// One task: a batch row and a block of channels of one group.
struct Block {
    int64_t b, group, part, first, last;  // channels [first, last)

    Block(const ScanProblem& p, int64_t task) {
        int64_t parts = scan_blocks(p.channels, p.groups), size = p.channels / p.groups;
        part = task % parts;
        group = task / parts % p.groups;
        b = task / parts / p.groups;
        first = group * size + part * kScanBlock;
        last = min_of(first + kScanBlock, (group + 1) * size);
    }
    int64_t vectors() const { return (last - first + kLanes - 1) / kLanes; }
    int64_t lanes(int64_t v) const { return min_of(kLanes, last - first - v * kLanes); }

    // Whole rows at a time, vector after vector: a page of memory is then visited once.
    void load(float* tiles, const View& from, const Segment& s, int64_t rows) const {
        load_tile(Tile{tiles, kLanes, kTile}, from, b, first, s.t, s.step, last - first, vectors() * kLanes, rows);
    }
    void store(const float* tiles, const View& to, const Segment& s) const {
        store_tile(Tile{(float*)tiles, kLanes, kTile}, to, b, first, s.t, s.step, last - first, s.rows);
    }
};

// Calls body(index, Sequence) for the sequences of one batch row, in order.
template <typename Body> static void for_sequences(const ScanProblem& p, const Body& body) {
    int64_t slot = 0;
    for (int64_t s = 0; s < (p.borders ? p.sequences : 1); ++s) {
        int64_t begin = p.borders ? p.borders[s] : 0;
        int64_t length = (p.borders ? p.borders[s + 1] : p.length) - begin;
        body(s, Sequence{begin, length, slot});
        slot += (length + kScanSegment - 1) / kScanSegment;
    }
}

static const float* row(const ScanRows& m, int64_t dir, const Block& block, int64_t t) {
    return m.data + dir * m.direction + block.b * m.batch + block.group * m.group + t * m.time;
}

static float* saved(const ScanProblem& p, int64_t dir, int64_t b, int64_t slot, int64_t n, int64_t d) {
    return p.states_saved + (((dir * p.batch + b) * p.slots + slot) * p.states + n) * p.channels + d;
}

static vf load_lanes(const float* p, int64_t lanes) { return lanes == kLanes ? load(p) : load_part(p, (int)lanes); }
static void store_lanes(float* p, vf v, int64_t lanes) {
    if (lanes == kLanes) store(p, v);
    else store_part(p, v, (int)lanes);
}

static void fill(float* p, int64_t n, float value) {
    for (int64_t i = 0; i < n; ++i) p[i] = value;
}

// rates[v][n][lane] = A[d][n] * log2(e): the decay of a step is 2^(dt * rate). largest[v][lane] bounds their magnitude.
static void load_rates(const ScanProblem& p, int64_t dir, const Block& block, float* rates, float* largest) {
    fill(rates, kScanBlock * p.states, 0.0f);
    for (int64_t d = block.first; d < block.last; ++d) {
        int64_t v = (d - block.first) / kLanes, lane = (d - block.first) % kLanes;
        for (int64_t n = 0; n < p.states; ++n)
            rates[(v * p.states + n) * kLanes + lane] = kLog2E * p.A[(dir * p.channels + d) * p.states + n];
    }
    for (int64_t v = 0; v < kVectors; ++v) {
        vf most = splat(0.0f);
        for (int64_t n = 0; n < p.states; ++n) most = max(abs(load(rates + (v * p.states + n) * kLanes)), most);
        store(largest + v * kLanes, most);
    }
}

// Turns delta into dt in place, and writes dt * u; slope, where asked for, is d dt / d delta. Returns the largest |dt|.
template <bool is_softplus>
static inline vf make_steps(vf bias, int64_t rows, const float* u, float* dt, float* dtu, float* slope) {
    vf most = splat(0.0f);
    for (int64_t i = 0; i < rows * kLanes; i += kLanes) {
        vf x = load(dt + i) + bias, step = x;
        if (is_softplus) {
            vf q = exp_minus(abs(x));
            step = softplus(x, q);
            if (slope) store(slope + i, sigmoid(x, q));
        } else if (slope) {
            store(slope + i, splat(1.0f));
        }
        store(dt + i, step);
        store(dtu + i, step * load(u + i));
        most = max(abs(step), most);
    }
    return most;
}

static vf make_steps(const ScanProblem& p, int64_t dir, int64_t d, int64_t lanes, int64_t rows, const float* u,
                     float* dt, float* dtu, float* slope) {
    const vf bias = p.delta_bias ? load_lanes(p.delta_bias + dir * p.channels + d, lanes) : splat(0.0f);
    return p.softplus ? make_steps<true>(bias, rows, u, dt, dtu, slope)
                      : make_steps<false>(bias, rows, u, dt, dtu, slope);
}

// Whether dt * rate stays where exp2 needs no clamping; no for NaN.
static bool bounded(vf dt, vf rate) {
    vf x = dt * rate;
    for (int i = 0; i < kLanes; ++i)
        if (!(x[i] <= 126.0f)) return false;
    return true;
}

static View of_direction(View v, int64_t dir, int64_t stride) {
    v.data += dir * stride * (v.dtype == kFloat32 ? 4 : 2);
    return v;
}

// ---- forward --------------------------------------------------------------------------------------------------------
// Steps `states` states of one vector of channels through a segment; y += C . h. B, C: rows of this chunk's states.
template <int states, bool bounded>
static inline void advance(int64_t rows, const float* dt, const float* dtu, const float* B, const float* C,
                           int64_t B_step, int64_t C_step, const float* rates, float* state, float* y) {
    vf rate[states], h[states];
    for (int k = 0; k < states; ++k) {
        rate[k] = load(rates + k * kLanes);
        h[k] = load(state + k * kLanes);
    }
    for (int64_t i = 0; i < rows; ++i, B += B_step, C += C_step) {
        vf step = load(dt + i * kLanes), input = load(dtu + i * kLanes), sum = load(y + i * kLanes);
        for (int k = 0; k < states; ++k) {
            const vf x = step * rate[k];
            h[k] = (bounded ? exp2_bounded(x) : exp2(x)) * h[k] + input * B[k];
            sum += h[k] * C[k];
        }
        store(y + i * kLanes, sum);
    }
    for (int k = 0; k < states; ++k) store(state + k * kLanes, h[k]);
}

template <bool bounded>
static void advance_all(int64_t N, int64_t rows, const float* dt, const float* dtu, const float* B, const float* C,
                        int64_t B_step, int64_t C_step, const float* rates, float* state, float* y) {
    int64_t n = 0;
    for (; n + kForwardStates <= N; n += kForwardStates)
        advance<kForwardStates, bounded>(rows, dt, dtu, B + n, C + n, B_step, C_step, rates + n * kLanes,
                                         state + n * kLanes, y);
    for (; n < N; ++n)
        advance<1, bounded>(rows, dt, dtu, B + n, C + n, B_step, C_step, rates + n * kLanes, state + n * kLanes, y);
}

int64_t scan_forward_scratch(const ScanProblem& p) {
    return 4 * kTiles + kTile + 2 * kScanBlock * p.states + 2 * kScanBlock +
           (p.directions == 2 ? longest(p) * kScanBlock : 0);
}

void scan_forward(const ScanProblem& p, const View& out, float* last, float* scratch, int threads) {
    const int64_t N = p.states, tasks = p.batch * p.groups * scan_blocks(p.channels, p.groups);
    const int64_t per_thread = scan_forward_scratch(p);
    parallel_for(tasks, threads, [&](int64_t task) {
        const Block block(p, task);
        float* us = scratch + thread_index() * per_thread;
        float* dts = us + kTiles;
        float* zs = dts + kTiles;
        float* ys = zs + kTiles;
        float* dtu = ys + kTiles;
        float* rates = dtu + kTile;
        float* state = rates + kScanBlock * N;  // [v][n][lane]
        float* carry = state + kScanBlock * N;  // [v][lane]: the result of the last step of the segment before
        float* largest = carry + kScanBlock;    // [v][lane]: of the rates
        float* sum = largest + kScanBlock;      // [position in the sequence][v][lane]: what direction 0 found

        int64_t slots_used = 0;
        for_sequences(p, [&](int64_t index, const Sequence& s) {
            slots_used = s.slot + (s.length + kScanSegment - 1) / kScanSegment;
            for (int64_t dir = 0; dir < p.directions; ++dir) {
                const View delta = of_direction(p.delta, dir, p.delta_direction);
                const bool final_pass = dir == p.directions - 1;
                load_rates(p, dir, block, rates, largest);
                fill(state, kScanBlock * N, 0.0f);
                fill(carry, kScanBlock, 0.0f);
                for (int64_t k = 0; k * kScanSegment < s.length; ++k) {
                    const Segment seg(s, k, p.reverse || dir == 1);
                    const float* B = row(p.B, dir, block, seg.t);
                    const float* C = row(p.C, dir, block, seg.t);
                    const int64_t B_step = seg.step * p.B.time, C_step = seg.step * p.C.time;
                    const int64_t rest = s.length - seg.begin - seg.rows, next = min_of(rest, kScanSegment);
                    const bool gated = final_pass && p.z.data;
                    block.load(us, p.u, seg, seg.rows);
                    block.load(dts, delta, seg, seg.rows);
                    if (gated) block.load(zs, p.z, seg, seg.rows);
                    for (int64_t v = 0; v < block.vectors(); ++v) {
                        const int64_t d = block.first + v * kLanes, lanes = block.lanes(v);
                        const int64_t ahead = seg.t + seg.step * kScanSegment;
                        prefetch(p.u, block.b, d, ahead, seg.step, next);
                        prefetch(delta, block.b, d, ahead, seg.step, next);
                        if (gated) prefetch(p.z, block.b, d, ahead, seg.step, next);
                        float *u = us + v * kTile, *dt = dts + v * kTile, *y = ys + v * kTile;
                        float* h = state + v * N * kLanes;
                        const float* rate = rates + v * N * kLanes;
                        for (int64_t n = 0; n < N; ++n)
                            store_lanes(saved(p, dir, block.b, s.slot + k, n, d), load(h + n * kLanes), lanes);
                        const vf most = make_steps(p, dir, d, lanes, seg.rows, u, dt, dtu, nullptr);

                        fill(y, (seg.rows + 1) * kLanes, 0.0f);
                        if (p.shift) store(y, load(carry + v * kLanes));
                        float* results = y + (p.shift ? kLanes : 0);
                        (bounded(most, load(largest + v * kLanes)) ? advance_all<true> : advance_all<false>)(
                            N, seg.rows, dt, dtu, B, C, B_step, C_step, rate, h, results);
                        store(carry + v * kLanes, load(y + seg.rows * kLanes));

                        float* at = sum + ((seg.t - s.begin) * kVectors + v) * kLanes;
                        const int64_t at_step = seg.step * kScanBlock;
                        if (!final_pass) {
                            for (int64_t i = 0; i < seg.rows; ++i) store(at + i * at_step, load(y + i * kLanes));
                            continue;
                        }
                        const vf skip = p.D ? load_lanes(p.D + d, lanes) : splat(0.0f);
                        for (int64_t i = 0; i < seg.rows; ++i) {
                            vf total = load(y + i * kLanes) + skip * load(u + i * kLanes);
                            if (p.directions == 2) total += load(at + i * at_step);
                            if (gated) {
                                vf z = load(zs + v * kTile + i * kLanes);
                                total *= z * sigmoid(z);
                            }
                            store(y + i * kLanes, total);
                        }
                    }
                    if (final_pass) block.store(ys, out, seg);
                }
                if (last)
                    for (int64_t d = block.first; d < block.last; ++d) {
                        int64_t v = (d - block.first) / kLanes, lane = (d - block.first) % kLanes;
                        float* to = last + ((p.borders ? index : block.b) * p.channels + d) * N;
                        for (int64_t n = 0; n < N; ++n) to[n] = state[(v * N + n) * kLanes + lane];
                    }
            }
        });
        for (int64_t dir = 0; dir < p.directions; ++dir)  // outputs are the same bits every time
            for (int64_t slot = slots_used; slot < p.slots; ++slot)
                for (int64_t n = 0; n < N; ++n)
                    fill(saved(p, dir, block.b, slot, n, block.first), block.last - block.first, 0.0f);
    });
}

// ---- backward -------------------------------------------------------------------------------------------------------
typedef float v4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));
#if defined(__clang__)
#define ULTRA_SHUFFLE4(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define ULTRA_SHUFFLE4(a, b, i, j, k, l) __builtin_shuffle(a, b, i4{i, j, k, l})
#endif

// The sums of the lanes of a, b, c and d: halves are added until one vector holds parts of all four.
static inline v4 sum_lanes(vf a, vf b, vf c, vf d) {
#if defined(__AVX512F__)
    const auto both = [](vf x, vf y) {
        return _mm512_add_ps(_mm512_unpacklo_ps((__m512)x, (__m512)y), _mm512_unpackhi_ps((__m512)x, (__m512)y));
    };
    const __m512d ab = _mm512_castps_pd(both(a, b)), cd = _mm512_castps_pd(both(c, d));
    const __m512 s = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                                   _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    const __m256 t = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
    return (v4)_mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
#elif defined(__AVX2__)
    const auto both = [](vf x, vf y) {
        return _mm256_add_ps(_mm256_unpacklo_ps((__m256)x, (__m256)y), _mm256_unpackhi_ps((__m256)x, (__m256)y));
    };
    const __m256d ab = _mm256_castps_pd(both(a, b)), cd = _mm256_castps_pd(both(c, d));
    const __m256 s = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)),
                                   _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
    return (v4)_mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
#else
    const v4 ab = ULTRA_SHUFFLE4(a, b, 0, 4, 1, 5) + ULTRA_SHUFFLE4(a, b, 2, 6, 3, 7);
    const v4 cd = ULTRA_SHUFFLE4(c, d, 0, 4, 1, 5) + ULTRA_SHUFFLE4(c, d, 2, 6, 3, 7);
    return ULTRA_SHUFFLE4(ab, cd, 0, 1, 4, 5) + ULTRA_SHUFFLE4(ab, cd, 2, 3, 6, 7);
#endif
}

// to[k] += the sum of the lanes of v[k].
template <int count> static inline void add_sums(float* to, const vf* v) {
    static_assert(count == 1 || count == 4, "");
    if (count == 1) {
        to[0] += sum(v[0]);
        return;
    }
    v4 total;
    memcpy(&total, to, sizeof total);
    total += sum_lanes(v[0], v[count / 4], v[count / 2], v[count - 1]);
    memcpy(to, &total, sizeof total);
}

// What one vector of channels brings to the reverse pass over a segment, one row per step.
struct Steps {
    int64_t rows;
    const float *dt, *dtu;
    const float* dresult;     // adjoint of C . h
    const float *B, *C;
    int64_t B_step, C_step;
    float *from_decay, *from_input;  // sums over states of (rate a h dh) and (B dh)
    float* result;            // C . h, or null where nobody needs it
    float *dB, *dC;           // [step][n], added to
    int64_t stride;           // of dB and dC: N
};

// Recomputes the states of a segment from the one at its start, then runs the adjoints back through it.
// dstate: adjoint of the state after the segment, on return of the one before it. dA is added to.
template <int states, bool with_result, bool bounded>
static inline void reverse(const Steps& s, const float* rates, const float* start, float* dstate, float* dA,
                           float* decays, float* history) {
    vf rate[states], h[states];
    for (int k = 0; k < states; ++k) {
        rate[k] = load(rates + k * kLanes);
        h[k] = load(start + k * kLanes);
        store(history + k * kLanes, h[k]);
    }
    for (int64_t i = 0; i < s.rows; ++i) {
        const float* B = s.B + i * s.B_step;
        const float* C = s.C + i * s.C_step;
        vf step = load(s.dt + i * kLanes), input = load(s.dtu + i * kLanes);
        vf sum = with_result ? load(s.result + i * kLanes) : splat(0.0f);
        for (int k = 0; k < states; ++k) {
            const vf x = step * rate[k], a = bounded ? exp2_bounded(x) : exp2(x);
            h[k] = a * h[k] + input * B[k];
            store(decays + (i * states + k) * kLanes, a);
            store(history + ((i + 1) * states + k) * kLanes, h[k]);
            if (with_result) sum += h[k] * C[k];
        }
        if (with_result) store(s.result + i * kLanes, sum);
    }
    vf g[states], da[states];
    for (int k = 0; k < states; ++k) {
        g[k] = load(dstate + k * kLanes);
        da[k] = load(dA + k * kLanes);
    }
    for (int64_t i = s.rows - 1; i >= 0; --i) {
        const float* B = s.B + i * s.B_step;
        const float* C = s.C + i * s.C_step;
        vf step = load(s.dt + i * kLanes), input = load(s.dtu + i * kLanes), dy = load(s.dresult + i * kLanes);
        vf from_decay = load(s.from_decay + i * kLanes), from_input = load(s.from_input + i * kLanes);
        vf part[states];
        for (int k = 0; k < states; ++k) part[k] = dy * load(history + ((i + 1) * states + k) * kLanes);
        add_sums<states>(s.dC + i * s.stride, part);
        for (int k = 0; k < states; ++k) {
            vf before = load(history + (i * states + k) * kLanes);
            vf dh = g[k] + dy * C[k];
            part[k] = dh * input;
            g[k] = dh * load(decays + (i * states + k) * kLanes);
            vf w = g[k] * before;
            da[k] += step * w;
            from_decay += rate[k] * w;
            from_input += dh * B[k];
        }
        add_sums<states>(s.dB + i * s.stride, part);
        store(s.from_decay + i * kLanes, from_decay);
        store(s.from_input + i * kLanes, from_input);
    }
    for (int k = 0; k < states; ++k) {
        store(dstate + k * kLanes, g[k]);
        store(dA + k * kLanes, da[k]);
    }
}

template <int states, bool with_result, bool bounded>
static inline void reverse_at(Steps s, int64_t n, const float* rates, const float* start, float* dstate, float* dA,
                              float* decays, float* history) {
    const int64_t at = n * kLanes;
    s.B += n;
    s.C += n;
    s.dB += n;
    s.dC += n;
    reverse<states, with_result, bounded>(s, rates + at, start + at, dstate + at, dA + at, decays, history);
}

template <bool with_result, bool bounded>
static void reverse_all(int64_t N, const Steps& s, const float* rates, const float* start, float* dstate, float* dA,
                        float* decays, float* history) {
    int64_t n = 0;
    for (; n + kBackwardStates <= N; n += kBackwardStates)
        reverse_at<kBackwardStates, with_result, bounded>(s, n, rates, start, dstate, dA, decays, history);
    for (; n < N; ++n) reverse_at<1, with_result, bounded>(s, n, rates, start, dstate, dA, decays, history);
}

// target[i] = the sum of parts[j * n + i] over j, in order.
static void sum_parts(float* target, const float* parts, int64_t n, int64_t count, int threads) {
    constexpr int64_t chunk = 4096;
    parallel_for((n + chunk - 1) / chunk, threads, [&](int64_t task) {
        const int64_t begin = task * chunk, end = min_of(begin + chunk, n);
        for (int64_t i = begin; i < end; ++i) target[i] = parts[i];
        for (int64_t j = 1; j < count; ++j)
            for (int64_t i = begin; i < end; ++i) target[i] += parts[j * n + i];
    });
}

int64_t scan_backward_scratch(const ScanProblem& p) {
    return 7 * kTiles + 4 * kTile + (2 * kTile + kLanes) * kBackwardStates + p.states * kLanes +
           (1 + 2 * p.directions) * kScanBlock * p.states + (1 + 2 * p.directions) * kScanBlock +
           2 * kScanSegment * p.states + (p.directions == 2 ? 2 * longest(p) * kScanBlock : 0);
}

void scan_backward(const ScanProblem& p, const ScanGradients& g, float* scratch, int threads) {
    const int64_t N = p.states, parts = scan_blocks(p.channels, p.groups), tasks = p.batch * p.groups * parts;
    const int64_t per_thread = scan_backward_scratch(p);
    const int64_t rows_size = p.directions * p.batch * p.groups * p.length * N;  // of dB and dC
    parallel_for(tasks, threads, [&](int64_t task) {
        const Block block(p, task);
        float* next = scratch + thread_index() * per_thread;
        auto take = [&](int64_t n) { float* at = next; next += n; return at; };
        float *us = take(kTiles), *dts = take(kTiles), *douts = take(kTiles), *zs = take(kTiles);
        float *dus = take(kTiles), *ddeltas = take(kTiles), *ys = take(kTiles);
        float *dtu = take(kTile), *dy = take(kTile), *open = take(kTile), *from_decay = take(kTile);
        float *decays = take(kTile * kBackwardStates), *history = take((kTile + kLanes) * kBackwardStates);
        float* start = take(N * kLanes);
        float* dstate = take(kScanBlock * N);
        float* rates = take(p.directions * kScanBlock * N);
        float* dA = take(p.directions * kScanBlock * N);  // like rates [dir][v][n][lane]
        float* largest = take(p.directions * kScanBlock);
        float *dD = take(kScanBlock), *dbias = take(p.directions * kScanBlock);
        float *dB = take(kScanSegment * N), *dC = take(kScanSegment * N);
        float* du_sum = next;  // [position in the sequence][v][lane], as y_sum: what direction 0 found
        float* y_sum = du_sum + (p.directions == 2 ? longest(p) * kScanBlock : 0);

        for (int64_t dir = 0; dir < p.directions; ++dir)
            load_rates(p, dir, block, rates + dir * kScanBlock * N, largest + dir * kScanBlock);
        fill(dA, p.directions * kScanBlock * N, 0.0f);
        fill(dD, kScanBlock, 0.0f);
        fill(dbias, p.directions * kScanBlock, 0.0f);

        for_sequences(p, [&](int64_t index, const Sequence& s) {
            for (int64_t dir = 0; dir < p.directions; ++dir) {
                const View delta = of_direction(p.delta, dir, p.delta_direction);
                const View ddelta = of_direction(g.ddelta, dir, g.ddelta_direction);
                const bool final_pass = dir == p.directions - 1;
                fill(dstate, kScanBlock * N, 0.0f);
                if (g.dlast)
                    for (int64_t d = block.first; d < block.last; ++d) {
                        int64_t v = (d - block.first) / kLanes, lane = (d - block.first) % kLanes;
                        const float* from = g.dlast + ((p.borders ? index : block.b) * p.channels + d) * N;
                        for (int64_t n = 0; n < N; ++n) dstate[(v * N + n) * kLanes + lane] = from[n];
                    }
                for (int64_t k = (s.length - 1 + kScanSegment) / kScanSegment - 1; k >= 0; --k) {
                    const Segment seg(s, k, p.reverse || dir == 1);
                    const int64_t steps = seg.rows * kLanes;
                    const bool more = seg.begin + seg.rows < s.length;  // the sequence goes on after this segment
                    Steps pass{};
                    pass.rows = seg.rows;
                    pass.dtu = dtu;
                    pass.dresult = dy + (p.shift ? kLanes : 0);
                    pass.B = row(p.B, dir, block, seg.t);
                    pass.C = row(p.C, dir, block, seg.t);
                    pass.B_step = seg.step * p.B.time;
                    pass.C_step = seg.step * p.C.time;
                    pass.from_decay = from_decay;
                    pass.dB = dB;
                    pass.dC = dC;
                    pass.stride = N;
                    fill(dB, seg.rows * N, 0.0f);
                    fill(dC, seg.rows * N, 0.0f);

                    // one row more than the segment has: with shift its last result shows in the next one's output
                    const int64_t ahead = seg.rows + (more && p.shift);
                    block.load(us, p.u, seg, seg.rows);
                    block.load(dts, delta, seg, seg.rows);
                    block.load(douts, g.dy, seg, ahead);
                    if (p.z.data) block.load(zs, p.z, seg, ahead);
                    for (int64_t v = 0; v < block.vectors(); ++v) {
                        const int64_t d = block.first + v * kLanes, lanes = block.lanes(v);
                        if (k > 0) {
                            const int64_t before = seg.t - seg.step * kScanSegment;
                            prefetch(p.u, block.b, d, before, seg.step, kScanSegment);
                            prefetch(delta, block.b, d, before, seg.step, kScanSegment);
                            prefetch(g.dy, block.b, d, before, seg.step, kScanSegment);
                            prefetch(p.z, block.b, d, before, seg.step, kScanSegment);
                        }
                        float *u = us + v * kTile, *dt = dts + v * kTile, *dout = douts + v * kTile;
                        float *z = zs + v * kTile, *y = ys + v * kTile;
                        float *from_input = dus + v * kTile, *slope = ddeltas + v * kTile;
                        pass.dt = dt;
                        pass.from_input = from_input;
                        pass.result = p.z.data ? y + (p.shift ? kLanes : 0) : nullptr;
                        const vf most = make_steps(p, dir, d, lanes, seg.rows, u, dt, dtu, slope);
                        store(dy + steps, splat(0.0f));
                        for (int64_t i = 0; i < ahead * kLanes; i += kLanes) {
                            vf total = load(dout + i);
                            if (p.z.data) {
                                const vf gate = sigmoid(load(z + i));
                                store(open + i, gate);
                                total *= load(z + i) * gate;
                            }
                            store(dy + i, total);
                        }
                        for (int64_t n = 0; n < N; ++n)
                            store(start + n * kLanes,
                                  load_lanes(saved(p, dir, block.b, s.slot + k, n, d), lanes));
                        if (pass.result) {
                            fill(y, steps + kLanes, 0.0f);
                            if (p.shift && k > 0) {  // the result of the step before the segment
                                const float* C = pass.C - pass.C_step;
                                vf before = splat(0.0f);
                                for (int64_t n = 0; n < N; ++n) before += load(start + n * kLanes) * C[n];
                                store(y, before);
                            }
                        }
                        fill(from_decay, steps, 0.0f);
                        fill(from_input, steps, 0.0f);

                        float* to = dstate + v * N * kLanes;
                        const int64_t at_rates = (dir * kVectors + v) * N * kLanes;
                        const bool small = bounded(most, load(largest + dir * kScanBlock + v * kLanes));
                        const auto run = pass.result ? small ? reverse_all<true, true> : reverse_all<true, false>
                                                     : small ? reverse_all<false, true> : reverse_all<false, false>;
                        run(N, pass, rates + at_rates, start, to, dA + at_rates, decays, history);

                        float* du_at = du_sum + ((seg.t - s.begin) * kVectors + v) * kLanes;
                        float* y_at = y_sum + ((seg.t - s.begin) * kVectors + v) * kLanes;
                        const int64_t at_step = seg.step * kScanBlock;
                        const vf skip = p.D ? load_lanes(p.D + d, lanes) : splat(0.0f);
                        vf bias_sum = splat(0.0f), skip_sum = splat(0.0f);
                        for (int64_t i = 0; i < seg.rows; ++i) {
                            const int64_t at = i * kLanes;
                            vf input = load(u + at), inner = load(from_input + at);
                            vf dd = (kLn2 * load(from_decay + at) + input * inner) * load(slope + at);
                            bias_sum += dd;
                            store(slope + at, dd);
                            vf du = load(dt + at) * inner;
                            if (!final_pass) {
                                store(du_at + i * at_step, du);
                                if (pass.result) store(y_at + i * at_step, load(y + at));
                                continue;
                            }
                            vf dv = load(dy + at);
                            skip_sum += dv * input;
                            du += skip * dv;
                            if (p.directions == 2) du += load(du_at + i * at_step);
                            store(from_input + at, du);
                            if (pass.result) {
                                vf total = load(y + at) + skip * input;
                                if (p.directions == 2) total += load(y_at + i * at_step);
                                store(y + at, total);
                            }
                        }
                        float* bias_to = dbias + (dir * kVectors + v) * kLanes;
                        store(bias_to, load(bias_to) + bias_sum);
                        if (!final_pass) continue;
                        store(dD + v * kLanes, load(dD + v * kLanes) + skip_sum);
                        if (p.z.data)
                            for (int64_t i = 0; i < steps; i += kLanes) {
                                const vf gate = load(open + i);
                                const vf slope_of_silu = gate * (1.0f + load(z + i) * (1.0f - gate));
                                store(y + i, load(dout + i) * load(y + i) * slope_of_silu);
                            }
                    }
                    block.store(ddeltas, ddelta, seg);
                    if (final_pass) block.store(dus, g.du, seg);
                    if (final_pass && p.z.data) block.store(ys, g.dz, seg);
                    const int64_t base = block.part * rows_size +
                                         ((dir * p.batch + block.b) * p.groups + block.group) * p.length * N;
                    for (int64_t i = 0; i < seg.rows; ++i) {
                        const int64_t to = base + (seg.t + i * seg.step) * N;
                        memcpy(g.dB_parts + to, dB + i * N, N * sizeof(float));
                        memcpy(g.dC_parts + to, dC + i * N, N * sizeof(float));
                    }
                }
            }
        });
        for (int64_t d = block.first; d < block.last; ++d) {
            const int64_t v = (d - block.first) / kLanes, lane = (d - block.first) % kLanes;
            g.dD[block.b * p.channels + d] = dD[v * kLanes + lane];
            for (int64_t dir = 0; dir < p.directions; ++dir) {
                const int64_t to = (block.b * p.directions + dir) * p.channels + d;
                g.dbias[to] = dbias[(dir * kVectors + v) * kLanes + lane];
                for (int64_t n = 0; n < N; ++n)
                    g.dA[to * N + n] = dA[((dir * kVectors + v) * N + n) * kLanes + lane];
            }
        }
    });
    sum_parts(g.dB, g.dB_parts, rows_size, parts, threads);
    sum_parts(g.dC, g.dC_parts, rows_size, parts, threads);
}

}  // namespace ULTRA_ISA
}  // namespace ultra
