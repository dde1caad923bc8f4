// sim.cu: one forward of the small transformer, the arithmetic of NumpyModel in kvcanary/sim/model.py.
//
// kvc_sim_embed   row and position of each token, its embedding and its rotary angles
// kvc_sim_qkv     per layer: norm, Q, K and V, rotation; K and V go to their slots of the paged cache
// kvc_sim_attend  per layer: attention through the block table, output projection
// kvc_sim_mlp     per layer: norm, MLP
// kvc_sim_sample  norm and logits at each row's last token, and the greedy next one
//
// A block computes one token (in the last kernel one row) from beginning to end. Only attention looks at other tokens,
// and finds them in the cache, where the kernel before it has put them all. The grid is the bucket; what changes from
// step to step is read from device memory, so that a captured launch can be replayed. Written to be read first.
#include "sim_math.cuh"

constexpr uint32_t SIM_THREADS = 128;
constexpr uint32_t SIM_WARPS = SIM_THREADS / 32;
constexpr int32_t SIM_MAX_WIDTH = 512;     // n_heads * head_dim
constexpr int32_t SIM_MAX_MLP = 2048;
constexpr int32_t SIM_MAX_HEAD_DIM = 128;  // a lane mixes every 32nd element of its warp's head
constexpr float SIM_NORM_EPSILON = 1e-6f;
constexpr float SIM_MASKED = -1e30f;  // below every score; not -inf, whose difference with itself is no number

// The twin of PARAMS in kvcanary/sim/cuda_model.py. A matrix [in, out] keeps its columns side by side.
struct SimParams {
    const int32_t* block_table;      // [rows, max_blocks], blocks
    const int32_t* seq_lens;         // [rows], tokens after this forward
    const int32_t* query_start_loc;  // [rows + 1]
    const int32_t* input_ids;        // [tokens]
    const int64_t* slot_mapping;     // [tokens], slots; written to if inside the cache
    const float* embed;              // [vocab, width]
    const double* frequencies;       // [head_dim / 2], radians per position
    const float* qkv;                // [width, 3 * width], of the layer
    const float* out;                // [width, width], of the layer
    const float* up;                 // [width, mlp], of the layer
    const float* down;               // [mlp, width], of the layer
    const float* head;               // [width, vocab]
    const float* logit_bias;         // [vocab]
    float* k_cache;                  // [n_blocks, page_size, n_heads, head_dim], of the layer
    float* v_cache;                  // the same
    int32_t* row_of;                 // [tokens], -1 = a token that no row owns
    int32_t* positions;              // [tokens]
    float* turns;                    // [tokens, head_dim], cosines, then sines
    float* x;                        // [tokens, width], hidden state
    float* q;                        // [tokens, width]
    float* logits;                   // [rows, vocab]
    int32_t* next_tokens;            // [rows]
    int32_t rows;
    int32_t tokens;
    int32_t max_blocks;
    int32_t n_blocks;
    int32_t page_size;
    int32_t n_heads;
    int32_t head_dim;
    int32_t mlp;
    int32_t vocab;
};

// ---- helpers of a whole block: all its threads take part -----------------------------------------------------------
KVC_DEVICE int32_t sim_thread() { return (int32_t)kvc_thread(); }
KVC_DEVICE int32_t sim_width(const SimParams& p) { return p.n_heads * p.head_dim; }

// normed = x / rms(x), both [width]; partial [SIM_THREADS].
KVC_DEVICE void sim_norm(const float* x, int32_t width, float* normed, float* partial) {
    const int32_t thread = sim_thread();
    float sum = 0;
    for (int32_t i = thread; i < width; i += SIM_THREADS) sum += x[i] * x[i];
    partial[thread] = sum;
    kvc_sync_block();
    for (int32_t n = SIM_THREADS / 2; n > 0; n /= 2) {
        if (thread < n) partial[thread] += partial[thread + n];
        kvc_sync_block();
    }
    const float rms = kvc_sqrt(partial[0] / (float)width + SIM_NORM_EPSILON);
    for (int32_t i = thread; i < width; i += SIM_THREADS) normed[i] = x[i] / rms;
    kvc_sync_block();
}

