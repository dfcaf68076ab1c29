// Contract: ultra_kernels/selective_scan/op.py and ultra_kernels/bidirectional_scan/op.py, which share these kernels.
//
// Time is cut into segments of kSegment positions, the same for both directions and for every sequence; a direction is
// only the order in which their rows are read, and a sequence's first step read takes the state as 0. A block walks a
// run of segments. Where batch and channels alone do not fill the GPU there are many runs, and three launches: end states
// of every run from 0; the states that the runs start from, one after another; the results. With two directions a run is
// one segment, and one block reads it both ways: u and z cross memory once, both results meet in shared memory, and no
// order of arrival exists that bits could depend on.
//
// A thread owns a channel, its states in registers. B and C of the segment lie in shared memory for all channels of the
// block. Forward saves the state at each segment's start, from which backward makes those inside again.
//
// With `shift` the result of a step is the output of the next one read: y = C' . h before the step, where C' is the C
// of the step before, and 0 at a sequence's first.
#include "common/tile.cuh"

namespace {

using namespace ultra;

constexpr int kSegment = 64;   // SEGMENT of ultra_kernels/selective_scan/op.py
constexpr int kChannels = 64;  // of a block that scans; one thread each, per direction
constexpr int kStates = 16;    // per pass over a segment

// B or C: float32 [directions, B, G, L, N], N contiguous; strides count elements.
struct Rows {
    const float* data;
    int64_t direction, batch, group, time;
};

// Fields of 8 bytes: ultra_kernels/selective_scan/cuda.py fills it in this order.
struct Scan {
    int64_t directions;  // 1, read backwards if `reverse`; or 2: the second one is
    int64_t batch, channels, length, states, groups;
    View u, z, out, delta;               // z may be absent; out: the output, or its gradient
    int64_t delta_direction;             // stride of delta's direction axis
    const float *A, *D, *delta_bias;     // [directions, D, N], [D] or null, [directions, D] or null
    Rows B, C;
    const int32_t* borders;              // cu_seqlens [sequences + 1], or null: every batch row is one sequence
    int64_t sequences;
    float* saved;                        // [directions, B, slots, N, D]: the state before each segment
    int64_t slots;
    float* last;                         // [B or sequences, D, N] or null: the last states, or their gradient
    int64_t reverse, softplus, shift;
    int64_t run, runs;                   // segments per run, runs
    float* steps;                        // [directions, B, runs, D]: the sum of dt over a run; NaN if a border cuts it
};

// Fields of 8 bytes, filled by cuda.py as well.
struct Gradients {
    View du, dz, ddelta;
    int64_t ddelta_direction;
    float* adjoint;                      // [directions, B, runs, N, D]: gradient of the state after each run
    float *dA, *dD, *dbias;              // [B, runs, directions, N, D], [B, runs, D], [B, runs, directions, D]
    float *dB, *dC;                      // [blocks of a group, directions, B, G, L, N]
};

__host__ __device__ inline int64_t segments(const Scan& p) { return ceil_div<int64_t>(p.length, kSegment); }
__host__ __device__ inline int64_t blocks_of_group(const Scan& p, int width) {
    return ceil_div<int64_t>(p.channels / p.groups, width);
}

// What a block works on: a batch row, up to `width` channels of one group, a run of segments.
struct Task {
    int64_t b, group, part, run, first;  // channels first, first + 1, ...
    int channels;
    int64_t begin, end;  // segments

    __device__ Task(const Scan& p, int width) {
        const int64_t parts = blocks_of_group(p, width), size = p.channels / p.groups;
        int64_t rest = blockIdx.x;
        part = rest % parts, rest /= parts;
        run = rest % p.runs, rest /= p.runs;
        group = rest % p.groups, b = rest / p.groups;
        first = group * size + part * width;
        const int64_t left = (group + 1) * size - first;
        channels = (int)(left < width ? left : width);
        begin = run * p.run;
        end = begin + p.run < segments(p) ? begin + p.run : segments(p);
    }
};

int64_t blocks(const Scan& p, int width) { return p.batch * p.groups * p.runs * blocks_of_group(p, width); }

// A segment's positions t, t + 1, ..., one per row, and what is special about a row as one direction reads it.
struct Segment {
    int64_t t;
    int rows;
    bool reverse;
    uint64_t starts, ends;  // bit r: row r is the first, the last step of its sequence
    int sequence[2];        // of row `lane` and of row `lane + kWarp`

