// SPDX-License-Identifier: Apache-2.0
/*
 * The client end: resolves the name anew, opens the run's streams one after the other, then runs
 * each in a thread of its own. If a stream or a request/response connection fails, the run fails.
 * Of connect/request/close, only the first has to succeed; later failures are counted.
 */
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

/* The threads of a run. */
struct group {
	pthread_mutex_t lock;
	pthread_cond_t ended; /* a thread has ended */
	unsigned running;
};

void fail(struct stream *s, const char *what, const char *why)
{
	const struct run *r = s->run;
	bool literal = strchr(r->host, ':');

	snprintf(s->fault, sizeof(s->fault), "%s %s%.200s%s:%u: %s", what, literal ? "[" : "",
		 r->host, literal ? "]" : "", r->port, why);
}

/* --- streams --- */

static void tcp_stream(struct stream *s, uint64_t until_ns)
{
	struct score score = {0};
	int error;

	if (s->order.mode == STREAM_UP) {
		error = tcp_send(s->fd, &s->order, until_ns, NULL);
		if (error)
			return fail(s, "send to", reason(error));
		shutdown(s->fd, SHUT_WR);
		if (receive_all(s->fd, &s->is, sizeof(s->is), NULL))
			return fail(s, "score from", reason(errno));
		report_swap(&s->is);
	} else {
		error = tcp_receive(s->fd, &s->order, s->order.bytes ? UINT64_MAX : until_ns,
				    &score, s->buffer, NULL);
		if (error)
			return fail(s, "receive from", reason(error));
		if (!s->order.bytes && score.last_ns < until_ns)
			return fail(s, "receive from", "ended early");
		s->is = score.is;
	}
	if (s->order.bytes && s->is.bytes != s->order.bytes)
		fail(s, "stream to", "not all bytes arrived");
}

/* Returns the length of the next datagram of this flow; 0 after a tick without one; -1, errno. */
static ssize_t receive_datagram(struct stream *s, enum datagram_type *type)
{
	const struct datagram *head = s->buffer;

	for (;;) {
		ssize_t length = recv(s->fd, s->buffer, 1 << 16, 0);

		if (length < 0 && errno == EINTR)
			continue;
		if (length < 0)
			return would_block(errno) ? 0 : -1;
		*type = datagram_type(head, length);
		if (*type && ntohl(head->flow) == s->flow)
			return length;
	}
}

/* Repeats a datagram until it is answered by one of type `answer`. */
static ssize_t ask(struct stream *s, enum datagram_type type, uint64_t sequence, const void *body,
		   size_t size, enum datagram_type answer)
{
	enum datagram_type got;
	ssize_t length;

	for (uint64_t begin = now_ns(); now_ns() < begin + LIMIT_NS;) {
		if (datagram_send(s->fd, NULL, type, s->flow, sequence, body, size))
			return -1;
		while ((length = receive_datagram(s, &got)) > 0)
			if (got == answer)
				return length;
		if (length < 0)
			return -1;
	}
	errno = EAGAIN;
	return -1;
}

static void udp_up(struct stream *s, const struct order *wire)
{
	const struct order *o = &s->order;
	struct sender sender = {.fd = s->fd, .order = *o, .flow = s->flow};
	uint64_t until_ns = UINT64_MAX;
	int error;

	if (ask(s, OPEN, 0, wire, sizeof(*wire), READY) < 0)
		return fail(s, "open", reason(errno));
	if (!o->bytes)
		until_ns = now_ns() + o->warmup_ns + s->run->duration_ns;
	sender.heard_ns = now_ns();
	error = udp_send(&sender, until_ns);
	if (error)
		return fail(s, "send to", reason(error));
	if (ask(s, END, sender.sent, NULL, 0, REPORT) <
	    (ssize_t)(sizeof(struct datagram) + sizeof(s->is)))
		return fail(s, "score from", reason(errno));
	memcpy(&s->is, (struct datagram *)s->buffer + 1, sizeof(s->is));
	report_swap(&s->is);
}

