// SPDX-License-Identifier: Apache-2.0
/*
 * The server end. TCP: each thread waits in accept(), then serves the connection to its end. A
 * thread that leaves no other waiting starts the next one. So a short connection needs no new
 * thread. UDP: one thread answers all datagrams, and each stream down has a thread that sends.
 */
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent.h"

#define MAX_WORKERS 256
#define MAX_FLOWS   256

/* A UDP stream. A new one replaces the one that was silent for the longest time. */
struct flow {
	struct sender sender; /* streams up use its order, flow and heard_ns, too */
	union address peer;
	struct server *server;
	struct score score;
	uint64_t told_ns; /* last time that ALIVE was sent to the client */
	bool sending;	  /* a thread uses it */
	bool finished;	  /* the score is final */
};

struct server {
	struct endpoint endpoint;
	uint64_t delay_ns;
	int fd;
	atomic_bool stopping;
	pthread_mutex_t lock;
	pthread_cond_t left; /* a thread has ended */
	unsigned threads, waiting;
	pthread_t thread[MAX_WORKERS + MAX_FLOWS + 1];
	struct flow *flow; /* MAX_FLOWS of them (UDP) */
};

static void *tcp_worker(void *argument);

/* To be called with the lock held. */
static int add_thread(struct server *s, void *(*run)(void *), void *argument)
{
	int error = start_thread(&s->thread[s->threads], run, argument);

	if (error)
		return error;
	pthread_detach(s->thread[s->threads++]);
	return 0;
}

static void thread_leaves(struct server *s)
{
	unsigned i = 0;

	while (!pthread_equal(s->thread[i], pthread_self()))
		i++;
	s->thread[i] = s->thread[--s->threads];
	pthread_cond_signal(&s->left);
	pthread_mutex_unlock(&s->lock);
}

/* Sends each request back, until the client ends the connection. */
static void echo(const struct server *s, int fd, uint32_t size, void *buffer, bool own)
{
	void *large = size > CHUNK ? malloc(size) : NULL;

	if (own)
		wait_untimed(fd);
	set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
	if (size > CHUNK)
		buffer = large;
	while (buffer && !receive_all(fd, buffer, size, &s->stopping)) {
		if (s->delay_ns)
			spin_ns(s->delay_ns);
		if (send_all(fd, buffer, size, &s->stopping))
			break;
	}
	free(large);
}

/* Serves one connection. Returns 0 if it ended well, and is to be closed without a reset. */
static int serve_connection(const struct server *s, int fd, void *buffer, bool own)
{
	const atomic_bool *stop = &s->stopping;
	struct score score;
	struct order o;

	if (receive_all(fd, &o, sizeof(o), stop))
		return -1;
	order_swap(&o);
	if (o.magic != MAGIC || !o.size || o.size > MAX_MESSAGE)
		return -1;
	switch (o.mode) {
	case STREAM_UP:
		if (tcp_receive(fd, &o, UINT64_MAX, &score, buffer, stop))
			return -1;
		report_swap(&score.is);
		return send_all(fd, &score.is, sizeof(score.is), stop);
	case STREAM_DOWN:
		return tcp_send(fd, &o, UINT64_MAX, stop);
	case REQUEST_RESPONSE:
		echo(s, fd, o.size, buffer, own);
		return -1;
	}
	return -1;
}

/* Makes sure that a thread waits for the next connection. False if the server is stopping. */
static bool worker_begins(struct server *s)
{
	bool stopping;

	pthread_mutex_lock(&s->lock);
	stopping = s->stopping;
	s->waiting--;
	if (!stopping && !s->waiting && s->threads < MAX_WORKERS && !add_thread(s, tcp_worker, s))
		s->waiting++;
	pthread_mutex_unlock(&s->lock);
	return !stopping;
}

static void *tcp_worker(void *argument)
{
	struct server *s = argument;
	bool own = own_files(s->fd);
	void *buffer = malloc(CHUNK);

	while (buffer && !s->stopping) {
		int fd = accept(s->fd, NULL, NULL);

		if (fd < 0) {
			if (!would_block(errno))
				pause_ns(SECOND_NS / 1000); /* for example, out of descriptors */
			continue;
		}
		if (!worker_begins(s) || serve_connection(s, fd, buffer, own))
			close_by_reset(fd);
		else
			close(fd);
		pthread_mutex_lock(&s->lock);
		s->waiting++;
		pthread_mutex_unlock(&s->lock);
	}
	free(buffer);
	if (own)
		close(s->fd);
	pthread_mutex_lock(&s->lock);
	s->waiting--;
	thread_leaves(s);
	return NULL;
}

static void *udp_sender(void *argument)
{
	struct flow *f = argument;
	struct server *s = f->server;
	bool own = own_files(s->fd);

	udp_send(&f->sender, UINT64_MAX);
	/* A stream of given length: from END the client knows what was lost at its end. */
	while (f->sender.order.bytes && f->sender.heard_ns &&
	       now_ns() < f->sender.heard_ns + LIMIT_NS) {
		datagram_send(s->fd, &f->peer, END, f->sender.flow, f->sender.sent, NULL, 0);
		pause_ns(TICK_NS / 5);
	}
	if (own)
		close(s->fd);
	pthread_mutex_lock(&s->lock);
	f->sending = false;
	thread_leaves(s);
	return NULL;
}