    __device__ Segment(const Scan& p, int64_t b, int64_t index, bool reverse) : t(index * kSegment), reverse(reverse) {
        rows = (int)(p.length - t < kSegment ? p.length - t : kSegment);
        starts = ends = 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // by every warp for itself
            const int r = half * kWarp + threadIdx.x % kWarp;
            bool low = false, high = false;
            sequence[half] = 0;
            if (r < rows) {
                const Span s = sequence_at(p.borders, p.sequences, p.length, b, t + r);
                low = s.begin == t + r, high = s.end == t + r + 1;
                sequence[half] = (int)s.index;
            }
            starts |= (uint64_t)__ballot_sync(0xffffffffu, reverse ? high : low) << half * kWarp;
            ends |= (uint64_t)__ballot_sync(0xffffffffu, reverse ? low : high) << half * kWarp;
        }
    }
    __device__ int row(int step) const { return reverse ? rows - 1 - step : step; }
    __device__ bool start(int r) const { return starts >> r & 1; }
    __device__ bool end(int r) const { return ends >> r & 1; }
    __device__ int64_t sequence_of(int r) const {  // by whole warps
        return __shfl_sync(0xffffffffu, r < kWarp ? sequence[0] : sequence[1], r % kWarp);
    }
};

__device__ inline int64_t saved_at(const Scan& p, int64_t dir, int64_t b, int64_t slot, int64_t n, int64_t d) {
    return (((dir * p.batch + b) * p.slots + slot) * p.states + n) * p.channels + d;
}
__device__ inline int64_t run_at(const Scan& p, int64_t dir, int64_t b, int64_t run, int64_t n, int64_t d) {
    return (((dir * p.batch + b) * p.runs + run) * p.states + n) * p.channels + d;
}
__device__ inline int64_t last_at(const Scan& p, int64_t sequence, int64_t n, int64_t d) {
    return (sequence * p.channels + d) * p.states + n;
}

__device__ inline Window window(const View& v, const Task& task, const Segment& s) {
    return Window(v, task.b, task.first, s.t, s.rows, task.channels);
}
__device__ inline View of_direction(View v, int dir, int64_t stride) {
    v.data += dir * stride * (v.dtype == kFloat32 ? 4 : 2);
    return v;
}

// Tiles of kSegment rows, `stride` floats apart.
template <int K>
__device__ inline void load_delta(float* tile, int stride, const Scan& p, const Task& task, const Segment& s, int dir,
                                  Team team) {
    read<As::kValue, K>(tile, stride, window(of_direction(p.delta, dir, p.delta_direction), task, s), team);
}
// Turns rows first, first + apart, ... of a column of delta into dt.
__device__ inline void make_steps(float* column, int stride, const Scan& p, int dir, int64_t d, int first,
                                  int apart, int rows) {
    const float bias = p.delta_bias ? p.delta_bias[dir * p.channels + d] : 0.0f;
#pragma unroll 4
    for (int r = first; r < rows; r += apart) {
        const float x = column[r * stride] + bias;
        column[r * stride] = p.softplus ? softplus(x) : x;
    }
}
// Gradient of the sum before the gate. All threads of the block call it; a barrier later the tile is whole.
template <int K>
__device__ inline void load_dy(float* tile, int stride, const Scan& p, const Task& task, const Segment& s, Team team) {
    read<As::kValue, K>(tile, stride, window(p.out, task, s), team);
    if (!p.z.data) return;
    __syncthreads();  // z may lie in another order, and then other threads bring it
    read<As::kSiluFactor>(tile, stride, window(p.z, task, s), team);
}
// States n, n + 1, ... of B or C: row r from position r + offset, 0 where `none` has a bit and past the last state.
__device__ inline void load_states(float* tile, const Scan& p, const Rows& m, const Task& task, const Segment& s,
                                   int dir, int64_t n, int offset, uint64_t none, Team team) {
    const float* from =
        m.data + dir * m.direction + task.b * m.batch + task.group * m.group + (s.t + offset) * m.time + n;
    for (int k = team.first; k < s.rows * kStates; k += team.count) {
        const int r = k / kStates, i = k % kStates;
        tile[k] = n + i < p.states && !(none >> r & 1) ? from[r * m.time + i] : 0.0f;
    }
}
__device__ inline void load_B(float* tile, const Scan& p, const Task& task, const Segment& s, int dir, int64_t n,
                              Team team) {
    load_states(tile, p, p.B, task, s, dir, n, 0, 0, team);
}
template <bool Shift>
__device__ inline void load_C(float* tile, const Scan& p, const Task& task, const Segment& s, int dir, int64_t n,
                              Team team) {
    load_states(tile, p, p.C, task, s, dir, n, Shift ? (s.reverse ? 1 : -1) : 0, Shift ? s.starts : 0, team);
}

// Calls use(i, offset of state n + i) for those of `Count` states that exist, in arrays [..., N, D].
template <int Count, typename Use> __device__ inline void each_state(const Scan& p, int64_t n, const Use& use) {
    const int64_t stride = opaque(p.channels);
#pragma unroll
    for (int i = 0; i < Count; ++i)
        if (n + i < p.states) use(i, i * stride);
}

