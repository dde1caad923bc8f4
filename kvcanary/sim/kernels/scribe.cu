// scribe.cu: the cache writes of a model that computes nothing, the bytes of kv_words in kvcanary/sim/scribe.py.
//
// kvc_sim_scribe  K and V of some layers for every new token that a row owns
//
// For long runs of the guard: a forward is this one launch.
#include "device.cuh"

constexpr uint32_t SCRIBE_THREADS = 128;
constexpr uint32_t OF_TOKEN = 0x9E3779B1u, OF_SLOT = 0x85EBCA77u, OF_WORD = 0xC2B2AE3Du, OF_MIX = 0x27D4EB2Fu;

// The twin of PARAMS in kvcanary/sim/cuda_scribe.py.
struct ScribeParams {
    const int32_t* query_start_loc;  // [rows + 1]
    const int32_t* input_ids;        // [tokens]
    const int64_t* slot_mapping;     // [tokens], slots; written to if inside the cache
    uint32_t* const* caches;         // [arrays], each [n_slots, n_words]: K of layer 0, V of layer 0, K of layer 1 ...
    int32_t rows;
    int32_t first_array;
    int32_t n_arrays;
    int32_t n_words;
    int64_t n_slots;
};

// A block per token. Of tokens that claim one slot in one forward, any may win.
KVC_KERNEL(SCRIBE_THREADS) kvc_sim_scribe(KVC_PARAM ScribeParams p) {
    const int32_t token = (int32_t)kvc_block();
    const int64_t slot = p.slot_mapping[token];
    if (token >= p.query_start_loc[p.rows] || slot < 0 || slot >= p.n_slots) return;
    const uint32_t row = (uint32_t)p.input_ids[token] * OF_TOKEN ^ (uint32_t)slot * OF_SLOT;
    for (int32_t i = (int32_t)kvc_thread(); i < p.n_arrays * p.n_words; i += SCRIBE_THREADS) {
        const int32_t array = p.first_array + i / p.n_words, word = i % p.n_words;
        uint32_t value = row ^ (uint32_t)(array * p.n_words + word + 1) * OF_WORD;
        value ^= value >> 15;
        p.caches[array][slot * p.n_words + word] = value * OF_MIX;
    }
}
