/* AMX on processors without it: a handler of SIGILL that carries out the tile instructions, one by one.
 *
 * So the machine code of the AMX kernels runs on any x86-64 with AVX-512: their configuration, strides, operand order
 * and register numbers are tested without the hardware. Instructions, their encodings and their arithmetic are those
 * of Intel's SDM, volume 2 (LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TILERELEASE, TDPBF16PS, TDPBSUD); what would be a #UD or
 * #GP there ends the program here. Written apart from tiles.h, in scalar code, so that one can check the other. */
#define _GNU_SOURCE
#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

typedef struct {
  uint8_t config[64];
  uint8_t data[8][16][64];
  int is_configured;
} amx_state;

static __thread amx_state amx;
static long amx_count; /* instructions carried out */

static void amx_fault(const char *what) {
  fprintf(stderr, "AMX fault: %s\n", what);
  _exit(98);
}

static int amx_rows(int n) { return amx.config[48 + n]; }
static int amx_bytes(int n) { return amx.config[16 + 2 * n] | amx.config[17 + 2 * n] << 8; }

static void amx_need(int n) {
  if (!amx.is_configured) amx_fault("a tile is used without a configuration");
  if (n > 7 || !amx_rows(n) || !amx_bytes(n)) amx_fault("a tile without a shape");
}

static void amx_configure(const uint8_t *from) {
  if (from[0] != 1) amx_fault("palette");
  for (int i = 1; i < 16; i++)
    if (from[i]) amx_fault("a reserved byte of the configuration");
  for (int i = 32; i < 48; i++)
    if (from[i]) amx_fault("tiles 8-15");
  for (int i = 56; i < 64; i++)
    if (from[i]) amx_fault("tiles 8-15");
  memset(&amx, 0, sizeof amx);
  memcpy(amx.config, from, 64);
  for (int n = 0; n < 8; n++)
    if (amx_rows(n) > 16 || amx_bytes(n) > 64) amx_fault("a tile that is too large");
  amx.is_configured = 1;
}

static float amx_flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }

static float amx_widen(const uint8_t *half) {
  const uint32_t bits = (uint32_t)half[0] << 16 | (uint32_t)half[1] << 24;
  float x;
  memcpy(&x, &bits, 4);
  return amx_flush(x);
}

static void amx_check_product(int c, int a, int b) {
  amx_need(a), amx_need(b), amx_need(c);
  if (a == b || a == c || b == c) amx_fault("the same tile twice");
  if (amx_rows(c) != amx_rows(a) || amx_bytes(c) != amx_bytes(b) || amx_bytes(a) / 4 != amx_rows(b) || amx_bytes(a) % 4)
    amx_fault("shapes that do not fit");
}

static void amx_dot_bytes(int c, int a, int b) {
  amx_check_product(c, a, b);
  for (int m = 0; m < amx_rows(c); m++)
    for (int n = 0; n < amx_bytes(c) / 4; n++) {
      int32_t total;
      memcpy(&total, &amx.data[c][m][4 * n], 4);
      for (int k = 0; k < amx_rows(b); k++)
        for (int i = 0; i < 4; i++) total += (int8_t)amx.data[a][m][4 * k + i] * (int)amx.data[b][k][4 * n + i];
      memcpy(&amx.data[c][m][4 * n], &total, 4);
    }
}

static void amx_dot(int c, int a, int b) {
  amx_check_product(c, a, b);
  for (int m = 0; m < amx_rows(c); m++)
    for (int n = 0; n < amx_bytes(c) / 4; n++) {
      float sums[2] = {0, 0}, total;
      for (int k = 0; k < amx_rows(b); k++)
        for (int half = 0; half < 2; half++)
          sums[half] = amx_flush(fmaf(amx_widen(&amx.data[a][m][4 * k + 2 * half]),
                                      amx_widen(&amx.data[b][k][4 * n + 2 * half]), sums[half]));
      memcpy(&total, &amx.data[c][m][4 * n], 4);
      total = amx_flush(amx_flush(total) + amx_flush(sums[0] + sums[1]));
      memcpy(&amx.data[c][m][4 * n], &total, 4);
    }
}