// A · log2(e) of states n, n + 1, ...: the decay of a step is 2^(dt * rate).
template <int Count>
__device__ inline void load_rates(float* rates, const Scan& p, int dir, int64_t n, int64_t d, bool live) {
    const float* A = p.A + opaque((dir * p.channels + d) * p.states + n);
#pragma unroll
    for (int i = 0; i < Count; ++i) rates[i] = live && n + i < p.states ? kLog2E * A[i] : 0.0f;
}

constexpr int kStride = kChannels + 1;
constexpr int kTile = kSegment * kStride, kMatrix = kSegment * kStates;

// ---- forward --------------------------------------------------------------------------------------------------------
int64_t forward_shared(const Scan& p) {
    const int64_t tiles = p.states > kStates ? 2 : 1;  // of a direction
    return (kTile + p.directions * (tiles * kTile + 2 * kMatrix)) * sizeof(float);
}

// Grid: tasks. A team of kChannels threads per direction.
template <bool Shift> __global__ void __launch_bounds__(2 * kChannels, 3) scan_rows(const Scan p) {
    const int dir = threadIdx.x / kChannels, c = threadIdx.x % kChannels;
    const int passes = (int)ceil_div<int64_t>(p.states, kStates);
    const bool reverse = p.reverse || dir == 1;
    const Task task(p, kChannels);
    const Team all{(int)threadIdx.x, (int)blockDim.x}, team{c, kChannels};
    const int64_t d = task.first + c;
    const bool live = c < task.channels;
    float* const us = dynamic_shared();  // then per direction dt, y, B, C; in a single pass y takes the place of dt
    const int tiles = passes > 1 ? 2 : 1, per_direction = tiles * kTile + 2 * kMatrix;
    float* const dts = us + kTile + dir * per_direction;
    float* const ys = dts + (tiles - 1) * kTile;
    float* const Bs = ys + kTile;
    float* const Cs = Bs + kMatrix;
#pragma unroll 1
    for (int64_t k = task.begin; k < task.end; ++k) {
        const int64_t index = reverse ? task.begin + task.end - 1 - k : k;
        const Segment s(p, task.b, index, reverse);
        read<As::kValue, 2>(us, kStride, window(p.u, task, s), all);
        load_delta<2>(dts, kStride, p, task, s, dir, team);
#pragma unroll 1
        for (int pass = 0; pass < passes; ++pass) {
            const int64_t n = pass * kStates;
            load_B(Bs, p, task, s, dir, n, team);
            load_C<Shift>(Cs, p, task, s, dir, n, team);
            __syncthreads();
            if (pass == 0 && live) make_steps(dts + c, kStride, p, dir, d, 0, 1, s.rows);
            float rates[kStates], h[kStates];
            load_rates<kStates>(rates, p, dir, n, d, live);
            float* const saved = p.saved + saved_at(p, dir, task.b, index, n, d);
#pragma unroll
            for (int i = 0; i < kStates; ++i) h[i] = 0.0f;
            if (live && (k > task.begin || p.runs > 1))  // written by this thread, or by the launch before
                each_state<kStates>(p, n, [&](int i, int64_t offset) { h[i] = saved[offset]; });
            else if (live) each_state<kStates>(p, n, [&](int, int64_t offset) { saved[offset] = 0.0f; });
#pragma unroll 1
            for (int step = 0; step < s.rows; ++step) {
                const int r = s.row(step), at = r * kStride + c;
                if (s.start(r)) {
#pragma unroll
                    for (int i = 0; i < kStates; ++i) h[i] = 0.0f;
                }
                const float dt = dts[at], input = dt * us[at];
                float sums[4] = {pass ? ys[at] : 0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
                for (int i = 0; i < kStates; i += 4) {
                    const auto B = load<4>(Bs + r * kStates + i), C = load<4>(Cs + r * kStates + i);
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        if (Shift) sums[j] += C.v[j] * h[i + j];
                        h[i + j] = fast_exp2(dt * rates[i + j]) * h[i + j] + input * B.v[j];
                        if (!Shift) sums[j] += C.v[j] * h[i + j];
                    }
                }
                ys[at] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
                if (p.last && s.end(r)) {
                    const int64_t sequence = s.sequence_of(r);
#pragma unroll
                    for (int i = 0; i < kStates; ++i)
                        if (live && n + i < p.states) p.last[last_at(p, sequence, n + i, d)] = h[i];
                }
            }
            if (k + 1 < task.end && live) {
                float* const next = p.saved + saved_at(p, dir, task.b, index + (reverse ? -1 : 1), n, d);
                each_state<kStates>(p, n, [&](int i, int64_t offset) { next[offset] = h[i]; });
            }
            __syncthreads();  // the results are whole; B and C are free
        }
        // The sum takes the place of u, each element by one thread.
        const float* first = us + kTile + (tiles - 1) * kTile;
        for (int i = threadIdx.x; i < s.rows * kChannels; i += blockDim.x) {
            const int at = i / kChannels * kStride + i % kChannels;
            if (i % kChannels >= task.channels) continue;
            float y = first[at];
            if (p.directions == 2) y += first[at + per_direction];
            if (p.D) y += p.D[task.first + i % kChannels] * us[at];
            us[at] = y;
        }
        __syncthreads();
        if (p.z.data) {
            read<As::kSiluFactor>(us, kStride, window(p.z, task, s), all);
            __syncthreads();
        }
        write(us, kStride, window(p.out, task, s), all);
        __syncthreads();  // before the next segment
    }
}