static void udp_down(struct stream *s, const struct order *wire)
{
	const struct datagram *head = s->buffer;
	const struct order *o = &s->order;
	uint64_t now = now_ns(), heard = now, spoke = 0, sent = 0;
	uint64_t until_ns = o->bytes ? UINT64_MAX : now + o->warmup_ns + s->run->duration_ns;
	enum datagram_type type = 0;
	struct score score;

	score_start(&score, o);
	for (; now < until_ns && type != END; now = now_ns()) {
		ssize_t length;

		if (!spoke || now - spoke >= (score.total ? SECOND_NS : TICK_NS)) {
			if (datagram_send(s->fd, NULL, score.total ? ALIVE : OPEN, s->flow, 0, wire,
					  score.total ? 0 : sizeof(*wire)))
				return fail(s, "open", reason(errno));
			spoke = now;
		}
		type = 0;
		length = receive_datagram(s, &type);
		if (length < 0)
			return fail(s, "receive from", reason(errno));
		if (type == DATA && length == (ssize_t)o->size)
			score_datagram(&score, o, head, length);
		if (type == END)
			sent = be64toh(head->sequence);
		if (length)
			heard = now;
		else if (now - heard > LIMIT_NS)
			return fail(s, "receive from", reason(EAGAIN));
	}
	for (int i = 0; i < 3; i++) /* one may be lost */
		datagram_send(s->fd, NULL, DONE, s->flow, 0, NULL, 0);
	score_finish(&score, sent);
	s->is = score.is;
}

static void stream(struct stream *s)
{
	struct order wire = s->order;

	if (!s->run->endpoint.udp) {
		tcp_stream(s, now_ns() + s->order.warmup_ns + s->run->duration_ns);
	} else {
		order_swap(&wire);
		if (s->order.mode == STREAM_UP)
			udp_up(s, &wire);
		else
			udp_down(s, &wire);
	}
	if (!*s->fault && !s->is.bytes)
		fail(s, "stream to", "nothing arrived after the warm-up");
}

/* --- transactions --- */

enum outcome { DONE_RIGHT, DONE_CORRUPT, LOST, FAILED };

static enum outcome exchange_tcp(struct stream *s, uint64_t nth, bool first, bool fully)
{
	uint64_t offset = s->order.phase + nth * s->order.size;
	const void *request = pattern_at(offset);
	struct order wire = s->order;
	int error;

	if (first) {
		order_swap(&wire);
		error = send_both(s->fd, &wire, sizeof(wire), request, s->order.size, NULL);
	} else {
		error = send_all(s->fd, request, s->order.size, &s->stalled);
	}
	if (error || receive_all(s->fd, s->buffer, s->order.size, &s->stalled))
		return FAILED;
	return intact(s->buffer, s->order.size, offset, fully, nth) ? DONE_RIGHT : DONE_CORRUPT;
}

static enum outcome exchange_udp(struct stream *s, uint64_t nth, bool fully)
{
	uint64_t offset = s->order.phase + nth * s->order.size;
	size_t body = s->order.size - sizeof(struct datagram);
	const struct datagram *head = s->buffer;
	enum datagram_type type;

	/* Copied into one buffer: for small messages, faster than a send of several parts. */
	*s->request = (struct datagram){htonl(MAGIC ^ REQUEST), htonl(s->flow), htobe64(nth)};
	memcpy(s->request + 1, pattern_at(offset), body);
	if (send_some(s->fd, s->request, s->order.size, NULL) < 0)
		return FAILED;
	for (;;) {
		ssize_t length = receive_datagram(s, &type);

		if (length <= 0)
			return length ? FAILED : LOST;
		if (type == RESPONSE && be64toh(head->sequence) == nth &&
		    length == (ssize_t)s->order.size)
			return intact(head + 1, body, offset, fully, nth) ? DONE_RIGHT
									  : DONE_CORRUPT;
	}
}

/* Sets time-outs of a tick, unless `attend` can wake the thread that waits in a call. */
static void limit_calls(struct stream *s)
{
	if (!s->own || s->run->kind == STREAM || s->run->endpoint.udp)
		set_timeouts(s->fd);
}

static int connect_stream(struct stream *s)
{
	s->fd = dial(s->run->endpoint, s->to);
	if (s->fd < 0)
		return -1;
	if (s->run->kind == CRR)
		limit_calls(s);
	if (!s->run->endpoint.udp && s->run->kind != STREAM)
		set_option(s->fd, IPPROTO_TCP, TCP_NODELAY, 1);
	return 0;
}

/* Closes by reset, so that ports in TIME_WAIT do not limit the measured rate. */
static void disconnect(struct stream *s)
{
	if (s->run->endpoint.udp)
		close(s->fd);
	else
		close_by_reset(s->fd);
	s->fd = -1;
}

uint64_t wait_until(uint64_t due_ns)
{
	uint64_t now = now_ns();

	if (due_ns > now + SPIN_NS)
		pause_ns(due_ns - now - SPIN_NS);
	while ((now = now_ns()) < due_ns)
		;
	return now;
}

