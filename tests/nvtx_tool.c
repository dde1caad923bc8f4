/* A tool for NVTX, as Nsight Systems is one: writes what it is told to the file that NVTX_TOOL_LOG names.
   NVTX loads it by NVTX_INJECTION64_PATH. Only the few parts of the interface that kvcanary uses (nvtxTypes.h). */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void (*function)(void);
typedef struct {
    size_t struct_size;
    int (*get_module_table)(int module, function*** table, unsigned* size);
} callbacks;
typedef struct {
    uint16_t version, size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type, reserved;
    uint64_t payload;
    int32_t message_type;
    union {
        const char* ascii;
        const char* registered; /* our own handle: the text itself */
    } message;
} attributes;

enum { CALLBACKS = 1, CORE2 = 5 };
enum { RANGE_PUSH = 4, RANGE_POP = 5, REGISTER_STRING_A = 10, DOMAIN_CREATE_A = 12 };
enum { MESSAGE_ASCII = 1, MESSAGE_REGISTERED = 3 };

static FILE* out;

static void* domain_create(const char* name) { return strdup(name); }
static void* register_string(void* domain, const char* text) {
    (void)domain;
    return strdup(text);
}
static int push(void* domain, const attributes* a) {
    const char* text = a->message_type == MESSAGE_REGISTERED || a->message_type == MESSAGE_ASCII ? a->message.ascii : "?";
    fprintf(out, "push %s: %s\n", domain ? (const char*)domain : "none", text);
    fflush(out);
    return 0;
}
static int pop(void* domain) {
    fprintf(out, "pop %s\n", domain ? (const char*)domain : "none");
    fflush(out);
    return 0;
}

int InitializeInjectionNvtx2(const void* (*get_export_table)(uint32_t)) {
    const callbacks* c = get_export_table(CALLBACKS);
    function** table = NULL;
    unsigned size = 0;
    const char* path = getenv("NVTX_TOOL_LOG");
    if (!c || !path || !c->get_module_table(CORE2, &table, &size) || size <= DOMAIN_CREATE_A) return 0;
    out = fopen(path, "a");
    if (!out) return 0;
    *table[RANGE_PUSH] = (function)push;
    *table[RANGE_POP] = (function)pop;
    *table[REGISTER_STRING_A] = (function)register_string;
    *table[DOMAIN_CREATE_A] = (function)domain_create;
    return 1;
}
