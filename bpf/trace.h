/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * What the traced variant of a datapath's programs has besides: each tells a ring buffer of every
 * packet when it comes and when it goes, with the verdict and what it was counted as. The variant is
 * made of the same text (`testbed/bpf/bytecode.py`), and stands in for the ordinary programs of one
 * pod while somebody looks; those have nothing of this.
 */

#define SNAP	   1536 /* bytes of a packet that are kept */
#define RING_PAGES 2048

struct event {
	u64 time_ns; /* CLOCK_MONOTONIC, of the arrival: the same when it goes */
	u32 length;
	u32 kept;
	s32 verdict;
	u16 reason; /* that it was counted as last, plus one; 0: none */
	u8 program; /* number of the program in the file */
	u8 n;	    /* guest whose port it is at; 0: none */
	u8 goes;
	u8 slot;
	u8 padding[6];
	u8 packet[SNAP];
};

BPF_RINGBUF_OUTPUT(events, RING_PAGES);
BPF_PERCPU_ARRAY(missed, u64, 1); /* events for which the ring had no room */

static __always_inline void tell(struct __sk_buff *skb, u64 time_ns, u8 program, int verdict,
				 bool goes)
{
	struct event *event = events.ringbuf_reserve(sizeof(struct event));
	struct here here = where(skb);
	u32 zero = 0, *reason = noted.lookup(&zero);
	s64 kept = skb->len;
	int failed;

	if (!event) {
		u64 *count = missed.lookup(&zero);

		if (count)
			*count += 1;
		return;
	}
	event->time_ns = time_ns;
	event->length = skb->len;
	event->verdict = verdict;
	event->reason = reason ? *reason : 0;
	event->program = program;
	event->n = here.n;
	event->slot = here.slot;
	event->goes = goes;
	if (kept > SNAP)
		kept = SNAP;
	hide(kept); /* else the compiler makes one test of both, by another register */
	failed = kept > 0 ? bpf_skb_load_bytes(skb, 0, event->packet, kept) : -1;
	event->kept = failed ? 0 : kept;
	events.ringbuf_submit(event, 0);
}