// End states of every run but the last one read, from 0, into the slot where that run's own start state belongs.
// Grid: tasks × passes × directions.
__global__ void __launch_bounds__(kChannels, 6) scan_ends(const Scan p) {
    __shared__ float us[kTile], dts[kTile], Bs[kMatrix];
    const int dir = blockIdx.z, c = threadIdx.x;
    const bool reverse = p.reverse || dir == 1;
    const Task task(p, kChannels);
    if (task.run == (reverse ? 0 : p.runs - 1)) return;  // the whole block
    const Team team{c, kChannels};
    const int64_t d = task.first + c, n = (int64_t)blockIdx.y * kStates;
    const bool live = c < task.channels;
    float rates[kStates], h[kStates] = {}, steps = 0.0f;
    load_rates<kStates>(rates, p, dir, n, d, live);
#pragma unroll 1
    for (int64_t k = task.begin; k < task.end; ++k) {
        const Segment s(p, task.b, reverse ? task.begin + task.end - 1 - k : k, reverse);
        read<As::kValue, 2>(us, kStride, window(p.u, task, s), team);
        load_delta<2>(dts, kStride, p, task, s, dir, team);
        load_B(Bs, p, task, s, dir, n, team);
        __syncthreads();
        if (live) make_steps(dts + c, kStride, p, dir, d, 0, 1, s.rows);
        if (s.starts) steps = NAN;
#pragma unroll 1
        for (int step = 0; step < s.rows; ++step) {
            const int r = s.row(step), at = r * kStride + c;
            if (s.start(r)) {
#pragma unroll
                for (int i = 0; i < kStates; ++i) h[i] = 0.0f;
            }
            const float dt = dts[at], input = dt * us[at];
            steps += dt;
#pragma unroll
            for (int i = 0; i < kStates; i += 4) {
                const auto B = load<4>(Bs + r * kStates + i);
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    h[i + j] = fast_exp2(dt * rates[i + j]) * h[i + j] + input * B.v[j];
            }
        }
        __syncthreads();
    }
    if (!live) return;
    float* const saved = p.saved + saved_at(p, dir, task.b, reverse ? task.end - 1 : task.begin, n, d);
    each_state<kStates>(p, n, [&](int i, int64_t offset) { saved[offset] = h[i]; });
    if (n == 0) p.steps[((dir * p.batch + task.b) * p.runs + task.run) * p.channels + d] = steps;
}

// From what each run brings, starting from 0, to what it starts from: value = 2^(rate * steps) * value + brought, run
// after run. A thread per direction, batch row, state and channel. Forward: in place in p.saved. Backward: in `adjoint`,
// against the order of reading.
constexpr int kCarryThreads = 128, kCarryAhead = 8;

__global__ void __launch_bounds__(kCarryThreads) carry_runs(const Scan p, float* adjoint) {
    int64_t rest = (int64_t)blockIdx.x * kCarryThreads + threadIdx.x;
    if (rest >= p.directions * p.batch * p.states * p.channels) return;
    const int64_t d = rest % p.channels, n = rest / p.channels % p.states;
    rest /= p.channels * p.states;
    const int64_t b = rest % p.batch, dir = rest / p.batch;
    const bool reverse = p.reverse || dir == 1, down = reverse != (adjoint != nullptr);
    const float rate = kLog2E * p.A[(dir * p.channels + d) * p.states + n];
    const float* steps = p.steps + (dir * p.batch + b) * p.runs * p.channels + d;
    const auto place = [&](int64_t k) {
        const int64_t run = down ? p.runs - 1 - k : k;
        if (adjoint) return adjoint + run_at(p, dir, b, run, n, d);
        const int64_t end = (run + 1) * p.run < segments(p) ? (run + 1) * p.run : segments(p);
        return p.saved + saved_at(p, dir, b, reverse ? end - 1 : run * p.run, n, d);
    };
    float value = 0.0f;
    for (int64_t begin = 0; begin < p.runs; begin += kCarryAhead) {
        float brought[kCarryAhead], sums[kCarryAhead];
#pragma unroll
        for (int i = 0; i < kCarryAhead; ++i) {
            const int64_t k = begin + i;
            if (k + 1 >= p.runs) break;  // nobody needs what the last run brings
            brought[i] = *place(k);
            sums[i] = steps[(down ? p.runs - 1 - k : k) * p.channels];
        }
#pragma unroll
        for (int i = 0; i < kCarryAhead; ++i) {
            if (begin + i >= p.runs) break;
            *place(begin + i) = value;
            if (begin + i + 1 >= p.runs) break;
            value = sums[i] != sums[i] ? brought[i] : fast_exp2(rate * sums[i]) * value + brought[i];
        }
    }
}

