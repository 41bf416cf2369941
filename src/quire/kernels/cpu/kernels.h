/* What the kernel files share. Every exported function returns 0, or a positive code that library.py
 * turns into an error; none writes outside the tensors it was given. */
#ifndef QUIRE_KERNELS_H
#define QUIRE_KERNELS_H

#include <stdlib.h>

#include "vec.h"

/* Elements below which waking the other threads costs more than it brings. */
#define SMALL_WORK 16384

/* Keys per attention step, aligned to absolute positions. */
#define TILE 16

#endif