/* A closed loop: sends each request when the last one is answered. */
static void transactions(struct stream *s)
{
	const struct order *o = &s->order;
	uint64_t begin = now_ns(), scored_ns = begin + o->warmup_ns, first_ns = 0, now;
	uint64_t until_ns = o->bytes ? UINT64_MAX : scored_ns + s->run->duration_ns;
	bool udp = s->run->endpoint.udp, renew = s->run->kind == CRR, succeeded = false;

	s->progress_ns = begin;
	for (uint64_t nth = 0; begin < until_ns && (!o->bytes || nth * o->size < o->bytes); nth++) {
		bool scored = begin >= scored_ns;
		enum outcome outcome = FAILED;
		const char *what = "connect";

		if (!renew || !connect_stream(s)) {
			bool fully = o->bytes || !scored;

			what = "request to";
			outcome = udp ? exchange_udp(s, nth, fully)
				      : exchange_tcp(s, nth, renew || !nth, fully);
		}
		if (outcome == FAILED &&
		    (!renew || !succeeded || now_ns() - s->progress_ns > LIMIT_NS))
			return fail(s, what, reason(errno));
		if (renew && s->fd >= 0)
			disconnect(s);
		now = now_ns();
		if (outcome <= DONE_CORRUPT) {
			s->progress_ns = now;
			succeeded = true;
		} else if (now - s->progress_ns > LIMIT_NS) {
			return fail(s, what, reason(EAGAIN));
		}
		s->is.corrupt += outcome == DONE_CORRUPT;
		if (scored) {
			if (!first_ns)
				first_ns = begin;
			s->is.elapsed_ns = now - first_ns;
			s->is.lost += outcome == LOST;
			s->errors += outcome == FAILED;
		}
		if (scored && outcome <= DONE_CORRUPT) {
			s->is.bytes += o->size;
			s->transactions++;
			histogram_add(s->latency, now - begin);
		}
		begin = now;
	}
	if (!s->transactions)
		fail(s, "request to", "no response after the warm-up");
}

/* --- a run --- */

static void *drive(void *argument)
{
	struct stream *s = argument;

	s->own = own_files(s->fd);
	if (s->run->kind != CRR)
		limit_calls(s);
	if (s->run->kind == STREAM)
		stream(s);
	else if (s->run->gap_ns)
		open_loop(s);
	else
		transactions(s);
	if (s->run->kind == CRR && s->fd >= 0)
		disconnect(s);
	else if (s->own && s->fd >= 0)
		close(s->fd);
	pthread_mutex_lock(&s->group->lock);
	s->group->running--;
	pthread_cond_signal(&s->group->ended);
	pthread_mutex_unlock(&s->group->lock);
	return NULL;
}

int resolve(const struct run *r, union address *to, const char **why)
{
	struct addrinfo hints = {.ai_family = r->endpoint.family, .ai_socktype = SOCK_STREAM};
	struct addrinfo *found = NULL;
	int error = getaddrinfo(r->host, NULL, &hints, &found);

	*why = error ? gai_strerror(error) : "no address of this family";
	/* OSv returns the first address in its hosts file, whatever its family. */
	if (!error && found->ai_addr->sa_family != r->endpoint.family)
		error = EAI_NONAME;
	if (!error) {
		memcpy(to, found->ai_addr, MIN(sizeof(*to), found->ai_addrlen));
		address_set_port(to, r->port);
	}
	if (found)
		freeaddrinfo(found);
	return error;
}

/* Draws a number that differs for each stream on all machines that share a server. */
static uint32_t draw_flow(void)
{
	static atomic_uint drawn;
	struct timespec t;
	uint64_t x;

	clock_gettime(CLOCK_REALTIME, &t);
	x = t.tv_sec * SECOND_NS + t.tv_nsec + ((uint64_t)getpid() << 40) + drawn++;
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ x >> 27) * 0x94d049bb133111ebull;
	return x >> 32;
}

static int open_stream(struct stream *s, const struct run *r, const union address *to)
{
	struct order wire;

	s->run = r;
	s->to = to;
	s->fd = -1;
	s->flow = draw_flow();
	s->order = r->order;
	s->order.phase = s->flow;
	s->buffer = malloc(r->order.size > CHUNK ? r->order.size : CHUNK);
	s->request = malloc(MAX_DATAGRAM);
	s->due_ns = calloc(r->gap_ns ? MAX_PENDING : 1, sizeof(*s->due_ns));
	s->latency = calloc(1, sizeof(*s->latency));
	if (!s->buffer || !s->request || !s->due_ns || !s->latency) {
		fail(s, "stream to", strerror(ENOMEM));
		return -1;
	}
	if (r->kind == CRR)
		return 0;
	if (connect_stream(s)) {
		fail(s, "connect", reason(errno));
		return -1;
	}
	if (r->kind == RR || r->endpoint.udp)
		return 0;
	wire = s->order;
	order_swap(&wire);
	if (!send_all(s->fd, &wire, sizeof(wire), NULL))
		return 0;
	fail(s, "send to", reason(errno));
	return -1;
}