// ---- helpers of one thread -----------------------------------------------------------------------------------------
// One element of `in @ matrix`: neighbouring threads take neighbouring columns, so the matrix is read coalesced.
KVC_DEVICE float sim_column(const float* in, const float* matrix, int32_t n_in, int32_t n_out, int32_t column) {
    float sum = 0;
    for (int32_t i = 0; i < n_in; ++i) sum += in[i] * matrix[(int64_t)i * n_out + column];
    return sum;
}

KVC_DEVICE float sim_silu(float x) { return x / (1.0f + kvc_exp(-x)); }
KVC_DEVICE int32_t sim_clip(int32_t v, int32_t low, int32_t high) { return v < low ? low : v > high ? high : v; }

// The row that owns a token: the first that ends behind it; -1 behind the last row.
KVC_DEVICE int32_t sim_row_of(const SimParams& p, int32_t token) {
    int32_t low = 0, high = p.rows;
    while (low < high) {
        const int32_t middle = (low + high) / 2;
        if (p.query_start_loc[middle + 1] <= token) low = middle + 1;
        else high = middle;
    }
    return low < p.rows ? low : -1;
}

// Element of a head's vector after the rotation of its pairs (i, i + half).
KVC_DEVICE float sim_rotated(const float* heads, const float* turns, int32_t element, int32_t head_dim) {
    const int32_t half = head_dim / 2, i = element % head_dim, pair = i % half;
    const float low = heads[element - i + pair], high = heads[element - i + pair + half];
    const float cosine = turns[pair], sine = turns[pair + half];
    return i < half ? low * cosine - high * sine : low * sine + high * cosine;
}

// Slot of a row's position, read through the table; an entry outside the cache is clipped, as NumpyModel does.
KVC_DEVICE int64_t sim_slot(const SimParams& p, int32_t row, int32_t position) {
    const int32_t entry = p.block_table[(int64_t)row * p.max_blocks + position / p.page_size];
    return (int64_t)sim_clip(entry, 0, p.n_blocks - 1) * p.page_size + position % p.page_size;
}

// Orders logits as numpy.argmax does: the greatest, a NaN before any number, of equal ones the lowest index.
KVC_DEVICE uint64_t sim_rank(float logit, int32_t index) {
    const uint32_t bits = kvc_float_bits(logit + 0.0f);  // -0 becomes +0
    const uint32_t ordered = logit != logit ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (uint64_t)ordered << 32 | (0xffffffffu - (uint32_t)index);
}

// ---- kernels -------------------------------------------------------------------------------------------------------
// A block per token. A row shorter than its new tokens counts its positions from 0.
KVC_KERNEL(SIM_THREADS) kvc_sim_embed(KVC_PARAM SimParams p) {
    const int32_t token = (int32_t)kvc_block(), row = sim_row_of(p, token), width = sim_width(p), half = p.head_dim / 2;
    if (sim_thread() == 0) p.row_of[token] = row;
    if (row < 0) return;
    const int32_t start = p.query_start_loc[row], n_before = p.seq_lens[row] - (p.query_start_loc[row + 1] - start);
    const int32_t position = (n_before > 0 ? n_before : 0) + token - start;
    if (sim_thread() == 0) p.positions[token] = position;
    const float* embedding = p.embed + (int64_t)sim_clip(p.input_ids[token], 0, p.vocab - 1) * width;
    for (int32_t i = sim_thread(); i < width; i += SIM_THREADS) p.x[(int64_t)token * width + i] = embedding[i];
    for (int32_t i = sim_thread(); i < half; i += SIM_THREADS) {
        const double angle = position * p.frequencies[i];  // in float, position 4096 would be off by 1e-4 radians
        p.turns[(int64_t)token * p.head_dim + i] = (float)kvc_cos(angle);
        p.turns[(int64_t)token * p.head_dim + half + i] = (float)kvc_sin(angle);
    }
}