dim3 grid(const Scan& p, int width, bool passes_and_directions = false) {
    return passes_and_directions ? dim3((unsigned)blocks(p, width), (unsigned)ceil_div<int64_t>(p.states, kStates),
                                        (unsigned)p.directions)
                                 : dim3((unsigned)blocks(p, width));
}

int carry(const Scan& p, float* adjoint, void* stream) {
    const int64_t threads = p.directions * p.batch * p.states * p.channels;
    return launch(carry_runs, dim3((unsigned)ceil_div<int64_t>(threads, kCarryThreads)), kCarryThreads, stream, p, adjoint);
}

// ---- backward -------------------------------------------------------------------------------------------------------
// Gradients of the state before every run but the first one read, as if that of the state after it were 0, into that
// run's place in `adjoint`. Grid: as scan_ends.
template <bool Shift> __global__ void __launch_bounds__(kChannels, 6) scan_adjoints(const Scan p, float* adjoint) {
    __shared__ float dys[kTile], dts[kTile], Cs[kMatrix];
    const int dir = blockIdx.z, c = threadIdx.x;
    const bool reverse = p.reverse || dir == 1;
    const Task task(p, kChannels);
    if (task.run == (reverse ? p.runs - 1 : 0)) return;  // the whole block
    const Team team{c, kChannels};
    const int64_t d = task.first + c, n = (int64_t)blockIdx.y * kStates;
    const bool live = c < task.channels;
    float rates[kStates], g[kStates] = {}, steps = 0.0f;
    load_rates<kStates>(rates, p, dir, n, d, live);
#pragma unroll 1
    for (int64_t k = task.begin; k < task.end; ++k) {
        const Segment s(p, task.b, reverse ? k : task.begin + task.end - 1 - k, reverse);
        load_dy<2>(dys, kStride, p, task, s, team);
        load_delta<2>(dts, kStride, p, task, s, dir, team);
        load_C<Shift>(Cs, p, task, s, dir, n, team);
        __syncthreads();
        if (live) make_steps(dts + c, kStride, p, dir, d, 0, 1, s.rows);
        if (s.ends) steps = NAN;
#pragma unroll 1
        for (int step = s.rows - 1; step >= 0; --step) {
            const int r = s.row(step), at = r * kStride + c;
            if (s.end(r)) {
                const int64_t sequence = s.sequence_of(r);
#pragma unroll
                for (int i = 0; i < kStates; ++i)
                    g[i] = p.last && live && n + i < p.states ? p.last[last_at(p, sequence, n + i, d)] : 0.0f;
            }
            const float dt = dts[at], dy = dys[at];
            steps += dt;
#pragma unroll
            for (int i = 0; i < kStates; i += 4) {
                const auto C = load<4>(Cs + r * kStates + i);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float decay = fast_exp2(dt * rates[i + j]);
                    g[i + j] = Shift ? decay * g[i + j] + dy * C.v[j] : decay * (g[i + j] + dy * C.v[j]);
                }
            }
        }
        __syncthreads();
    }
    if (!live) return;
    float* const to = adjoint + run_at(p, dir, task.b, task.run, n, d);
    each_state<kStates>(p, n, [&](int i, int64_t offset) { to[offset] = g[i]; });
    if (n == 0) p.steps[((dir * p.batch + task.b) * p.runs + task.run) * p.channels + d] = steps;
}

// Where the gradients are made, a warp owns kOwn states of 32 channels, one per lane, and four warps share the tiles. A
// segment goes by in parts of kPart steps, last part first: the states inside are made again from the one at the part's
// start, which a first pass left in shared memory. A part's kPart × kOwn terms of dB, and of dC, one value per lane each,
// become 16 sums over the lanes with 16 shuffles, and take the place of the B and C that they came from: those are read
// by this warp alone. The sums over states meet in `exchange`; warp w finishes step w of the part.
constexpr int kWide = 32, kWarps = 4, kOwn = kStates / kWarps, kPart = 4, kParts = kSegment / kPart;
constexpr int kNarrow = kWide + 1, kNarrowTile = kSegment * kNarrow, kBackwardThreads = kWide * kWarps;
constexpr int kStarts = kParts * kOwn * kBackwardThreads;
constexpr int kQuantities = 3, kExchange = kPart * kQuantities * kWarps * kWide;
static_assert(kPart == kWarps && kPart * kOwn == kWarp / 2 && kWide == kWarp);

