/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * What every set of programs includes: the licence, the declaration of entry points, return values.
 *
 * bcc compiles a set as one text (testbed/bpf/bytecode.py). It predefines u8 to u64, bool,
 * offsetof, byte order, the kernel's helpers (bpf_*) and the macros that define maps.
 */

#ifndef TESTBED_COMMON_H
#define TESTBED_COMMON_H

#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>

/* The kernel takes only this spelling as GPL compatible. */
/* clang-format off */
#define BPF_LICENSE Dual BSD/GPL
/* clang-format on */

/* Entry points, declared at the end of a file. PROGRAM makes one that calls a function. Its own
 * name is TYPE__NAME (sched_cls__lo_egress): bytecode.py asks bcc for the names of a set's
 * functions, and takes type and name of the program from them. A cgroup program has the name of its
 * attach type.
 *
 * With TRACED, trace.h declares tc programs in its own way.
 */
#define PROGRAM(type, context, name)                                                               \
	int type##__##name(struct context *ctx)                                                    \
	{                                                                                          \
		return name(ctx);                                                                  \
	}

#ifndef TRACED
#define TC_PROGRAM(name)                                                                           \
	int sched_cls__##name(struct __sk_buff *skb)                                               \
	{                                                                                          \
		return let_others_see(name(skb));                                                  \
	}
#endif
#define SOCK_ADDR_PROGRAM(name) PROGRAM(cgroup_sock_addr, bpf_sock_addr, name)
#define SOCKOPT_PROGRAM(name)	PROGRAM(cgroup_sockopt, bpf_sockopt, name)

#define SYS_PROCEED		1 /* a cgroup program lets the system call go on */

/* The verdict of a tc program: what it lets pass goes on to the programs of others behind it. */
static __always_inline int let_others_see(int verdict)
{
	return verdict == TC_ACT_OK ? TC_ACT_UNSPEC : verdict;
}

/* Hides from the compiler what it knows about a value. It then keeps a bound that it could prove,
 * but the verifier cannot, in the code.
 */
#define barrier_var(value) asm volatile("" : "+r"(value))

/* Keeps the compiler from moving reads and writes of memory to its other side. */
#define barrier_memory()   asm volatile("" ::: "memory")

#endif