// A block per token. Of tokens that claim one slot in one forward, any may win.
KVC_KERNEL(SIM_THREADS) kvc_sim_qkv(KVC_PARAM SimParams p) {
    KVC_SHARED float normed[SIM_MAX_WIDTH], partial[SIM_THREADS], qkv[3 * SIM_MAX_WIDTH];
    const int32_t token = (int32_t)kvc_block(), width = sim_width(p);
    if (p.row_of[token] < 0) return;
    sim_norm(p.x + (int64_t)token * width, width, normed, partial);
    for (int32_t c = sim_thread(); c < 3 * width; c += SIM_THREADS) {
        qkv[c] = sim_column(normed, p.qkv, width, 3 * width, c);
    }
    kvc_sync_block();
    const float* turns = p.turns + (int64_t)token * p.head_dim;
    const int64_t slot = p.slot_mapping[token];
    const bool is_written = slot >= 0 && slot < (int64_t)p.n_blocks * p.page_size;
    for (int32_t i = sim_thread(); i < width; i += SIM_THREADS) {
        p.q[(int64_t)token * width + i] = sim_rotated(qkv, turns, i, p.head_dim);
        if (!is_written) continue;
        p.k_cache[slot * width + i] = sim_rotated(qkv + width, turns, i, p.head_dim);
        p.v_cache[slot * width + i] = qkv[2 * width + i];
    }
}

// Attention of one head, by one warp, over 32 keys at a time with a running maximum: a lane scores one key, then mixes
// every 32nd element of the values. mixed [head_dim]; scores and places [32], the warp's own.
KVC_DEVICE void sim_attend_head(const SimParams& p, int32_t row, int32_t n_keys, int32_t head, const float* q,
                                float* mixed, float* scores, int64_t* places) {
    const int32_t lane = (int32_t)kvc_lane(), width = sim_width(p), first = head * p.head_dim;
    const float scale = 1.0f / kvc_sqrt((float)p.head_dim);
    float sums[SIM_MAX_HEAD_DIM / 32] = {}, weight = 0, maximum = SIM_MASKED;
    for (int32_t start = 0; start < n_keys; start += 32) {
        const int32_t n = n_keys - start < 32 ? n_keys - start : 32;
        float score = 0;
        if (lane < n) {
            places[lane] = sim_slot(p, row, start + lane) * width + first;
            const float* key = p.k_cache + places[lane];
            for (int32_t i = 0; i < p.head_dim; ++i) score += q[i] * key[i];
            scores[lane] = score *= scale;
        }
        kvc_sync_warp();
        const float before = maximum;
        for (int32_t k = 0; k < n; ++k) maximum = scores[k] > maximum ? scores[k] : maximum;
        kvc_sync_warp();  // all lanes have read the scores that the next line replaces
        if (lane < n) scores[lane] = kvc_exp(score - maximum);
        kvc_sync_warp();
        const float kept = kvc_exp(before - maximum);
        weight *= kept;
        for (int32_t k = 0; k < n; ++k) weight += scores[k];
#pragma unroll
        for (int32_t j = 0; j < SIM_MAX_HEAD_DIM / 32; ++j) {
            const int32_t i = lane + 32 * j;
            if (i >= p.head_dim) continue;
            sums[j] *= kept;
            for (int32_t k = 0; k < n; ++k) sums[j] += scores[k] * p.v_cache[places[k] + i];
        }
        kvc_sync_warp();  // before the next keys replace weights and places
    }
#pragma unroll
    for (int32_t j = 0; j < SIM_MAX_HEAD_DIM / 32; ++j) {
        const int32_t i = lane + 32 * j;
        if (i < p.head_dim) mixed[i] = sums[j] / weight;
    }
}

