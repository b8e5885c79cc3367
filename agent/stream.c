// SPDX-License-Identifier: Apache-2.0
/*
 * Sends and receives streams, for either end. A stream of given length ends when all its bytes are
 * moved, and all of them are checked. Others are ended by the client. Scoring begins when the
 * warm-up is over by the receiver's clock, after the arrival that ends it, which is not counted.
 */
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "agent.h"

#define BATCH 32 /* datagrams of one call at most */

int tcp_send(int fd, const struct order *o, uint64_t until_ns, const atomic_bool *stop)
{
	uint64_t sent = 0;

	while (o->bytes ? sent < o->bytes : now_ns() < until_ns) {
		size_t length = o->bytes ? MIN(o->size, o->bytes - sent) : o->size;
		ssize_t n = send_some(fd, pattern_at(o->phase + sent), length, stop);

		if (n < 0)
			return errno;
		sent += n;
	}
	return 0;
}

void score_start(struct score *s, const struct order *o)
{
	*s = (struct score){.measuring = !o->warmup_ns, .begin_ns = now_ns()};
	s->first_ns = s->last_ns = s->begin_ns;
}

/* Notes the time of an arrival. Returns whether it is to be counted. */
static bool score_time(struct score *s, const struct order *o)
{
	uint64_t now = now_ns();

	s->last_ns = now;
	if (s->measuring)
		return true;
	s->first_ns = now;
	s->measuring = now >= s->begin_ns + o->warmup_ns;
	return false;
}

int tcp_receive(int fd, const struct order *o, uint64_t until_ns, struct score *s, void *buffer,
		const atomic_bool *stop)
{
	score_start(s, o);
	for (uint64_t nth = 0; s->last_ns < until_ns; nth++) {
		ssize_t got = receive_some(fd, buffer, CHUNK, stop);

		if (got < 0)
			return errno;
		if (!got)
			break;
		if (!intact(buffer, got, o->phase + s->total, o->bytes || !s->measuring, nth))
			s->is.corrupt++;
		s->total += got;
		if (score_time(s, o))
			s->is.bytes += got;
	}
	s->is.elapsed_ns = s->last_ns - s->first_ns;
	return 0;
}

int datagram_send(int fd, const union address *to, enum datagram_type type, uint32_t flow,
		  uint64_t sequence, const void *body, size_t length)
{
	struct datagram head = {htonl(MAGIC ^ type), htonl(flow), htobe64(sequence)};

	return send_both(fd, &head, sizeof(head), body, length, to);
}

enum datagram_type datagram_type(const struct datagram *head, ssize_t length)
{
	return length < (ssize_t)sizeof(*head) ? 0 : ntohl(head->type) ^ MAGIC;
}

void score_datagram(struct score *s, const struct order *o, const struct datagram *head,
		    size_t length)
{
	uint64_t sequence = be64toh(head->sequence);
	bool late = sequence < s->next;

	if (!intact(head + 1, length - sizeof(*head), o->phase + sequence * o->size,
		    o->bytes || !s->measuring, s->total))
		s->is.corrupt++;
	s->total++;
	if (!late)
		s->next = sequence + 1;
	if (score_time(s, o)) {
		s->is.bytes += length;
		s->is.datagrams++;
		s->is.reordered += late; /* or duplicated */
	} else {
		s->first_sequence = s->next;
	}
}

/* `sent`: number of datagrams that were sent, with the warm-up; 0: not known. */
void score_finish(struct score *s, uint64_t sent)
{
	uint64_t expected = (sent > s->next ? sent : s->next) - s->first_sequence;

	s->is.lost = expected > s->is.datagrams ? expected - s->is.datagrams : 0;
	s->is.elapsed_ns = s->last_ns - s->first_ns;
}

/* A client's sender reads its socket itself. At a server, the one reader sets `heard_ns`. */
static void listen_for_life(struct sender *s, uint64_t now)
{
	struct datagram head;

	while (recv(s->fd, &head, sizeof(head), MSG_DONTWAIT) > 0)
		s->heard_ns = now;
}

/*
 * sys/socket.h declares it only with _GNU_SOURCE. Weak, since OSv lacks it. UDP_SEGMENT would be
 * faster by far, but a datapath would see one packet of many datagrams, and its cost of a packet
 * would hardly be in the rate.
 */
struct mmsghdr {
	struct msghdr msg_hdr;
	unsigned msg_len;
};
extern int sendmmsg(int fd, struct mmsghdr *messages, unsigned count, int flags)
	__attribute__((weak));

/* Sends datagrams of type DATA, several by one call. Returns their number, or -1 with errno. */
static int send_data(const struct sender *s, uint64_t wanted)
{
	const struct order *o = &s->order;
	size_t body = o->size - sizeof(struct datagram);
	unsigned count = sendmmsg ? MIN(wanted, BATCH) : 1;
	struct mmsghdr message[BATCH];
	struct datagram head[BATCH];
	struct iovec part[BATCH][2];

	for (unsigned i = 0; i < count; i++) {
		uint64_t nth = s->sent + i;

		head[i] = (struct datagram){htonl(MAGIC ^ DATA), htonl(s->flow), htobe64(nth)};
		part[i][0] = (struct iovec){&head[i], sizeof(head[i])};
		part[i][1] = (struct iovec){(void *)pattern_at(o->phase + nth * o->size), body};
		message[i].msg_hdr =
			(struct msghdr){.msg_iov = part[i], .msg_iovlen = body ? 2 : 1};
		if (s->to) {
			message[i].msg_hdr.msg_name = (void *)s->to;
			message[i].msg_hdr.msg_namelen = address_size(s->to);
		}
	}
	if (sendmmsg)
		return sendmmsg(s->fd, message, count, MSG_NOSIGNAL);
	return sendmsg(s->fd, &message[0].msg_hdr, MSG_NOSIGNAL) < 0 ? -1 : 1;
}

int udp_send(struct sender *s, uint64_t until_ns)
{
	const struct order *o = &s->order;
	uint64_t datagrams = o->bytes ? (o->bytes + o->size - 1) / o->size : UINT64_MAX;
	uint64_t begin = now_ns(), progress = begin, listened = begin;
	double gap_ns = o->rate_bps ? (double)o->size * 8 * SECOND_NS / o->rate_bps : 0;

	while (s->sent < datagrams) {
		uint64_t heard = s->heard_ns, now = now_ns();
		uint64_t due = begin + (uint64_t)(s->sent * gap_ns), wanted = datagrams - s->sent;
		int sent;

		if (now >= until_ns)
			break;
		if (!heard || (now > heard && now - heard > LIMIT_NS))
			return EAGAIN;
		if (!s->to && now - listened > TICK_NS) {
			listen_for_life(s, now);
			listened = now;
		}
		if (gap_ns && now > due + LATE_NS) {
			begin += now - due - LATE_NS;
			due = now - LATE_NS;
		}
		if (due > now) {
			pause_ns(MIN(due - now, TICK_NS));
			progress = now;
			continue;
		}
		if (gap_ns)
			wanted = MIN(wanted, 1 + (uint64_t)((now - due) / gap_ns));
		sent = send_data(s, wanted);
		if (sent > 0) {
			s->sent += sent;
			progress = now;
		} else if (errno != ENOBUFS && errno != EAGAIN && errno != EINTR) {
			return errno;
		} else if (now - progress > LIMIT_NS) {
			return EAGAIN;
		} else {
			pause_ns(50000); /* the queue of the interface is full; it will drain */
		}
	}
	return 0;
}
