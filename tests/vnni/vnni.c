/* AVX-VNNI on a CPU that has AVX2 only: to be preloaded into a process whose libraries were patched by run.py.
 *
 * Illegal instructions raise SIGILL; its handler computes what they mean and steps over them:
 *   ud2 in place of cpuid    cpuid, with AVX-VNNI added to leaf 7.1
 *   vpdpbusd, vpdpbusds      dot products of 4 u8 with 4 s8, added in 32 bits, without and with saturation
 *   vpdpwssd, vpdpwssds      the same of 2 s16
 * in their VEX encodings, as oneDNN's avx2_vnni kernels use them (Intel SDM, volume 2). */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

enum { LEGACY_XMM = 160, XSTATE_BV = 512, HIGH_YMM = 576 }; /* of the XSAVE area, in its standard form */
enum { SSE = 2, AVX = 4, AVX_VNNI = 1 << 4 };

static const int REGISTERS[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

static void read_vector(const uint8_t *area, int number, uint8_t *into) {
    memcpy(into, area + LEGACY_XMM + 16 * number, 16);
    memcpy(into + 16, area + HIGH_YMM + 16 * number, 16);
}

static void emulate_cpuid(greg_t *regs) {
    uint32_t leaf = regs[REG_RAX], subleaf = regs[REG_RCX], a, b, c, d;
    __cpuid_count(leaf, subleaf, a, b, c, d);
    if (leaf == 7 && subleaf == 0 && a < 1) a = 1; /* the number of its last subleaf */
    if (leaf == 7 && subleaf == 1) a |= AVX_VNNI;
    regs[REG_RAX] = a, regs[REG_RBX] = b, regs[REG_RCX] = c, regs[REG_RDX] = d;
    regs[REG_RIP] += 2;
}

static int is_dot_product(const uint8_t *p) { /* VEX.66.0F38.W0 50..53 */
    return p[0] == 0xc4 && (p[1] & 0x1f) == 2 && (p[2] & 0x83) == 1 && p[3] >= 0x50 && p[3] <= 0x53;
}

/* Return where the operand in memory lies, and move `at` behind its encoding. */
static uint64_t address(const uint8_t **at, int modrm, int x, int b, const greg_t *regs) {
    const uint8_t *p = *at;
    int mod = modrm >> 6, rm = modrm & 7, relative = mod == 0 && rm == 5;
    uint64_t found = 0;
    if (rm == 4) {
        int sib = *p++, index = ((sib >> 3) & 7) | x << 3, base = sib & 7;
        if (index != 4) found += (uint64_t)regs[REGISTERS[index]] << (sib >> 6);
        if (base == 5 && mod == 0) found += *(const int32_t *)p, p += 4;
        else found += regs[REGISTERS[base | b << 3]];
    } else if (relative) {
        found += *(const int32_t *)p, p += 4;
    } else {
        found += regs[REGISTERS[rm | b << 3]];
    }
    if (mod == 1) found += *(const int8_t *)p, p += 1;
    if (mod == 2) found += *(const int32_t *)p, p += 4;
    *at = p;
    return relative ? found + (uint64_t)p : found;
}

static void emulate_dot_product(const uint8_t *p, greg_t *regs, uint8_t *area) {
    int r = !(p[1] & 0x80), x = !(p[1] & 0x40), b = !(p[1] & 0x20), wide = p[2] >> 2 & 1;
    int op = p[3], modrm = p[4], target = (modrm >> 3 & 7) | r << 3;
    const uint8_t *after = p + 5;
    uint64_t *state = (uint64_t *)(area + XSTATE_BV);
    if (!(*state & SSE)) memset(area + LEGACY_XMM, 0, 256); /* registers in their initial state were not saved */
    if (!(*state & AVX)) memset(area + HIGH_YMM, 0, 256);
    *state |= SSE | AVX;
    uint8_t first[32], second[32], sums[32];
    read_vector(area, target, sums);
    read_vector(area, ~(p[2] >> 3) & 15, first);
    if (modrm >> 6 == 3) read_vector(area, (modrm & 7) | b << 3, second);
    else memcpy(second, (const void *)address(&after, modrm, x, b, regs), wide ? 32 : 16);
    for (int lane = 0; lane < (wide ? 8 : 4); lane++) {
        int64_t sum = ((int32_t *)sums)[lane];
        if (op < 0x52)
            for (int i = 4 * lane; i < 4 * lane + 4; i++) sum += first[i] * (int8_t)second[i];
        else
            for (int i = 2 * lane; i < 2 * lane + 2; i++) sum += ((int16_t *)first)[i] * ((int16_t *)second)[i];
        if (op & 1) sum = sum > INT32_MAX ? INT32_MAX : sum < INT32_MIN ? INT32_MIN : sum;
        ((int32_t *)sums)[lane] = (int32_t)sum;
    }
    memcpy(area + LEGACY_XMM + 16 * target, sums, 16);
    if (wide) memcpy(area + HIGH_YMM + 16 * target, sums + 16, 16);
    else memset(area + HIGH_YMM + 16 * target, 0, 16);
    regs[REG_RIP] = (greg_t)after;
}

static void on_illegal(int signal_number, siginfo_t *info, void *context) {
    mcontext_t *machine = &((ucontext_t *)context)->uc_mcontext;
    const uint8_t *p = (const uint8_t *)machine->gregs[REG_RIP];
    (void)info;
    if (p[0] == 0x0f && p[1] == 0x0b) emulate_cpuid(machine->gregs);
    else if (is_dot_product(p)) emulate_dot_product(p, machine->gregs, (uint8_t *)machine->fpregs);
    else signal(signal_number, SIG_DFL); /* it is raised again, and ends the process */
}

__attribute__((constructor)) static void install(void) {
    struct sigaction action = {.sa_sigaction = on_illegal, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGILL, &action, 0);
}