// Whether dy and u are needed after the first gradients that would take their places; ddelta and dt the same.
__host__ __device__ inline bool keep_inputs(const Scan& p) { return p.directions == 2 || p.states > kStates; }
__host__ __device__ inline bool keep_steps(const Scan& p) { return p.states > kStates; }

int64_t backward_shared(const Scan& p) {
    const int64_t tiles = 3 + (keep_inputs(p) ? 2 : 0) + (keep_steps(p) ? 1 : 0);
    return (tiles * kNarrowTile + kStarts + 2 * kMatrix + kExchange) * sizeof(float);
}

// Lanes l and l + 16 get the sum of values[l] over all lanes: the half of the values that a lane will not need goes to the
// lane that will, and so on. Recursive, since nvcc leaves a loop over `Half` rolled and the values in memory.
template <int Half = kWarp / 4> __device__ inline float sum_over_lanes(float* values) {
    const bool upper = threadIdx.x & Half;
#pragma unroll
    for (int i = 0; i < Half; ++i) {
        const float keep = upper ? values[i + Half] : values[i], give = upper ? values[i] : values[i + Half];
        values[i] = keep + __shfl_xor_sync(0xffffffffu, give, Half);
    }
    if constexpr (Half > 1) return sum_over_lanes<Half / 2>(values);
    else return values[0] + __shfl_xor_sync(0xffffffffu, values[0], kWarp / 2);
}

// Grid: tasks of kWide channels.
template <bool Shift>
__global__ void __launch_bounds__(kBackwardThreads, 3) scan_rows_backward(const Scan p, const Gradients grads) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, passes = (int)ceil_div<int64_t>(p.states, kStates);
    const Task task(p, kWide);
    const Team all{(int)threadIdx.x, kBackwardThreads};
    const int64_t d = task.first + lane, part = task.b * p.runs + task.run;
    const bool live = lane < task.channels;
    const float skip = live && p.D ? p.D[d] : 0.0f;
    float* next = dynamic_shared();
    const auto take = [&next](int floats) { return next += floats, next - floats; };
    float *const us = take(kNarrowTile), *const dys = take(kNarrowTile), *const dts = take(kNarrowTile);
    float *const Bs = take(kMatrix), *const Cs = take(kMatrix);
    float *const starts = take(kStarts) + threadIdx.x, *const exchange = take(kExchange);
    float *const dus = keep_inputs(p) ? take(kNarrowTile) : us, *const ys = keep_inputs(p) ? take(kNarrowTile) : dys;
    float *const ddeltas = keep_steps(p) ? take(kNarrowTile) : dts;

