// SPDX-License-Identifier: Apache-2.0
/*
 * Requests at a given rate: an open loop. A request leaves when it is due, over the stream's one
 * connection, whether those before it are answered or not. So responses do not slow requests down,
 * and a queue that grows is seen. A request is timed from when it was due, also if it could not be
 * sent then: timing from when it was sent would leave out how long it waited for that ("coordinated
 * omission", G. Tene).
 *
 * A table has the times at which requests were due. Over TCP they are answered in order. Over UDP
 * the number of a datagram tells which one is answered.
 *
 * One thread sends and receives. It waits in ppoll() while a response is due, which may be computed
 * on the same CPU, and else as `wait_until` does.
 */
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>

#include "agent.h"

/* Requests are counted from 0. Of those that were due, the ones in the table are `entered`. */
struct loop {
	struct stream *s;
	uint64_t begin_ns, scored_ns, until_ns; /* the first is due; the first that is scored */
	uint64_t count;				/* requests at most */
	uint64_t due, entered, answered, dropped;
	uint64_t sent;	   /* TCP: bytes; UDP: datagrams */
	uint64_t received; /* TCP: bytes */
	uint64_t reads;
	uint64_t first_ns, progress_ns; /* the first scored one was due; last response */
};

static uint64_t due_ns(const struct loop *l)
{
	return l->begin_ns + l->due * l->s->run->gap_ns;
}

static uint64_t *entry(const struct loop *l, uint64_t number)
{
	return &l->s->due_ns[number % MAX_PENDING];
}

static uint64_t outstanding(const struct loop *l)
{
	return l->entered - l->answered - l->dropped;
}

static bool over(const struct loop *l)
{
	return l->due == l->count || due_ns(l) >= l->until_ns;
}

/* No longer waits for a response. */
static void drop(struct loop *l, uint64_t *at)
{
	l->s->unanswered += *at >= l->scored_ns;
	*at = 0;
	l->dropped++;
}

/*
 * Enters the requests that are due. If the table is full of those that could not be sent, or of
 * those that TCP has not answered, a request is not sent. If UDP has not answered one while so many
 * others were sent, its place is taken.
 */
static void enter(struct loop *l, uint64_t now)
{
	bool udp = l->s->run->endpoint.udp;

	for (uint64_t at; !over(l) && (at = due_ns(l)) <= now; l->due++) {
		uint64_t waiting = l->entered - (udp ? l->sent : l->answered);

		if (at >= l->scored_ns && !l->first_ns)
			l->first_ns = at;
		if (waiting == MAX_PENDING) {
			l->s->unsent += at >= l->scored_ns;
			continue;
		}
		if (*entry(l, l->entered))
			drop(l, entry(l, l->entered));
		if (!outstanding(l))
			l->progress_ns = now;
		*entry(l, l->entered++) = at;
	}
}

static int send_some_now(struct loop *l, const void *data, size_t length)
{
	ssize_t sent = send(l->s->fd, data, length, MSG_NOSIGNAL | MSG_DONTWAIT);

	if (sent < 0)
		return would_block(errno) || errno == ENOBUFS || errno == EINTR ? 0 : -1;
	l->sent += l->s->run->endpoint.udp ? 1 : sent;
	return sent;
}

static bool all_sent(const struct loop *l)
{
	uint64_t size = l->s->run->endpoint.udp ? 1 : l->s->order.size;

	return l->sent == l->entered * size;
}

/* Sends what the socket takes. Returns -1 with errno on failure. */
static int send_entered(struct loop *l)
{
	struct stream *s = l->s;
	uint32_t size = s->order.size;
	int sent = 1;

	while (sent > 0 && !all_sent(l)) {
		if (s->run->endpoint.udp) {
			*s->request = (struct datagram){htonl(MAGIC ^ REQUEST), htonl(s->flow),
							htobe64(l->sent)};
			memcpy(s->request + 1, pattern_at(s->order.phase + l->sent * size),
			       size - sizeof(*s->request));
			sent = send_some_now(l, s->request, size);
		} else {
			sent = send_some_now(l, pattern_at(s->order.phase + l->sent),
					     MIN(l->entered * size - l->sent, MAX_MESSAGE));
		}
	}
	return sent < 0 ? -1 : 0;
}

static void answer(struct loop *l, uint64_t number, uint64_t now)
{
	uint64_t *at = entry(l, number);
	struct stream *s = l->s;

	if (*at >= l->scored_ns) {
		s->is.bytes += s->order.size;
		s->is.elapsed_ns = now - l->first_ns;
		s->transactions++;
		histogram_add(s->latency, now - *at);
	}
	*at = 0;
	l->answered++;
	l->progress_ns = now;
}