static struct flow *find_flow(struct server *s, uint32_t id)
{
	for (unsigned i = 0; i < MAX_FLOWS; i++)
		if (s->flow[i].sender.flow == id && s->flow[i].server)
			return &s->flow[i];
	return NULL;
}

static void open_flow(struct server *s, uint32_t id, const struct order *o,
		      const union address *peer)
{
	struct flow *f = NULL;

	pthread_mutex_lock(&s->lock);
	for (unsigned i = 0; i < MAX_FLOWS; i++) {
		struct flow *other = &s->flow[i];

		if (!other->sending && (!f || other->sender.heard_ns < f->sender.heard_ns))
			f = other;
	}
	if (f) {
		*f = (struct flow){.server = s, .peer = *peer};
		f->sender = (struct sender){
			.fd = s->fd, .to = &f->peer, .order = *o, .flow = id, .heard_ns = now_ns()};
		score_start(&f->score, o);
		f->sending = o->mode == STREAM_DOWN && !add_thread(s, udp_sender, f);
	}
	pthread_mutex_unlock(&s->lock);
}

static void take_datagram(struct server *s, struct datagram *head, size_t length,
			  const union address *from)
{
	enum datagram_type type = datagram_type(head, length);
	uint32_t id = ntohl(head->flow);
	struct report report;
	struct flow *f;
	struct order o;

	if (type == REQUEST) {
		if (s->delay_ns)
			spin_ns(s->delay_ns);
		head->type = htonl(MAGIC ^ RESPONSE);
		(void)!sendto(s->fd, head, length, MSG_NOSIGNAL, &from->any, address_size(from));
		return;
	}
	f = find_flow(s, id);
	if (!f && type == OPEN && length == sizeof(*head) + sizeof(o)) {
		memcpy(&o, head + 1, sizeof(o));
		order_swap(&o);
		if (o.magic == MAGIC && o.size >= sizeof(*head) && o.size <= MAX_DATAGRAM)
			open_flow(s, id, &o, from);
		f = find_flow(s, id);
	}
	if (!f)
		return;
	if (f->sender.heard_ns)
		f->sender.heard_ns = now_ns();
	switch (type) {
	case OPEN:
		datagram_send(s->fd, from, READY, id, 0, NULL, 0);
		break;
	case DATA:
		if (length == f->sender.order.size && !f->finished)
			score_datagram(&f->score, &f->sender.order, head, length);
		if (f->score.last_ns - f->told_ns > SECOND_NS) {
			datagram_send(s->fd, from, ALIVE, id, 0, NULL, 0);
			f->told_ns = f->score.last_ns;
		}
		break;
	case END:
		if (!f->finished)
			score_finish(&f->score, be64toh(head->sequence));
		f->finished = true;
		report = f->score.is;
		report_swap(&report);
		datagram_send(s->fd, from, REPORT, id, 0, &report, sizeof(report));
		break;
	case DONE:
		f->sender.heard_ns = 0;
		break;
	default:
		break;
	}
}

static void *udp_worker(void *argument)
{
	struct server *s = argument;
	struct datagram *head = malloc(1 << 16);
	bool own = own_files(s->fd);

	while (head && !s->stopping) {
		union address from;
		socklen_t size = sizeof(from);
		ssize_t length = recvfrom(s->fd, head, 1 << 16, 0, &from.any, &size);

		if (length >= (ssize_t)sizeof(*head))
			take_datagram(s, head, length, &from);
	}
	free(head);
	if (own)
		close(s->fd);
	pthread_mutex_lock(&s->lock);
	thread_leaves(s);
	return NULL;
}

struct server *server_start(struct endpoint e, union address *at, uint64_t delay_ns)
{
	struct server *s = calloc(1, sizeof(*s));
	int error;

	if (!s)
		return NULL;
	s->endpoint = e;
	s->delay_ns = delay_ns;
	s->fd = listen_at(e, at);
	error = s->fd < 0 ? errno : 0;
	if (!error)
		set_timeouts(s->fd);
	s->waiting = 1;
	pthread_mutex_init(&s->lock, NULL);
	pthread_cond_init(&s->left, NULL);
	if (!error && e.udp && !(s->flow = calloc(MAX_FLOWS, sizeof(*s->flow))))
		error = ENOMEM;
	if (!error) {
		pthread_mutex_lock(&s->lock);
		error = add_thread(s, e.udp ? udp_worker : tcp_worker, s);
		pthread_mutex_unlock(&s->lock);
	}
	if (!error)
		return s;
	if (s->fd >= 0)
		close(s->fd);
	free(s->flow);
	free(s);
	errno = error;
	return NULL;
}

/*
 * shutdown() of the listening socket ends accept(). Threads that serve check `stopping` after each
 * tick, or when they are woken.
 */
void server_stop(struct server *s)
{
	pthread_mutex_lock(&s->lock);
	s->stopping = true;
	if (!s->endpoint.udp)
		shutdown(s->fd, SHUT_RDWR);
	while (s->threads) {
		for (unsigned i = 0; s->flow && i < MAX_FLOWS; i++)
			s->flow[i].sender.heard_ns = 0;
		for (unsigned i = 0; i < s->threads; i++)
			wake(s->thread[i]);
		wait_a_tick(&s->left, &s->lock);
	}
	pthread_mutex_unlock(&s->lock);
	close(s->fd);
	free(s->flow);
	free(s);
}
