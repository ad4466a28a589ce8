/* Vectors of one instruction set, and the kernels by them. kernels.c defines before each inclusion:

   LEVEL(name)    names of its functions and types
   TARGET         which instructions they may use
   WIDTH          numbers of a vector
   VECTORS        vectors (2 or 4) of each of BLOCK rows whose sums are kept in registers
   EXCHANGES      the steps of a transpose of WIDTH × WIDTH
   STREAM(to, x)  writes a vector by a non-temporal store; `to` is aligned to the vector */

#define Lanes LEVEL(lanes)
#define Ints LEVEL(ints)
#define Bits LEVEL(bits)
#define Halves LEVEL(halves)
#define Loose LEVEL(loose)
typedef float Lanes __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
typedef float Loose __attribute__((vector_size(4 * WIDTH), aligned(1), may_alias)); /* anywhere in memory */

INLINE TARGET Lanes LEVEL(either)(Ints mask, Lanes a, Lanes b) {
    return (Lanes)(((Ints)a & mask) | ((Ints)b & ~mask));
}

INLINE TARGET Lanes LEVEL(load)(const char *from, int64_t dtype) {
    Lanes x;
    if (dtype == FLOAT32) return *(const Loose *)from;
    Halves h;
    memcpy(&h, from, sizeof h);
    Bits bits = __builtin_convertvector(h, Bits);
    if (dtype == BFLOAT16) return (Lanes)(bits << 16);
    Bits magnitude = (bits & 0x7fff) << 13;
    Lanes finite = (Lanes)magnitude * 0x1p112f; /* moves the exponent's bias, of denormals too */
    Lanes other = (Lanes)(magnitude | 0x7f800000);
    x = LEVEL(either)((bits & 0x7c00) == 0x7c00, other, finite);
    return (Lanes)((Bits)x | (bits & 0x8000) << 16);
}

/* Rounds to nearest, ties to even. */
INLINE TARGET void LEVEL(store)(char *to, Lanes x, int64_t dtype) {
    if (dtype == FLOAT32) {
        *(Loose *)to = x;
        return;
    }
    Bits bits = (Bits)x, result;
    if (dtype == BFLOAT16) {
        result = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        result = (Bits)LEVEL(either)(x != x, (Lanes)((bits >> 16) | 0x40), (Lanes)result);
    } else {
        Bits magnitude = bits & 0x7fffffff;
        Bits normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
        Bits small = (Bits)((Lanes)magnitude + 0.5f) - 0x3f000000; /* the sum rounds a denormal */
        Bits large = 0x7c00 | ((Bits)(x != x) & 0x200);
        result = (Bits)LEVEL(either)((Ints)(magnitude < 0x38800000), (Lanes)small, (Lanes)normal);
        result = (Bits)LEVEL(either)((Ints)(magnitude >= 0x477ff000), (Lanes)large, (Lanes)result);
        result |= (bits >> 16) & 0x8000;
    }
    Halves h = __builtin_convertvector(result, Halves);
    memcpy(to, &h, sizeof h);
}

#include "axial_attention.h"
#include "slice_attention.h"
#include "group_norm.h"

#undef Lanes
#undef Ints
#undef Bits
#undef Halves
#undef Loose
#undef LEVEL
#undef TARGET
#undef WIDTH
#undef VECTORS
#undef EXCHANGES
#undef STREAM