#pragma unroll 1
    for (int64_t k = task.begin; k < task.end; ++k) {
        const int64_t index = p.reverse ? k : task.begin + task.end - 1 - k;
        const bool first_segment = k == task.begin;
        float dD = 0.0f;
#pragma unroll 1
        for (int dir = 0; dir < p.directions; ++dir) {
            const Segment s(p, task.b, index, p.reverse || dir == 1);
            const int parts = ceil_div(s.rows, kPart);
            float dbias = 0.0f;
            if (dir == 0) {
                read(us, kNarrow, window(p.u, task, s), all);
                load_dy<1>(dys, kNarrow, p, task, s, all);
            }
            load_delta<1>(dts, kNarrow, p, task, s, dir, all);
#pragma unroll 1
            for (int pass = 0; pass < passes; ++pass) {
                const bool first_pass = pass == 0, last_pass = pass == passes - 1;
                const int64_t n = pass * kStates + warp * kOwn;  // the first of this thread's states
                load_B(Bs, p, task, s, dir, pass * kStates, all);
                load_C<Shift>(Cs, p, task, s, dir, pass * kStates, all);
                __syncthreads();
                if (first_pass) {
                    if (live) make_steps(dts + lane, kNarrow, p, dir, d, warp, kWarps, s.rows);
                    __syncthreads();
                }
                float rates[kOwn], h[kOwn] = {}, g[kOwn] = {}, dA[kOwn] = {};
                load_rates<kOwn>(rates, p, dir, n, d, live);
                float* const adjoint = grads.adjoint + run_at(p, dir, task.b, task.run, n, d);
                if (live) {
                    const float* saved = p.saved + saved_at(p, dir, task.b, index, n, d);
                    each_state<kOwn>(p, n, [&](int i, int64_t offset) { h[i] = saved[offset]; });
                }
                if (live && (p.runs > 1 || !first_segment))
                    each_state<kOwn>(p, n, [&](int i, int64_t offset) { g[i] = adjoint[offset]; });
#pragma unroll 1
                for (int step = 0;; ++step) {
                    if (step % kPart == 0) {
#pragma unroll
                        for (int i = 0; i < kOwn; ++i) starts[(step / kPart * kOwn + i) * kBackwardThreads] = h[i];
                        if (step / kPart == parts - 1) break;
                    }
                    const int r = s.row(step), at = r * kNarrow + lane;
                    const float dt = live ? dts[at] : 0.0f, input = live ? dt * us[at] : 0.0f;
                    const auto B = load<kOwn>(Bs + r * kStates + warp * kOwn);
#pragma unroll
                    for (int i = 0; i < kOwn; ++i) {
                        if (s.start(r)) h[i] = 0.0f;
                        h[i] = fast_exp2(dt * rates[i]) * h[i] + input * B.v[i];
                    }
                }
#pragma unroll 1
                for (int j = parts - 1; j >= 0; --j) {
                    float before[kPart][kOwn], decay[kPart][kOwn], terms[kPart * kOwn] = {};
#pragma unroll
                    for (int i = 0; i < kOwn; ++i) h[i] = starts[(j * kOwn + i) * kBackwardThreads];
#pragma unroll
                    for (int q = 0; q < kPart; ++q) {
                        if (j * kPart + q >= s.rows) break;
                        const int r = s.row(j * kPart + q), at = r * kNarrow + lane;
                        const float dt = live ? dts[at] : 0.0f, input = live ? dt * us[at] : 0.0f;
                        const float dy = live ? dys[at] : 0.0f;
                        const auto B = load<kOwn>(Bs + r * kStates + warp * kOwn);
                        const auto C = load<kOwn>(Cs + r * kStates + warp * kOwn);
                        float y = 0.0f;
#pragma unroll
                        for (int i = 0; i < kOwn; ++i) {
                            before[q][i] = s.start(r) ? 0.0f : h[i];
                            decay[q][i] = fast_exp2(dt * rates[i]);
                            h[i] = decay[q][i] * before[q][i] + input * B.v[i];
                            y += C.v[i] * (Shift ? before[q][i] : h[i]);
                            terms[q * kOwn + i] = dy * (Shift ? before[q][i] : h[i]);
                        }
                        exchange[((q * kQuantities + 2) * kWarps + warp) * kWide + lane] = y;
                    }
                    const float dC = sum_over_lanes(terms);
#pragma unroll
                    for (int i = 0; i < kPart * kOwn; ++i) terms[i] = 0.0f;
#pragma unroll
                    for (int q = kPart - 1; q >= 0; --q) {
                        if (j * kPart + q >= s.rows) continue;
                        const int r = s.row(j * kPart + q), at = r * kNarrow + lane;
                        if (s.end(r)) {
                            const int64_t sequence = s.sequence_of(r);
#pragma unroll
                            for (int i = 0; i < kOwn; ++i)
                                g[i] = p.last && live && n + i < p.states ? p.last[last_at(p, sequence, n + i, d)] : 0.0f;
                        }
                        const float dt = live ? dts[at] : 0.0f, input = live ? dt * us[at] : 0.0f;
                        const float dy = live ? dys[at] : 0.0f;
                        const auto B = load<kOwn>(Bs + r * kStates + warp * kOwn);
                        const auto C = load<kOwn>(Cs + r * kStates + warp * kOwn);
                        float from_input = 0.0f, from_decay = 0.0f;
#pragma unroll
                        for (int i = 0; i < kOwn; ++i) {
                            const float dh = Shift ? g[i] : g[i] + dy * C.v[i];
                            terms[q * kOwn + i] = dh * input;
                            from_input += dh * B.v[i];
                            g[i] = dh * decay[q][i];
                            const float w = g[i] * before[q][i];
                            from_decay += rates[i] * w;
                            dA[i] += dt * w;
                            if (Shift) g[i] += dy * C.v[i];
                        }
                        exchange[((q * kQuantities + 0) * kWarps + warp) * kWide + lane] = from_input;
                        exchange[((q * kQuantities + 1) * kWarps + warp) * kWide + lane] = from_decay;
                    }
                    const float dB = sum_over_lanes(terms);
                    const int q = lane / kOwn % kPart;
                    __syncwarp();  // all lanes have read B and C of this part
                    if (j * kPart + q < s.rows)
                        (lane < kWarp / 2 ? Bs : Cs)[s.row(j * kPart + q) * kStates + warp * kOwn + lane % kOwn] =
                            lane < kWarp / 2 ? dB : dC;
                    __syncthreads();  // the exchange is whole; nobody needs rows of this part any more in this pass
                    if (j * kPart + warp < s.rows) {
                        const int at = s.row(j * kPart + warp) * kNarrow + lane;
                        float sums[kQuantities] = {};
#pragma unroll
                        for (int i = 0; i < kQuantities; ++i)
#pragma unroll
                            for (int w = 0; w < kWarps; ++w)
                                sums[i] += exchange[((warp * kQuantities + i) * kWarps + w) * kWide + lane];
                        const float dt = dts[at], u = us[at], dy = dys[at];
                        const bool first = dir == 0 && first_pass;
                        dus[at] = (first ? skip * dy : dus[at]) + dt * sums[0];
                        ys[at] = (first ? skip * u : ys[at]) + sums[2];
                        float ddelta = (first_pass ? 0.0f : ddeltas[at]) + kLn2 * sums[1] + u * sums[0];
                        // softplus'(x) = 1 - e^-softplus(x)
                        if (last_pass && p.softplus) ddelta *= -expm1f(-dt);
                        ddeltas[at] = ddelta;
                        if (last_pass) dbias += ddelta;
                        if (first) dD += dy * u;
                    }
                    __syncthreads();  // before the exchange is written again
                }
                if (live) {
                    float* to = grads.dA + ((part * p.directions + dir) * p.states + n) * p.channels + d;
                    each_state<kOwn>(p, n, [&](int i, int64_t offset) {
                        if (k + 1 < task.end) adjoint[offset] = g[i];
                        to[offset] = first_segment ? dA[i] : to[offset] + dA[i];
                    });
                }
                const int64_t groups = dir * p.batch * p.groups + task.b * p.groups + task.group;
                const int64_t rows = (task.part * p.directions * p.batch * p.groups + groups) * p.length + s.t;
                for (int i = threadIdx.x; i < s.rows * kStates; i += kBackwardThreads) {
                    const int r = i / kStates;
                    const int64_t state = pass * kStates + i % kStates;
                    if (state >= p.states) continue;
                    grads.dB[(rows + r) * p.states + state] = Bs[i];
                    if (!Shift) grads.dC[(rows + r) * p.states + state] = Cs[i];
                    // A row of C' is that of the step before; nobody reads a sequence's last C.
                    if (Shift && !s.start(r)) grads.dC[(rows + r + (s.reverse ? 1 : -1)) * p.states + state] = Cs[i];
                    if (Shift && s.end(r)) grads.dC[(rows + r) * p.states + state] = 0.0f;
                }
                __syncthreads();  // B and C are free
            }
            write(ddeltas, kNarrow, window(of_direction(grads.ddelta, dir, grads.ddelta_direction), task, s), all);
            exchange[threadIdx.x] = dbias;
            exchange[kBackwardThreads + threadIdx.x] = dD;
            __syncthreads();  // also: dt is free
            if (warp < 2 && live && (warp == 0 || dir == 0)) {
                float total = 0.0f;
#pragma unroll
                for (int w = 0; w < kWarps; ++w) total += exchange[(warp * kWarps + w) * kWide + lane];
                float* to = warp == 0 ? grads.dbias + (part * p.directions + dir) * p.channels + d
                                      : grads.dD + part * p.channels + d;
                *to = first_segment ? total : *to + total;
            }
            if (dir + 1 < p.directions) continue;
            write(dus, kNarrow, window(grads.du, task, s), all);
            if (p.z.data) {  // every tensor may lie in an order of its own
                read<As::kFactor>(ys, kNarrow, window(p.out, task, s), all);
                __syncthreads();
                read<As::kSiluSlopeFactor>(ys, kNarrow, window(p.z, task, s), all);
                __syncthreads();
                write(ys, kNarrow, window(grads.dz, task, s), all);
            }
            __syncthreads();  // before the next segment
        }
    }
}

}  // namespace