// A block per token, a warp per head; a token at position p sees 0..p, as far as its row's table reaches.
KVC_KERNEL(SIM_THREADS) kvc_sim_attend(KVC_PARAM SimParams p) {
    KVC_SHARED float q[SIM_MAX_WIDTH], mixed[SIM_MAX_WIDTH], scores[SIM_WARPS][32];
    KVC_SHARED int64_t places[SIM_WARPS][32];
    const int32_t token = (int32_t)kvc_block(), row = p.row_of[token], width = sim_width(p);
    if (row < 0) return;
    for (int32_t i = sim_thread(); i < width; i += SIM_THREADS) q[i] = p.q[(int64_t)token * width + i];
    kvc_sync_block();
    const int64_t reach = (int64_t)p.max_blocks * p.page_size, n_seen = (int64_t)p.positions[token] + 1;
    const int32_t n_keys = (int32_t)(n_seen < reach ? n_seen : reach), warp = (int32_t)kvc_warp_in_block();
    for (int32_t head = warp; head < p.n_heads; head += SIM_WARPS) {
        const int32_t first = head * p.head_dim;
        sim_attend_head(p, row, n_keys, head, q + first, mixed + first, scores[warp], places[warp]);
    }
    kvc_sync_block();
    for (int32_t c = sim_thread(); c < width; c += SIM_THREADS) {
        p.x[(int64_t)token * width + c] += sim_column(mixed, p.out, width, width, c);
    }
}

// A block per token.
KVC_KERNEL(SIM_THREADS) kvc_sim_mlp(KVC_PARAM SimParams p) {
    KVC_SHARED float normed[SIM_MAX_WIDTH], partial[SIM_THREADS], hidden[SIM_MAX_MLP];
    const int32_t token = (int32_t)kvc_block(), width = sim_width(p);
    if (p.row_of[token] < 0) return;
    float* x = p.x + (int64_t)token * width;
    sim_norm(x, width, normed, partial);
    for (int32_t c = sim_thread(); c < p.mlp; c += SIM_THREADS) {
        hidden[c] = sim_silu(sim_column(normed, p.up, width, p.mlp, c));
    }
    kvc_sync_block();
    for (int32_t c = sim_thread(); c < width; c += SIM_THREADS) x[c] += sim_column(hidden, p.down, p.mlp, width, c);
}

// A block per row; a row without new tokens repeats the token before it, which nobody asks for.
KVC_KERNEL(SIM_THREADS) kvc_sim_sample(KVC_PARAM SimParams p) {
    KVC_SHARED float normed[SIM_MAX_WIDTH], partial[SIM_THREADS];
    KVC_SHARED uint64_t best[SIM_THREADS];
    const int32_t row = (int32_t)kvc_block(), width = sim_width(p), thread = sim_thread();
    const int32_t last = sim_clip(p.query_start_loc[row + 1] - 1, 0, p.tokens - 1);
    sim_norm(p.x + (int64_t)last * width, width, normed, partial);
    best[thread] = 0;
    for (int32_t c = thread; c < p.vocab; c += SIM_THREADS) {
        const float logit = sim_column(normed, p.head, width, p.vocab, c) + p.logit_bias[c];
        p.logits[(int64_t)row * p.vocab + c] = logit;
        const uint64_t rank = sim_rank(logit, c);
        best[thread] = rank > best[thread] ? rank : best[thread];
    }
    kvc_sync_block();
    for (int32_t n = SIM_THREADS / 2; n > 0; n /= 2) {
        if (thread < n && best[thread + n] > best[thread]) best[thread] = best[thread + n];
        kvc_sync_block();
    }
    if (thread == 0) p.next_tokens[row] = (int32_t)(0xffffffffu - (uint32_t)best[0]);
}
