/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * The traced variant of a datapath's tc programs: each writes an event to a ring buffer when a
 * packet arrives and when it leaves, with the verdict and the reason that it was counted under.
 *
 * The variant is compiled from the same files with TRACED defined (testbed/bpf/bytecode.py). It
 * replaces the programs of one pod while somebody traces it. Without TRACED nothing of this is
 * compiled.
 */

#ifndef TESTBED_TRACE_H
#define TESTBED_TRACE_H

#include <uapi/linux/bpf.h>

#include "common.h"
#include "maps.h"

#define SNAP_BYTES	  1536 /* of a packet that an event has */
#define RING_PAGES	  2048
#define PROGRAM_NAME_SIZE 16 /* as the kernel's BPF_OBJ_NAME_LEN */

/* testbed/pods/observe/trace.py reads these. */
struct event {
	u64 time_ns; /* CLOCK_MONOTONIC, of the arrival, in both events of a packet */
	u32 length;  /* of the packet */
	u32 snapped; /* bytes in `packet` */
	s32 verdict; /* if it leaves */
	u16 reason;  /* that the packet was counted under last, plus one; 0: none */
	u8 n;	     /* of the guest whose port it is; 0: none */
	u8 leaves;
	char program[PROGRAM_NAME_SIZE];
	u8 slot;
	u8 padding[7];
	u8 packet[SNAP_BYTES];
};

BPF_RINGBUF_OUTPUT(events, RING_PAGES);
BPF_PERCPU_ARRAY(lost_events, u64, 1); /* events that the ring had no room for */

static __always_inline void emit_event(struct __sk_buff *skb, const char *program, u64 time_ns,
				       int verdict, bool leaves)
{
	struct event *event = events.ringbuf_reserve(sizeof(struct event));
	struct port port = port_of(skb);
	u32 zero = 0, *reason = last_reason.lookup(&zero);
	s64 snapped = skb->len;
	int failed;

	if (!event) {
		u64 *count = lost_events.lookup(&zero);

		if (count)
			*count += 1;
		return;
	}
	event->time_ns = time_ns;
	event->length = skb->len;
	event->verdict = verdict;
	event->reason = reason ? *reason : 0;
	__builtin_memcpy(event->program, program, PROGRAM_NAME_SIZE);
	event->n = port.n;
	event->slot = port.slot;
	event->leaves = leaves;
	if (snapped > SNAP_BYTES)
		snapped = SNAP_BYTES;
	barrier_var(snapped); /* else the compiler tests both bounds at once in another register */
	failed = snapped > 0 ? bpf_skb_load_bytes(skb, 0, event->packet, snapped) : -1;
	event->snapped = failed ? 0 : snapped;
	events.ringbuf_submit(event, 0);
}

#define TC_PROGRAM(name)                                                                           \
	int sched_cls__##name(struct __sk_buff *skb)                                               \
	{                                                                                          \
		const char program[PROGRAM_NAME_SIZE] = #name;                                     \
		u64 time_ns = bpf_ktime_get_ns();                                                  \
		int verdict;                                                                       \
                                                                                                   \
		set_last_reason(0);                                                                \
		emit_event(skb, program, time_ns, 0, false);                                       \
		verdict = name(skb);                                                               \
		emit_event(skb, program, time_ns, verdict, true);                                  \
		return let_others_see(verdict);                                                    \
	}

#endif