// Channel blocks of one group, for the size of dB and dC; tasks of one run, for the choice of runs.
ULTRA_EXPORT int64_t selective_scan_parts(int64_t channels_of_group) {
    return ceil_div<int64_t>(channels_of_group, kWide);
}
ULTRA_EXPORT int64_t selective_scan_segment() { return kSegment; }

ULTRA_EXPORT int selective_scan_forward(const Scan* p, void* stream) {
    if (p->runs > 1) {
        int code = launch(scan_ends, grid(*p, kChannels, true), kChannels, stream, *p);
        if (code == kSuccess) code = carry(*p, nullptr, stream);
        if (code != kSuccess) return code;
    }
    return launch_shared(p->shift ? scan_rows<true> : scan_rows<false>, grid(*p, kChannels),
                         (int)p->directions * kChannels, forward_shared(*p), stream, *p);
}

ULTRA_EXPORT int selective_scan_backward(const Scan* p, const Gradients* grads, void* stream) {
    if (p->runs > 1) {
        int code = launch(p->shift ? scan_adjoints<true> : scan_adjoints<false>, grid(*p, kChannels, true), kChannels,
                          stream, *p, grads->adjoint);
        if (code == kSuccess) code = carry(*p, grads->adjoint, stream);
        if (code != kSuccess) return code;
    }
    return launch_shared(p->shift ? scan_rows_backward<true> : scan_rows_backward<false>, grid(*p, kWide),
                         kBackwardThreads, backward_shared(*p), stream, *p, *grads);
}