static bool is_intact(struct loop *l, const void *payload, size_t length, uint64_t offset,
		      uint64_t now)
{
	bool fully = l->s->order.bytes || now < l->scored_ns;

	return intact(payload, length, l->s->order.phase + offset, fully, l->reads++);
}

/* These return -1 with errno on failure, and else whether there may be more to receive. */
static int take_tcp(struct loop *l, ssize_t got, uint64_t now)
{
	struct stream *s = l->s;

	if (!got) {
		errno = ECONNRESET;
		return -1;
	}
	s->is.corrupt += !is_intact(l, s->buffer, got, l->received, now);
	l->received += got;
	if (l->received > l->sent) {
		errno = EPROTO; /* a response to what was not asked */
		return -1;
	}
	while (l->answered < l->received / s->order.size)
		answer(l, l->answered, now);
	return got == CHUNK;
}

static int take_udp(struct loop *l, ssize_t got, uint64_t now)
{
	const struct datagram *head = l->s->buffer;
	uint64_t number = got < (ssize_t)sizeof(*head) ? UINT64_MAX : be64toh(head->sequence);
	uint32_t size = l->s->order.size;

	if (datagram_type(head, got) != RESPONSE || ntohl(head->flow) != l->s->flow ||
	    got != (ssize_t)size || number >= l->sent || l->entered - number > MAX_PENDING ||
	    !*entry(l, number))
		return 1;
	l->s->is.corrupt += !is_intact(l, head + 1, size - sizeof(*head), number * size, now);
	answer(l, number, now);
	return 1;
}

static int take(struct loop *l)
{
	ssize_t got = recv(l->s->fd, l->s->buffer, CHUNK, MSG_DONTWAIT);
	uint64_t now = now_ns();

	if (got < 0)
		return would_block(errno) || errno == EINTR ? 0 : -1;
	return l->s->run->endpoint.udp ? take_udp(l, got, now) : take_tcp(l, got, now);
}

/* Receives until the next request is due, or what is there. Returns -1 with errno on failure. */
static int receive_until(struct loop *l, uint64_t now, uint64_t next_ns)
{
	struct pollfd p = {.fd = l->s->fd, .events = all_sent(l) ? POLLIN : POLLIN | POLLOUT};
	uint64_t left = next_ns > now ? MIN(next_ns - now, TICK_NS) : 0;
	int more = 1;

	if (ppoll(&p, 1, &(struct timespec){0, left}, NULL) < 0)
		return errno == EINTR ? 0 : -1;
	if (!(p.revents & ~POLLOUT))
		return 0;
	while (more > 0 && outstanding(l))
		more = take(l);
	return more < 0 ? -1 : 0;
}

static int begin(struct loop *l)
{
	const struct order *o = &l->s->order;
	struct order wire = *o;

	prctl(PR_SET_TIMERSLACK, 1ul, 0ul, 0ul, 0ul); /* else ppoll() may be late by 50 us */
	order_swap(&wire);
	if (!l->s->run->endpoint.udp && send_all(l->s->fd, &wire, sizeof(wire), NULL))
		return -1;
	l->begin_ns = l->progress_ns = now_ns();
	l->scored_ns = l->begin_ns + o->warmup_ns;
	l->until_ns = o->bytes ? UINT64_MAX : l->scored_ns + l->s->run->duration_ns;
	l->count = o->bytes ? (o->bytes + o->size - 1) / o->size : UINT64_MAX;
	/* Streams do not send at the same time. */
	l->begin_ns += l->s->flow % 1024 * l->s->run->gap_ns / 1024;
	return 0;
}

void open_loop(struct stream *s)
{
	struct loop l = {.s = s};
	int error = begin(&l);

	while (!error) {
		uint64_t now = now_ns(), next_ns;

		enter(&l, now);
		error = send_entered(&l);
		next_ns = due_ns(&l) + (over(&l) ? TICK_NS : 0);
		if (error || (over(&l) && (!outstanding(&l) || now >= next_ns)))
			break;
		if (!outstanding(&l)) {
			wait_until(next_ns);
		} else if (now > l.progress_ns + LIMIT_NS) {
			errno = EAGAIN;
			error = -1;
		} else {
			error = receive_until(&l, now, next_ns);
		}
	}
	if (error)
		return fail(s, "request to", reason(errno));
	for (unsigned i = 0; i < MAX_PENDING; i++)
		if (s->due_ns[i])
			drop(&l, &s->due_ns[i]);
	if (!s->transactions)
		fail(s, "request to",
		     "saturated: of those due after the warm-up, none was answered");
}