typedef struct {
  const uint8_t *next;
  int mod, reg, rm, base, index, scale;
  uint64_t address; /* without base and index if `reg` is a tile: then it is base + displacement, and stride the index */
  int64_t stride;
} amx_operand;

static uint64_t amx_register(const ucontext_t *context, int n) {
  static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return (uint64_t)context->uc_mcontext.gregs[order[n]];
}

/* Decodes a ModRM byte at `at` and what belongs to it. high: the inverted R, X and B bits of the prefix. */
static amx_operand amx_decode(const ucontext_t *context, const uint8_t *at, int high) {
  amx_operand o = {.mod = *at >> 6, .reg = *at >> 3 & 7, .rm = *at & 7};
  at++;
  int32_t displacement = 0;
  if (o.mod == 3) {
    o.next = at;
    return o;
  }
  int has_base = 1, relative = 0, size = o.mod == 1 ? 1 : o.mod == 2 ? 4 : 0;
  int base = o.rm;
  if (o.rm == 4) {
    base = *at & 7;
    const int index = (*at >> 3 & 7) | (high & 2 ? 0 : 8);
    if (index != 4) o.stride = (int64_t)amx_register(context, index) << (*at >> 6);
    at++;
    if (base == 5 && o.mod == 0) has_base = 0, size = 4;
  } else if (o.rm == 5 && o.mod == 0) {
    has_base = 0, relative = 1, size = 4;
  }
  if (size == 1) displacement = (int8_t)*at;
  if (size == 4) memcpy(&displacement, at, 4);
  o.next = at + size;
  o.address = (uint64_t)(int64_t)displacement;
  if (has_base) o.address += amx_register(context, base | (high & 1 ? 0 : 8));
  if (relative) o.address += (uint64_t)o.next;
  return o;
}

static void amx_handle(int number, siginfo_t *info, void *data) {
  (void)number, (void)info;
  ucontext_t *context = data;
  const uint8_t *at = (const uint8_t *)context->uc_mcontext.gregs[REG_RIP];
  if (at[0] != 0xc4 || (at[1] & 31) != 2 || at[2] & 0x84) amx_fault("not a tile instruction");
  const int high = at[1] >> 5, prefix = at[2] & 3, code = at[3], source = ~(at[2] >> 3) & 15;
  const amx_operand o = amx_decode(context, at + 4, high);
  if (code == 0x49 && o.mod == 3 && prefix == 0) {
    memset(&amx, 0, sizeof amx);
  } else if (code == 0x49 && o.mod == 3 && prefix == 3) {
    amx_need(o.reg);
    memset(amx.data[o.reg], 0, sizeof amx.data[0]);
  } else if (code == 0x49 && o.mod != 3 && prefix == 0) {
    amx_configure((const uint8_t *)(o.address + (uint64_t)o.stride));
  } else if (code == 0x4b && o.mod != 3 && o.rm == 4 && (prefix == 3 || prefix == 2)) {
    amx_need(o.reg);
    if (prefix == 3) memset(amx.data[o.reg], 0, sizeof amx.data[0]);
    for (int r = 0; r < amx_rows(o.reg); r++) {
      uint8_t *there = (uint8_t *)(o.address + (uint64_t)(o.stride * r));
      if (prefix == 3)
        memcpy(amx.data[o.reg][r], there, (size_t)amx_bytes(o.reg));
      else
        memcpy(there, amx.data[o.reg][r], (size_t)amx_bytes(o.reg));
    }
  } else if (code == 0x5c && o.mod == 3 && prefix == 2) {
    amx_dot(o.reg, o.rm, source);
  } else if (code == 0x5e && o.mod == 3 && prefix == 2) {
    amx_dot_bytes(o.reg, o.rm, source);
  } else {
    amx_fault("an instruction that is not known here");
  }
  __atomic_fetch_add(&amx_count, 1, __ATOMIC_RELAXED);
  context->uc_mcontext.gregs[REG_RIP] = (greg_t)o.next;
}

#ifdef AMX_EXPORTED /* for a library that Python loads */
int amx_instructions(void) { return (int)amx_count; }
#else
static
#endif
void amx_emulate(void) {
  struct sigaction action = {.sa_sigaction = amx_handle, .sa_flags = SA_SIGINFO};
  sigaction(SIGILL, &action, NULL);
}