static void print_result(FILE *out, const union address *to, const struct stream *total)
{
	const struct report *is = &total->is;
	char address[INET6_ADDRSTRLEN];

	address_text(to, address);
	fprintf(out,
		"{\"ok\":true,\"address\":\"%s\",\"bytes\":%llu,\"duration_s\":%.9f,"
		"\"transactions\":%llu,\"datagrams\":%llu,\"errors\":%llu,\"lost\":%llu,"
		"\"unanswered\":%llu,\"unsent\":%llu,\"reordered\":%llu,\"corrupt\":%llu,"
		"\"histogram_us\":[",
		address, (unsigned long long)is->bytes, is->elapsed_ns / 1e9,
		(unsigned long long)total->transactions, (unsigned long long)is->datagrams,
		(unsigned long long)total->errors, (unsigned long long)is->lost,
		(unsigned long long)total->unanswered, (unsigned long long)total->unsent,
		(unsigned long long)is->reordered, (unsigned long long)is->corrupt);
	histogram_print(total->latency, out);
	fprintf(out, "]}\n");
}

static void merge(struct stream *into, const struct stream *from)
{
	into->is.bytes += from->is.bytes;
	into->is.datagrams += from->is.datagrams;
	into->is.lost += from->is.lost;
	into->is.reordered += from->is.reordered;
	into->is.corrupt += from->is.corrupt;
	if (from->is.elapsed_ns > into->is.elapsed_ns)
		into->is.elapsed_ns = from->is.elapsed_ns;
	into->transactions += from->transactions;
	into->errors += from->errors;
	into->unanswered += from->unanswered;
	into->unsent += from->unsent;
	histogram_merge(into->latency, from->latency);
}

/* Waits until all threads have ended. Wakes those without a transaction for 5 s, to give up. */
static void attend(struct group *group, struct stream *all, unsigned streams)
{
	pthread_mutex_lock(&group->lock);
	while (group->running) {
		wait_a_tick(&group->ended, &group->lock);
		for (unsigned i = 0; i < streams; i++) {
			uint64_t progress_ns = all[i].progress_ns;

			if (!progress_ns || now_ns() < progress_ns + LIMIT_NS)
				continue;
			all[i].stalled = true;
			wake(all[i].thread);
		}
	}
	pthread_mutex_unlock(&group->lock);
}

void run(const struct run *r, FILE *out)
{
	struct group group = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0};
	struct stream *all = calloc(r->streams, sizeof(*all));
	struct stream named = {.run = r};
	const char *fault = NULL, *why;
	unsigned opened = 0, started = 0;
	union address to;
	int error = 0;

	if (!all) {
		fail(&named, "stream to", strerror(ENOMEM));
		fault = named.fault;
	} else if (resolve(r, &to, &why)) {
		fail(&named, "resolve", why);
		fault = named.fault;
	}
	while (!fault && opened < r->streams)
		if (open_stream(&all[opened++], r, &to))
			fault = all[opened - 1].fault;
	pthread_mutex_lock(&group.lock);
	while (!fault && !error && started < r->streams) {
		all[started].group = &group;
		error = start_thread(&all[started].thread, drive, &all[started]);
		started += !error;
	}
	group.running = started;
	pthread_mutex_unlock(&group.lock);
	attend(&group, all, started);
	for (unsigned i = 0; i < started; i++) {
		pthread_join(all[i].thread, NULL);
		if (!fault && *all[i].fault)
			fault = all[i].fault;
	}
	if (error && !fault) {
		fail(&named, "start a thread for", strerror(error));
		fault = named.fault;
	}
	if (fault) {
		print_fault(out, fault);
	} else {
		for (unsigned i = 1; i < r->streams; i++)
			merge(&all[0], &all[i]);
		print_result(out, &to, &all[0]);
	}
	for (unsigned i = 0; i < opened; i++) {
		if (all[i].fd >= 0)
			disconnect(&all[i]);
		free(all[i].buffer);
		free(all[i].request);
		free(all[i].due_ns);
		free(all[i].latency);
	}
	free(all);
}
