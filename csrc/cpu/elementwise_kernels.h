// All elementwise kernels and their table, for the instruction set whose translation unit includes this, in that
// one's namespace. What is included here includes nothing itself.

#include "vec.h"

extern const Elementwise kElementwise = {
    kLanes,
};
