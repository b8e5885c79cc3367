// SPDX-License-Identifier: Apache-2.0
/* Functions of OSv's kernel that the shim wraps. */
#ifndef TESTBED_SHIM_KERNEL_H
#define TESTBED_SHIM_KERNEL_H

#include <dlfcn.h>

/* The kernel's own function, which comes after this library in OSv's search order. */
#define KERNEL(name)                                                                               \
	({                                                                                         \
		static __typeof__(&name) function;                                                 \
		if (!function)                                                                     \
			function = dlsym(RTLD_NEXT, #name);                                        \
		function;                                                                          \
	})

#endif
